"""Kernels for decode steps of several sequences at once: their text, and which of them make a step in which order.

Where `runner.ops.cuda.shape` plans one kernel for a whole step of one sequence, this is a graph of small ones, for up
to 64 sequences, and for mixtures of experts. Nothing here needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from runner.ops.cuda.shape import ACTIVATIONS, DOWN, GATE_UP, HEAD, NUMBERS, OUTPUT, QKV, StepShape, Unfit, text

TILE = 8
"""Rows of a step that a tensor core takes at once."""

MOST_TILES = 4
"""Tiles of rows that one warp multiplies with the weights it has read; more are another block's."""

MOST_ROWS = 64
"""Sequences of a step at most."""

PART = 128
"""Positions of a sequence that one block attends to."""

ENOUGH_BLOCKS = 256
"""Blocks of attention that an H200 has room for: one that begins takes as long as some parts."""

MOST_PARTS = 8
"""Parts that a block attends to one after the other at most: of a long sequence beside short ones."""

MOST_WARPS = 16
"""Warps of a block."""

ENOUGH = 2500
"""Warps that keep an H200 reading."""

NAMES = ("qkv", "output", "gate_up", "down", "head")
"""The kernels' names for the five products."""


def columns_at_once(bits: int) -> int:
    """Columns of which four lanes hold 16 bytes each: KB in `rows.cu`."""
    return 128 if bits == 4 else 64 if bits == 8 else 32


