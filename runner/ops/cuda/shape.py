"""What one kernel for whole decode steps is made for, and how its work and its shared memory are divided.

`StepShape` says what all layers have in common; `divide` turns it into the constants of `step.cu`, or says why there is
no kernel for it. Nothing here needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import NamedTuple

from runner.errors import RunnerError

QKV, OUTPUT, GATE_UP, DOWN, HEAD = range(5)
"""The products of a step, in the order of their use."""

WARPS = 16
"""Warps of a block that multiply; one more keeps the ring filled."""

SPARE = 1024
"""Bytes of shared memory that the system keeps of each block's share."""

CANDIDATES, EACH, SAID = 512, 32, 256
"""Tokens that top-k and top-p are decided among at most, those of one block, and steps that the host may lag behind."""

MOST_STEPS = 16
"""Tokens of one launch at most."""

FLIGHT = 66 * 1024
"""Bytes that a block has on order at most: what blocks exchange travels the same way, and waits behind them."""

PLAIN_STAGE, MOST_STAGE = 32 * 1024, 40 * 1024
"""Bytes of a stage of plain rows, and of packed ones at most."""

IDLE = 0.7
"""The share of a product's time that blocks must be busy with tiles of 16 rows, for these to be worth while."""

CHUNK, SLOT = 224, 20
"""Rows whose partial sums a block holds at once, and the numbers from one row's to the next's."""

NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2}
"""The kernel's names for types of numbers."""

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
"""The kernel's names for activation functions."""


SCALED = {"affine": 0, "mxfp4": 1, "mxfp8": 1, "nvfp4": 2}
"""The kernel's names for what the numbers of a group share, by MLX's names of forms."""


class Unfit(RunnerError):
    """No kernel can be made for this model; the text says why, as in `the model has <text>`."""


@dataclass(frozen=True)
class Form:
    """How the numbers of a matrix are stored: `bits` 0 for plain ones, else packed in groups, as MLX's `mode` says."""

    bits: int = 0
    group: int = 0
    mode: str = "affine"

    @property
    def known(self) -> bool:
        """Whether the kernels have code for it."""
        if self.mode == "affine":
            return self.bits == 0 or (self.bits in (4, 8) and self.group in (32, 64, 128))
        return (self.bits, self.group, self.mode) in ((4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4"))

    @property
    def scaled(self) -> int:
        """What a group shares, of `SCALED`."""
        return SCALED[self.mode]

    @property
    def scale_size(self) -> int:
        """Bytes of a group's scale, and of its bias where there are biases."""
        return 1 if self.scaled else 2

    @property
    def arguments(self) -> str:
        """BITS, G and S of the kernels' templates."""
        return f"{self.bits}, {self.group or 1}, {self.scaled}"

    @property
    def halves(self) -> bool:
        """Whether vectors are multiplied as sums of two 16-bit numbers, and not as integers."""
        return self.mode == "mxfp8"

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group}" if self.mode == "affine" else self.mode


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What all layers of a decode step have in common.

    Attributes:
        forms: of the five products' matrices.
        embedding: of the table that tokens are looked up in.
        weights: type of plain matrices, as the other types a key of `NUMBERS`.
        scales: type of packed matrices' scales and biases, where they have both.
        small: type of norms and biases.
        cache: type of keys and values.
        table: type of a plain embedding table.
        biased: whether each of the five products has a bias.
        norm_eps: of the norms within layers, of the last one, and of those of heads.
        rope_dims: how many numbers of a head are rotated; 0: none.
        ropes: kinds of RoPE, each with frequencies of its own.
        experts: of a mixture, `chosen` of them for each token; 0: the layer is dense. `intermediate` is one's width.
        chosen_norm: whether the weights of the chosen experts add up to 1, before `chosen_scale`.
        router: type of the router's matrix.
        ranks: processes that the model is shared out over; heads and widths are this one's.
        summed: whether what attention and feed-forward layers give is to be added up over all ranks.
        gathered: whether each rank has a part of the head's rows, of which there are `vocab` in all.
        headless: whether another rank has the head.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vocab: int
    forms: tuple[Form, Form, Form, Form, Form]
    embedding: Form
    weights: str
    scales: str
    small: str
    cache: str
    table: str
    biased: tuple[bool, bool, bool, bool, bool]
    norm_eps: tuple[float, float, float]
    gated: bool = True
    activation: str = "silu"
    head_norms: bool = False
    rope_dims: int = 0
    ropes: int = 1
    traditional: bool = False
    attention_scale: float = 1.0
    attention_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float = 0.0
    experts: int = 0
    chosen: int = 0
    chosen_norm: bool = False
    chosen_scale: float = 1.0
    router: str = "float32"
    ranks: int = 1
    summed: tuple[bool, bool] = (False, False)
    gathered: bool = False
    headless: bool = False

    @property
    def rows(self) -> tuple[int, int, int, int, int]:
        """Rows of the five matrices."""
        wide = self.intermediate * (2 if self.gated else 1)
        head = self.vocab // (self.ranks if self.gathered else 1)
        return ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden, wide, self.hidden, head)

    @property
    def columns(self) -> tuple[int, int, int, int, int]:
        """Columns of the five matrices."""
        return (self.hidden, self.heads * self.head_dim, self.hidden, self.intermediate, self.hidden)