def divided(rows: int, columns: int, bits: int) -> tuple[int, int, int]:
    """How a block divides a product: tiles of 16 rows a warp, warps along the rows, and warps along the columns."""
    along = 4
    while along < MOST_WARPS and -(-rows // 32) * along < ENOUGH:
        along *= 2
    while along > columns // columns_at_once(bits):
        along //= 2
    return (1 if along == MOST_WARPS else 2), (2 if along == 4 else 1), along


@dataclass(frozen=True)
class Launch:
    """How a kernel is started."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_memory: int = 0


@dataclass(frozen=True)
class RowsPlan:
    """A step of `rows` rows (8, 16, 32 or 64, of which some may be unused) of a model of this shape."""

    shape: StepShape
    rows: int

    def __post_init__(self) -> None:
        """Check that there are kernels for the shape.

        Raises:
            Unfit: there are none.
        """
        s = self.shape
        if s.cache not in ("bfloat16", "float16"):
            raise Unfit(f"activations in {s.cache}")
        packed = [form.bits > 0 for form in s.forms]
        affine = any(form.bits and not form.scaled for form in s.forms)
        if (not all(packed) and s.weights != s.cache) or (affine and s.scales != s.cache):
            raise Unfit("matrices of another type than its activations")
        for index, (rows, columns, form) in enumerate(zip(s.rows, s.columns, s.forms, strict=True)):
            if not form.known:
                raise Unfit(f"weights of {form}")
            if columns % columns_at_once(form.bits) or columns % 8:
                raise Unfit(f"a matrix of {rows} x {columns}")
            if s.experts and s.biased[index]:
                raise Unfit("mixtures with biases")
        if not s.embedding.known:
            raise Unfit(f"embeddings of {s.embedding}")
        if s.head_dim % 8 or s.head_dim > 256:
            raise Unfit(f"heads of {s.head_dim} numbers")
        if s.activation not in ACTIVATIONS:
            raise Unfit(f"the activation {s.activation}")
        if s.experts and not (s.gated and s.chosen <= MOST_WARPS and s.experts <= 1024):
            raise Unfit("mixtures of another kind")
        if s.hidden % (128 if s.experts else 8):
            raise Unfit(f"rows of {s.hidden} numbers")

    @property
    def tiles(self) -> int:
        """Tiles of rows that one block takes."""
        return min(MOST_TILES, self.rows // TILE)

    def warps(self, index: int) -> tuple[int, int, int]:
        """How a block divides a product: tiles of 16 rows a warp, warps along the rows, and along the columns.

        The number of rows of the step has no say in it, as it decides in which order a row's products are added.
        """
        s = self.shape
        pair = index == GATE_UP and s.gated
        tiles, down, along = divided(s.rows[index], s.columns[index], s.forms[index].bits)
        return (2 if pair else tiles), down, along

    def product(self, index: int) -> Launch:
        """How the product is started."""
        tiles, down, along = self.warps(index)
        pair = index == GATE_UP and self.shape.gated
        blocks = -(-(self.shape.rows[index] // (2 if pair else 1)) // (down * 16 * (1 if pair else tiles)))
        memory = down * along * 16 * tiles * (TILE * self.tiles + 1) * 4
        return Launch(NAMES[index], (self.rows // TILE // self.tiles, blocks, 1), 32 * down * along, memory)

    def parts_each(self, parts: int, used: int) -> int:
        """How many of at most so many parts of a row a block attends to, one after the other, for `used` rows."""
        blocks = parts * self.shape.kv_heads * self.head_groups * used
        return min(MOST_PARTS, parts, -(-blocks // ENOUGH_BLOCKS))

    def attention(self, parts: int, used: int) -> Launch:
        """How attention to at most so many parts is started, for the first `used` rows."""
        grid = (-(-parts // self.parts_each(parts, used)), self.shape.kv_heads * self.head_groups, used)
        return Launch("attend", grid, 256)

    @property
    def head_groups(self) -> int:
        """How many blocks share the heads of one head of keys: NHG in `rows.cu`."""
        s = self.shape
        group, units = s.heads // s.kv_heads, s.head_dim // 8
        lanes = next(n for n in (32, 16, 8, 4, 2, 1) if units % n == 0)
        each = units // lanes
        if each == 1 and group % 4 == 0:
            return group // 4
        if each == 1 and group % 3 == 0:
            return group // 3
        return group // 2 if group % 2 == 0 and each <= 2 else group

    def route(self, used: int) -> Launch:
        """How a mixture's router is started, for the first `used` rows."""
        return Launch("route", (-(-self.shape.experts // 8), used, 1), 256)

    def _open_warps(self) -> tuple[int, int]:
        blocks = self.shape.hidden // columns_at_once(self.shape.forms[GATE_UP].bits)
        return (1, 8) if blocks >= 8 else (2, 4 if blocks >= 4 else 1)

    def opened(self, used: int) -> Launch:
        """How the experts' gate and up are started, for each chosen expert of each row."""
        down, along = self._open_warps()
        blocks = -(-self.shape.intermediate // (16 * down))
        memory = down * along * 32 * 4
        return Launch("gate_up", (blocks, used * self.shape.chosen, 1), 32 * down * along, memory)

    @property
    def _close_warps(self) -> int:
        blocks = self.shape.intermediate // columns_at_once(self.shape.forms[DOWN].bits)
        return 2 if blocks > 1 and self.shape.chosen * 2 <= MOST_WARPS else 1

    def closed(self, used: int) -> Launch:
        """How the experts' down projections are started, for all chosen experts of a row."""
        warps = self.shape.chosen * self._close_warps
        return Launch("down", (-(-self.shape.hidden // 16), used, 1), 32 * warps, warps * 16 * 4)

    @cached_property
    def source(self) -> str:
        """The kernels' text."""
        s = self.shape
        constants: dict[str, int] = {
            "ROWS": self.rows, "D": s.hidden, "H": s.heads, "KV": s.kv_heads, "HD": s.head_dim, "F": s.intermediate,
            "V": s.vocab, "GH": s.heads // s.kv_heads, "QR": s.rows[QKV], "NROPE": s.ropes, "RD": max(2, s.rope_dims),
            "XT": NUMBERS[s.cache], "ST": NUMBERS[s.scales], "AT": NUMBERS[s.small], "EMB_T": NUMBERS[s.table],
            "EMB_BITS": s.embedding.bits, "EMB_G": s.embedding.group, "EMB_S": s.embedding.scaled,
            "ACT": ACTIVATIONS[s.activation],
            "OUT_BITS": s.forms[OUTPUT].bits, "BITS_DOWN": s.forms[DOWN].bits, "ROUTER_T": NUMBERS[s.router],
        }  # fmt: skip
        floats = {
            "EPS": s.norm_eps[0], "EPS_LAST": s.norm_eps[1], "EPS_HEAD": s.norm_eps[2], "ATT_SCALE": s.attention_scale,
            "ATT_CAP": s.attention_cap, "EMB_SCALE": s.embedding_scale, "RES_SCALE": s.residual_scale,
            "LOGIT_SCALE": s.logit_scale, "LOGIT_CAP": s.logit_cap, "CHOSEN_SCALE": s.chosen_scale,
        }  # fmt: skip
        flags = {
            "QKN": s.head_norms, "TRADITIONAL": s.traditional, "CHOSEN_NORM": s.chosen_norm,
            "DOWN_SUMMED": s.summed[1],
        }  # fmt: skip
        lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
        lines += [f"constexpr float {name} = {value!r}f;" for name, value in floats.items()]
        lines += [f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]
        lines += [f"#define EXPERTS {s.experts}", f"#define CHOSEN {max(1, s.chosen)}"]
        return "\n".join([*lines, text("forms.cu"), text("tiles.cu"), text("rows.cu"), *self._kernels()]) + "\n"

    def _kernels(self) -> list[str]:
        """One kernel for each product, and for each norm before one."""
        s = self.shape
        found = []
        for index, eps in ((QKV, "EPS"), (GATE_UP, "EPS"), (HEAD, "EPS_LAST")):
            found.append(
                f"KERNEL(256) norm_{NAMES[index]}(float* h, const void* w, char* x, float* plain, const float* sum) "
                f"{{ normed<{s.forms[index].bits}>(h, w, x, plain, sum, {eps}); }}"
            )
        for index in range(5):
            if s.experts and index in (GATE_UP, DOWN):
                continue
            launch, (tiles, down, along), form = self.product(index), self.warps(index), s.forms[index]
            added = {OUTPUT: s.summed[0], DOWN: s.summed[1]}  # over ranks, and then to the residual stream
            mode = {QKV: 0, GATE_UP: 2, HEAD: 3}.get(index, 0 if added.get(index) else 1)
            pair = index == GATE_UP and s.gated
            arguments = [
                form.arguments, s.columns[index], s.rows[index], tiles, down, along, mode,
                str(pair).lower(), s.forms[DOWN].bits, s.intermediate, str(s.biased[index]).lower(), self.tiles,
            ]  # fmt: skip
            found.append(
                f"KERNEL({launch.threads}) {launch.name}(const void* w, const void* s, const void* z, const void* b, "
                f"const char* x, void* out, u64* best, int id) {{ "
                f"product<{', '.join(map(str, arguments))}>(w, s, z, b, x, out, best, id); }}"
            )
        if s.experts:
            given = (
                "const Step* step, const Choice* choices, const void* w, const void* s, const void* z, const char* x"
            )
            form, (down, along) = s.forms[GATE_UP], self._open_warps()
            found.append(
                f"KERNEL({self.opened(1).threads}) gate_up({given}, char* out) {{ "
                f"opened<{form.arguments}, {down}, {along}>(step, choices, w, s, z, x, out); }}"
            )
            form = s.forms[DOWN]
            found.append(
                f"KERNEL({self.closed(1).threads}) down({given}, float* h) {{ "
                f"closed<{form.arguments}, {self._close_warps}>(step, choices, w, s, z, x, h); }}"
            )
        return found