def text(name: str) -> str:
    """A kernel's text, or a part of one, by the name of its file."""
    return resources.files(__package__).joinpath(name).read_text()


def size_of(number: str) -> int:
    """Bytes of a number of that type."""
    return 4 if number == "float32" else 2


@dataclass(frozen=True)
class Product:
    """How one product's rows are brought to a block: the fields of `Product` in `step.cu`, in their order."""

    rows: int
    columns: int
    bits: int
    group: int
    scaled: int
    unit: int
    piece: int
    pieces: int
    tiles: int
    shares: int
    pitch: int
    scale_at: int
    scale_pitch: int
    bias_at: int
    bytes: int
    chunk: int
    norm: bool
    biased: bool
    mapped: bool
    recip: int

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What tensor maps bring at once: of the matrix, of scales, and of biases where there are some."""
        rows, bits = 16 * self.tiles, self.bits or 16
        weights = Box(128, self.columns * bits // 8, rows, self.piece * bits // 1024)
        if not self.bits:
            return (weights,)
        size = 1 if self.scaled else 2
        scales = Box(16, self.columns // self.group * size, rows, self.piece // self.group * size // 16)
        return (weights, scales) if self.scaled else (weights, scales, scales)


class Box(NamedTuple):
    """A part of a matrix of bytes: `lines` lines of `width` bytes each of `rows` rows, which have `pitch` bytes."""

    width: int
    pitch: int
    rows: int
    lines: int


@dataclass(frozen=True)
class Division:
    """A step divided among `blocks` blocks, each with `stages` stages of `stage` bytes.

    Attributes:
        copies: whether lanes fill the stages, 16 bytes each, on GPUs that have no bulk copies.
    """

    shape: StepShape
    blocks: int
    parts: int
    products: tuple[Product, ...]
    stage: int
    stages: int
    steps: int
    planes: int
    inputs: int
    work: int
    biases: int
    logits: int
    owned: int
    shared_memory: int
    copies: bool = False

    @property
    def group(self) -> int:
        """Heads that share keys and values."""
        return self.shape.heads // self.shape.kv_heads

    @property
    def exchange(self) -> int:
        """Words of (value, epoch) that blocks exchange."""
        s = self.shape
        vectors = 2 * s.hidden + s.rows[QKV] + s.heads * s.head_dim + s.intermediate
        parts = self.group * (s.head_dim // 2 + 2)
        return vectors // 2 + self.blocks * (parts + 4 + 2 * EACH) + 2 + 2

    @cached_property
    def source(self) -> str:
        """The kernel's text."""
        s = self.shape
        flight = max(2, min(self.stages - 1, FLIGHT // self.stage))
        constants: dict[str, int] = {
            "D": s.hidden, "H": s.heads, "KV": s.kv_heads, "HD": s.head_dim, "F": s.intermediate, "L": s.layers,
            "V": s.vocab, "GH": self.group, "QR": s.rows[QKV], "NB": self.blocks, "PARTS": self.parts,
            "NST": self.stages, "STAGE": self.stage, "FLIGHT": flight, "STEPS": self.steps, "NROPE": s.ropes,
            "RD": max(2, s.rope_dims), "PLANES": self.planes, "XBYTES": self.inputs, "WORK": self.work,
            "BIASES": self.biases, "LOGITS": self.logits, "OWN": self.owned, "CAND": CANDIDATES, "EACH": EACH,
            "SAID": SAID, "WT": NUMBERS[s.weights], "ST": NUMBERS[s.scales], "AT": NUMBERS[s.small],
            "CT": NUMBERS[s.cache], "EMB_T": NUMBERS[s.table], "EMB_BITS": s.embedding.bits,
            "EMB_G": s.embedding.group, "EMB_S": s.embedding.scaled, "ACT": ACTIVATIONS[s.activation],
        }  # fmt: skip
        # What no product needs is left out: code that does not fit the instruction caches is read like weights.
        flags = {
            "GATED": s.gated, "QKN": s.head_norms, "TRADITIONAL": s.traditional, "HAS_BIAS": any(s.biased),
            "HAS_PLAIN": any(not p.bits and not p.mapped for p in self.products),
            "HAS_MAPPED": any(p.mapped for p in self.products),
            "HAS_LOOSE": any(p.bits and not p.mapped for p in self.products),
        }  # fmt: skip
        floats = {
            "EPS": s.norm_eps[0], "EPS_LAST": s.norm_eps[1], "EPS_HEAD": s.norm_eps[2], "ATT_SCALE": s.attention_scale,
            "ATT_CAP": s.attention_cap, "EMB_SCALE": s.embedding_scale, "RES_SCALE": s.residual_scale,
            "LOGIT_SCALE": s.logit_scale, "LOGIT_CAP": s.logit_cap,
        }  # fmt: skip
        lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
        lines += [f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]
        lines += [f"constexpr float {name} = {value!r}f;" for name, value in floats.items()]
        lines.append(f"#define COPIES {int(self.copies)}")
        lines.append(f"#define STORE_X {self._by_form(_STORE)}")
        lines.append(f"#define PRODUCT {self._by_form(_PRODUCT)}")
        fields = ", ".join("{" + ", ".join(str(int(v)) for v in vars(p).values()) + "}" for p in self.products)
        head, marker, tail = text("step.cu").partition("// Products: 0 q, k, v;")
        struct, end, rest = tail.partition("};\n")
        table = f"__constant__ Product PRODUCTS[5] = {{{fields}}};\n"
        return "\n".join([*lines, text("forms.cu")]) + head + marker + struct + end + table + rest

    def _by_form(self, templates: tuple[str, str, str, str]) -> str:
        """A call for each form that products have, chosen by the product's own."""
        forms = sorted({(p.bits, p.group, p.scaled, p.mapped) for p in self.products})
        calls = [
            templates[_way(bits, scaled, mapped)].format(
                bits=bits, group=group, scaled=scaled, mapped=str(mapped).lower()
            )
            for bits, group, scaled, mapped in forms
        ]
        chosen = calls[0]
        for (bits, group, scaled, mapped), call in zip(forms[1:], calls[1:], strict=True):
            test = f"p.bits == {bits} && p.group == {group} && p.scaled == {scaled} && p.mapped == {int(mapped)}"
            chosen = f"if ({test}) {{ {call} }} else {{ {chosen} }}"
        return chosen


def _way(bits: int, scaled: int, mapped: bool) -> int:
    """Which of the templates below a form takes."""
    if not bits:
        return 2 if mapped else 0
    return 3 if scaled and bits == 8 else 1


_STORE = (
    "if (in) *(float4*)((float*)xs + c) = a;",
    "store_planes<{bits}, {group}, {scaled}>(xs, xn, c, in, a);",
    "store_pairs(xs, c, in, a);",
    "store_halves<{group}>(xs, xn, c, in, a);",
)
_PACKED = "packed_product<{bits}, {group}, {scaled}, {mapped}>(rg, p, rows, xs, xn, out, warp, lane);"
_PRODUCT = (
    "plain_product<WT>(rg, p, rows, (const float*)xs, out, warp, lane);",
    _PACKED,
    "dense_product(rg, p, rows, xs, out, warp, lane);",
    _PACKED,
)


def divide(shape: StepShape, processors: int, memory: int, *, copies: bool = False) -> Division:
    """Divide a step among a GPU's `processors`, each of which has `memory` bytes of shared memory for a block.

    Args:
        copies: whether it has no bulk copies, as before compute capability 9.0.

    Raises:
        Unfit: the shape is one that the kernel does not take.
    """
    _check(shape)
    # Of GPUs with less memory, half of the warps multiply a stage's rows: such GPUs read half as fast, too.
    for warps in (WARPS, WARPS // 2):
        division = _divided(shape, processors, memory, warps, copies=copies)
        if division.stages >= 3:
            return division
    work = division.shared_memory - division.stages * division.stage
    raise Unfit(f"{work} bytes of work for a block, beside which no ring of {division.stage}-byte stages fits")


def _divided(shape: StepShape, processors: int, memory: int, warps: int, *, copies: bool) -> Division:
    """`divide` with stages for so many warps, of which there may be too few."""
    packed = [form.bits > 0 for form in shape.forms]
    # Two rows are exchanged in one word. A tensor core takes 16 at once.
    cores = [_on_cores(shape, index, processors) for index in range(5)]
    units = [16 if p or core else 2 for p, core in zip(packed, cores, strict=True)]
    units[OUTPUT] = units[DOWN] = max(units[OUTPUT], units[DOWN])  # the same block owns the same rows of both
    shared = [shape.intermediate if i == GATE_UP else rows for i, rows in enumerate(shape.rows)]
    # A block that owned no row at all could fall behind without anybody noticing.
    blocks = min(processors, max(_over(rows, unit) for rows, unit in zip(shared, units, strict=True)))
    if shape.kv_heads > blocks:
        raise Unfit(f"{shape.kv_heads} heads of keys and values, for {blocks} blocks")
    parts = 1 << (min(32, blocks // shape.kv_heads).bit_length() - 1)
    stage = _stage(shape, warps)
    products = tuple(_product(shape, index, units[index], stage, cores[index], warps) for index in range(5))
    stage = _up(max(stage, *(p.bytes for p in products)), 1024)
    most = [_most(rows, unit, blocks) for rows, unit in zip(shared, units, strict=True)]
    biases = max([most[i] * (2 if i == GATE_UP and shape.gated else 1) for i in range(5) if shape.biased[i]], default=0)
    auxiliary = shape.hidden * size_of(shape.small) + (biases + 16) * size_of(shape.small) * 2
    if auxiliary + 2 * shape.head_dim * size_of(shape.small) > stage:
        raise Unfit(f"norms and biases of {auxiliary} bytes, for stages of {stage}")
    width = max(shape.columns)
    of_packed = [(columns, form) for columns, form in zip(shape.columns, shape.forms, strict=True) if form.bits]
    planes = max((columns // 64 * (256 if form.halves else 192) for columns, form in of_packed), default=0)
    scales = max((columns // min(form.group, 64) * 8 for columns, form in of_packed), default=0)
    plain = 0 if all(packed) else max(4 * c for c, p in zip(shape.columns, packed, strict=True) if not p)
    inputs = _even(max(planes + scales, plain, 4 * min(width, 64)))
    group, dim = shape.heads // shape.kv_heads, shape.head_dim
    work = _even(max(inputs + max(p.chunk for p in products) * SLOT * 4, 4 * (group * dim + 16 * (dim + 2) + 2 * dim)))
    steps = max(2, min(MOST_STEPS, 8192 // (4 * shape.ropes * max(2, shape.rope_dims))))
    logits = most[HEAD]
    launch = 96 + 4 * steps * (1 + shape.ropes * max(2, shape.rope_dims))
    dynamic = _even(work + 4 * (2 * dim + _even(biases) + _even(logits)) + (shape.layers + 1) * 192 + launch)
    owned = _even(most[OUTPUT])
    static = 4 * (16 + owned + 2 * dim + max(blocks, 16) + 4 * CANDIDATES + 64) + 128 + 16 * 64
    stages = min(24, (memory - SPARE - dynamic - static) // stage)
    return Division(
        shape, blocks, parts, products, stage, stages, steps, planes, inputs, work, _even(biases), _even(logits), owned,
        stages * stage + dynamic, copies,
    )  # fmt: skip


def _check(shape: StepShape) -> None:
    if shape.experts:
        raise Unfit("a mixture of experts")
    if shape.ranks > 1:
        raise Unfit("parts on other ranks")
    group = shape.heads // shape.kv_heads
    if group > WARPS:
        raise Unfit(f"{group} heads for each head of keys and values")
    if shape.head_dim % 8 or shape.head_dim > 256:
        raise Unfit(f"heads of {shape.head_dim} numbers")
    if shape.activation not in ACTIVATIONS:
        raise Unfit(f"the activation {shape.activation}")
    for rows, columns, form, biased in zip(shape.rows, shape.columns, shape.forms, shape.biased, strict=True):
        odd = rows % 2 and rows != shape.vocab  # two rows are exchanged in one word
        if columns % 8 or odd or (biased and (rows % 8 or shape.intermediate % 8)):
            raise Unfit(f"a matrix of {rows} x {columns}")
        if not form.known:
            raise Unfit(f"weights of {form}")
        if form.bits and (columns % max(64, form.group) or rows % 8 or shape.intermediate % 16):
            raise Unfit(f"a packed matrix of {rows} x {columns}")
    if not shape.embedding.known:
        raise Unfit(f"embeddings of {shape.embedding}")
    if any(form.bits and not form.scaled for form in (shape.embedding, *shape.forms)) and shape.scales == "float32":
        raise Unfit("scales in float32")


def _stage(shape: StepShape, warps: int) -> int:
    """Bytes of a stage, at least, for plain rows and for norms."""
    plain = PLAIN_STAGE * warps // WARPS if any(not form.bits for form in shape.forms) else 0
    return max(plain, shape.hidden * size_of(shape.small) + 4096)


def _on_cores(shape: StepShape, index: int, processors: int) -> bool:
    """Whether plain bfloat16 rows are multiplied by the tensor cores: not where tiles of 16 leave many blocks idle."""
    # The output and the down projection have the same rows, and so the same answer.
    if shape.forms[index].bits or shape.weights != "bfloat16" or shape.columns[index] % 64:
        return False
    if index in (OUTPUT, DOWN) and any(shape.columns[i] % 64 or shape.forms[i].bits for i in (OUTPUT, DOWN)):
        return False
    rows = shape.intermediate if index == GATE_UP else shape.rows[index]
    tiles = _over(rows, 16)
    return shape.intermediate % 16 == 0 and tiles >= IDLE * processors * _over(tiles, processors)


def _product(shape: StepShape, index: int, unit: int, stage: int, cores: bool, warps: int) -> Product:
    """How a product's rows are brought; `warps` of a block multiply those of a stage."""
    most = MOST_STAGE * warps // WARPS
    rows, columns, form = shape.rows[index], shape.columns[index], shape.forms[index]
    pair = 2 if index == GATE_UP and shape.gated else 1
    norm, biased = index in (QKV, GATE_UP, HEAD), shape.biased[index]
    if cores:
        piece = min(columns, 64 * warps)
        pieces, shares = _over(columns, piece), _over(piece, 64)
        tiles = max(1, min(warps // shares, most // (16 * 128 * shares)))
        end = 16 * tiles * 128 * shares
        chunk = max(1, CHUNK // (16 * tiles * pair)) * 16 * tiles * pair
        return Product(
            rows, columns, 0, 0, 0, unit, piece, pieces, tiles, shares, 128, end, 0, end, end, chunk, norm, biased,
            True, _over(256, shares),
        )  # fmt: skip
    if not form.bits:
        size = size_of(shape.weights)
        tiles = max(1, min(stage // (columns * size), 56))
        pieces = _over(columns * size, stage)
        piece = _up(_over(columns, pieces), 8)
        shares = 1
        while shares < WARPS and tiles * shares < WARPS and (shares * 256 < columns or pieces > 1):
            shares *= 2
        even = tiles * pair * (2 if tiles % 2 else 1)
        chunk = max(1, CHUNK // even) * even
        return Product(
            rows, columns, 0, 0, 0, unit, piece, pieces, tiles, shares, 0, 0, 0, 0, 0, chunk, norm, biased, False,
            shares.bit_length() - 1,
        )  # fmt: skip
    span = 256 if form.bits == 4 else 128
    pieces = _over(columns, span * warps)
    size, arrays = form.scale_size, 1 if form.scaled else 2
    units = 16 // size * form.group  # columns whose scales are a unit of 16 bytes
    mapped = columns % span == 0 and columns % units == 0
    least = max(span, units)  # columns of which a row has whole lines, and whole units of scales
    piece = columns if pieces == 1 else _up(_over(columns, pieces), least)
    pieces = _over(columns, piece)
    shares = _over(piece, span)
    if mapped:
        line, scale_line = 128 * shares, piece // form.group * size
        tiles = max(1, min(warps // shares, most // (16 * (line + arrays * scale_line))))
        scale_at, scale_bytes = 16 * tiles * line, 16 * tiles * scale_line
        pitch, scale_pitch = 128, 16
    else:
        # 16 rows side by side, each a quarter of the banks behind the one before (half of them in 8 bits).
        pitch = _up(piece * form.bits // 8, 128) + (32 if form.bits == 4 else 64)
        scale_pitch = _up(_up(piece // form.group * size + 16 - size, 16) - 16, 128) + 16
        tiles = max(1, min(warps // shares, most // (16 * (pitch + arrays * scale_pitch))))
        scale_at, scale_bytes = 16 * tiles * pitch, 16 * tiles * scale_pitch
    chunk = max(1, CHUNK // (16 * tiles * pair)) * 16 * tiles * pair
    bias_at, end = scale_at + (arrays - 1) * scale_bytes, scale_at + arrays * scale_bytes
    return Product(
        rows, columns, form.bits, form.group, form.scaled, unit, piece, pieces, tiles, shares, pitch, scale_at,
        scale_pitch, bias_at, end, chunk, norm, biased, mapped, _over(256, shares),
    )  # fmt: skip


def _over(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return (a + b - 1) // b


def _up(size: int, unit: int) -> int:
    """`size` rounded up to whole units."""
    return (size + unit - 1) // unit * unit


def _most(rows: int, unit: int, blocks: int) -> int:
    """Rows that a block owns at most."""
    return _over(_over(rows, unit), blocks) * unit


def _even(size: int) -> int:
    """`size` rounded up to 16."""
    return _up(size, 16)
