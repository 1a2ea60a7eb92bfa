"""A model ready to compute: config, weights and device, but no tokenizer. `load`, `bench` and the tests share it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from runner.cache.caches import Caches
from runner.cache.several import Memories
from runner.cache.storage import PLAIN, Powers, Storage
from runner.checkpoint.model_files import open_files
from runner.config.base import Config
from runner.config.memory import Memory, Shared, needed
from runner.engine.calibration import channel_powers
from runner.engine.compiled import Compiled, Known, RowSteps, SingleSteps
from runner.engine.dtypes import choose
from runner.engine.replay import Recordings, Steps
from runner.errors import UsageError
from runner.families import Model, find
from runner.nn.batch import Batch
from runner.nn.prediction import HasPrediction, Prediction
from runner.ops.device import EXACT, Device, current
from runner.ops.memory import capacity
from runner.ops.metal import LARGE, MARGIN
from runner.ops.owner import OWNER
from runner.weights import loading
from runner.weights.loading import Progress
from runner.weights.plan import ModulePlan, plan
from runner.weights.tags import Source

if TYPE_CHECKING:
    from runner.adapters import AdapterFiles, Adapters
    from runner.engine.budget import Footprint
    from runner.engine.part import Part

T = TypeVar("T")

CLOSED = "this model was closed: load it again"


class ClosedModel:
    """What an engine has in place of its model once it was closed."""

    def __call__(self, batch: Batch, caches: Memories) -> mx.array:
        raise UsageError(CLOSED)

    def logits(self, hidden: mx.array) -> mx.array:
        raise UsageError(CLOSED)


@dataclass(eq=False)
class Loaded:
    """A loaded model, its config and the device it runs on.

    Attributes:
        layout: which stored tensor each field of `model` came from; `loading.tensors` needs it to write the model back.
        dtype: dtype of the activations.
        storage: how the KV caches keep their rows: exactly where a dtype was asked for, else in the device's own form.
        adapters: the adapters that were loaded with the model; None without any.
        powers: the powers of the channels that `storage` keeps, for each cache; None where it keeps none.
        prediction: the layer for multi-token prediction; None where it was not asked for.
        memories: what each layer remembers; () for one that another process computes.
        part: this process's part of a model that is shared out over several; None: it has all of it.
        closed: whether `close` was called: nothing can be computed any more.
        mixes: whether requests with different adapters share passes; not once a layer could not tell them apart.
        compiled: the kernel for whole decode steps, on devices that have one.
        recordings: what is known of the model's decode steps where these are replayed.
    """

    config: Config
    model: Model
    layout: ModulePlan
    device: Device
    dtype: mx.Dtype
    storage: Storage
    adapters: Adapters | None = None
    powers: Sequence[Powers | None] | None = None
    prediction: Prediction | None = None
    memories: Sequence[tuple[Memory, ...]] = ()
    part: Part | None = None
    closed: bool = field(init=False, default=False)
    mixes: bool = field(init=False, default=True)
    compiled: Compiled = field(init=False, repr=False)
    recordings: Recordings = field(init=False, repr=False, default_factory=Recordings)

    def __post_init__(self) -> None:
        self.memories = self.memories or _memories(self.config)
        refused = None
        if not self.device.compiles:
            refused = "this device has no other way"
        elif self.adapters is not None:
            refused = "the model has adapters"
        here = self.model if self.part is None else self.part.here(self.model)
        self.compiled = Compiled(here, self.dtype, refused, self.part)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.nbytes / 1e6:.1f} MB on {self.device.name}"
        return f"Loaded({self.config.model_type}, {state})"

    def run(self, job: Callable[[], T]) -> T:
        """Run `job` on the thread that owns the device; see `runner.ops.owner`.

        Raises:
            UsageError: the engine was closed.
        """
        self.check_open()
        return OWNER.run(job, self.device.mlx)

    async def wait(self, job: Callable[[], T]) -> T:
        """`run` for coroutines, which does not hold up their event loop."""
        self.check_open()
        return await OWNER.wait(job, self.device.mlx)

    def check_open(self) -> None:
        """Raise UsageError where the engine was closed."""
        if self.closed:
            raise UsageError(CLOSED)

    def close(self) -> None:
        """Let go of the weights, once the job that is under way has ended, and give their memory back."""

        def job() -> None:
            self.closed = True
            if self.part is not None and self.part.over:
                return  # the process ends: MLX would not come back from a call, and hold up all threads
            self.compiled.close()
            self.recordings.clear()
            self.model, self.adapters, self.prediction = ClosedModel(), None, None
            self.layout = ModulePlan("", ClosedModel, {})  # it has the adapters' factors
            mx.clear_cache()

        OWNER.finish(job)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory: in this process, if the model is shared out over several."""
        return loading.nbytes(self.model) + (0 if self.prediction is None else loading.nbytes(self.prediction))

    @property
    def shares_keys(self) -> bool:
        """Whether some layers have no keys of their own, so that a token passes through them for its logits only."""
        return any(isinstance(memory, Shared) for layer in _memories(self.config) for memory in layer)

    def wire(self, holder: object, tokens: int) -> None:
        """Let macOS leave weights and a cache of `tokens` where they are, until `unwire`; a job of the owner's thread.

        Nothing is done elsewhere, and nothing for a small model.
        """
        metal = self.device.metal
        if metal is None or (weights := self.nbytes) < LARGE:
            return
        cache = needed((memory for layer in self.memories for memory in layer), tokens, self.dtype.size)
        # What else is held, by another model or conversation, could be wired in their place: there is room for all.
        OWNER.wired.hold(holder, metal, max(weights, mx.get_active_memory()) + cache + MARGIN)

    def unwire(self, holder: object) -> None:
        """The end of what `wire` began; a job of the owner's thread."""
        if (metal := self.device.metal) is not None:
            OWNER.wired.release(holder, metal)

    @property
    def adapter_weights(self) -> dict[str, float]:
        """Names and weights of the adapters, as the next answer will use them."""
        return {} if self.adapters is None else dict(self.adapters.weights)

    def weights_of(self, adapters: Mapping[str, float]) -> dict[str, float]:
        """Names and weights of all adapters where these have such weights, and the others are off.

        Raises:
            UsageError: the model has no such adapter, or it cannot have the weight.
        """
        if self.adapters is None:
            if adapters:
                raise UsageError("this model was loaded without adapters")
            return {}
        return self.adapters.only(adapters)

    def use_adapters(self, *runs: tuple[int, Mapping[str, float]]) -> None:
        """Let the layers compute with these weights from now on, of so many tokens each; called before each pass."""
        if self.adapters is not None:
            self.adapters.use(*runs)

    @functools.cached_property
    def footprint(self) -> Footprint:
        """Bytes that the caches of a sequence take."""
        from runner.engine.budget import Footprint

        return Footprint(self.memories, self.storage, self.dtype)

    @functools.cached_property
    def prediction_footprint(self) -> Footprint:
        """Bytes that the layer for multi-token prediction remembers of a sequence: what the last layer does."""
        from runner.engine.budget import Footprint

        return Footprint([self.config.memory(self.config.num_hidden_layers - 1)], PLAIN, self.dtype)

    def new_caches(self) -> Caches:
        """Make empty caches for a new sequence."""
        caches = Caches.of(self.memories, self.storage, self.powers)
        return caches if self.part is None else self.part.caches(caches, _memories(self.config))

    @property
    def decodes_rows(self) -> bool:
        """Whether kernels take several sequences through their steps; a job of the owner's thread."""
        return self.device.compiles and self.compiled.rows() is not None

    def steps(self, caches: Memories, known: Known | None = None) -> Steps | SingleSteps | RowSteps:
        """Decode steps over `caches` with the adapters in use, by kernels where the device has some.

        A job of the owner's thread.

        `known` is that of `RowSteps`.
        """
        adapters = None if self.adapters is None else self.adapters.used.key
        steps = Steps(self.model, caches, self.device.ops, self.recordings, adapters)
        if not self.device.compiles:
            return steps
        if isinstance(caches, Caches) and self.compiled.prepare() and self.compiled.whole:
            return SingleSteps(self.compiled, caches, steps)
        return RowSteps(self.compiled, caches, steps, known)

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Logits at every position, `[T, V]` float32, from one forward pass whose KV caches are discarded.

        Raises:
            UsageError: `ids` is empty, or an id is not an integer or is outside the vocabulary.
        """
        self.use_adapters((len(ids), self.adapter_weights))
        hidden = self.model(Batch(mx.array([self.checked(ids)], dtype=mx.int32)), self.new_caches())
        return self.model.logits(hidden)[0].astype(mx.float32)

    def checked(self, ids: Sequence[int]) -> list[int]:
        """Return `ids` (NumPy integers are accepted) as a list of ints.

        Raises:
            UsageError: `ids` is empty, or an id is not an integer, or is outside the vocabulary.
        """
        if isinstance(ids, bytes | bytearray | memoryview):  # sequences of integers, which nobody means as token ids
            raise UsageError("a prompt must be text or token ids, not bytes: decode them first, as in data.decode()")
        try:
            ids = [operator.index(token) for token in ids]
        except TypeError as error:
            raise UsageError(f"a prompt must be text or a sequence of integer token ids: {error}") from error
        if not ids:
            raise UsageError("the prompt is empty: it must have at least one token")
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(
                f"token ids must be from 0 to {self.config.vocab_size - 1} (vocab_size - 1), "
                f"not {low if low < 0 else high}"
            )
        return ids


def _memories(config: Config) -> list[tuple[Memory, ...]]:
    """What each layer of a model remembers."""
    return [config.memory(index) for index in range(config.num_hidden_layers)]


def assemble(
    raw: Mapping[str, Any],
    source: Source,
    *,
    dtype: str | None = None,
    adapters: Sequence[AdapterFiles] = (),
    progress: Progress | None = None,
    mtp: bool = False,
    activations: str = EXACT,
    part: Part | None = None,
) -> Loaded:
    """Build the model that `raw` (a parsed `config.json`) describes from the tensors of `source`.

    `runner.load` describes `dtype`, `adapters`, `mtp`, `activations` and the errors. With a `part`, only what this
    process holds is read, once all processes have agreed.
    """
    if part is not None and (adapters or mtp):
        raise UsageError("a model that is shared out over processes takes neither adapters nor --mtp")
    config_class, model_class = find(raw)
    adapted: Adapters | None = None
    if adapters:
        from runner.adapters import fit  # imported late: a tenth of the import time of a short answer

        # Adapters are matched before the plan is made: they can replace the config and tensors of the base.
        adapted = fit(raw, (config_class, model_class), source, adapters)
        raw, source = adapted.base.raw, adapted.base.source
    config = config_class.from_dict(raw)
    device = current().rounding(activations)
    device = device if part is None else part.suited(device)
    dtypes = choose(dtype, device, raw, source.headers)
    # What the plan fills in for fields that no tensor stores: the device's ops and the dtype of activations.
    provided = {"ops": device.ops, "activations": dtypes.activations}
    layout = plan(model_class, config, source.headers, provided)
    if adapted is not None:
        layout = adapted.applied(layout, device.ops, dtypes.weights)
    memories = _memories(config)
    if part is not None:
        from runner.engine.part import Whole

        own = part.own(Whole(model_class, layout, config, source, provided, dtypes.weights))
        layout, memories = own.layout, list(own.memories)
    headers = source.headers if part is None else own.source.headers
    needed_bytes = loading.planned_nbytes(layout, headers, dtypes.weights)
    ahead = planned_prediction(config, source, provided) if mtp else None
    if ahead is not None:
        needed_bytes += loading.planned_nbytes(ahead, source.headers, dtypes.weights)
    if part is None:
        check_memory(needed_bytes, capacity(device.mlx))
    else:
        part.agree(raw, source.headers, needed_bytes, capacity(device.mlx))
        source = own.source
    place = None if device.placing is None else device.placing(needed_bytes)
    model = loading.build(layout, source, dtype=dtypes.weights, progress=progress, place=place)
    # Nothing lazy is shared: what modules computed for themselves (RoPE's frequencies, MLA's matrices) is computed now.
    mx.eval([array for _, array in loading.arrays(model)])
    # Only where no dtype was asked for may the device round the rows of its caches.
    storage = device.storage if dtype is None else device.ops.storage
    prediction = None if ahead is None else loading.build(ahead, source, dtype=dtypes.weights, place=place)
    if prediction is not None:
        mx.eval([array for _, array in loading.arrays(prediction)])
    powers = channel_powers(model, config.vocab_size, memories, storage, device.ops.storage)
    model = model if part is None else part.led(model)
    loaded = Loaded(
        config, model, layout, device, dtypes.activations, storage, adapted, powers, prediction, memories, part
    )
    # Here, on the owner's thread: any thread may ask for them.
    assert loaded.footprint and loaded.prediction_footprint
    if part is not None:
        if device.compiles:
            loaded.compiled.connect()
        part.ready(loaded.compiled.rest)
    return loaded


def planned_prediction(config: Config, source: Source, provided: Mapping[str, Any]) -> ModulePlan:
    """The plan of a checkpoint's layer for multi-token prediction.

    Raises:
        UsageError: the family or the checkpoint has none, or more than one.
        WeightsError: its tensors do not fit.
    """
    if not isinstance(config, HasPrediction):
        raise UsageError(f"{config.model_type} models have no layer for multi-token prediction that is known here")
    headers = {name: header for name, header in source.headers.items() if config.ignores(name)}
    if config.num_nextn_predict_layers != 1 or not headers:
        count = config.num_nextn_predict_layers if headers else 0
        raise UsageError(f"one layer for multi-token prediction can be used, and this checkpoint has {count}")
    return plan(Prediction, config.for_layer(config.num_hidden_layers), headers, provided)


def check_memory(weights: int, available: int | None) -> None:
    """Refuse weights that the machine can't hold, before any is read: the system would end the process in the middle.

    Raises:
        UsageError: there are more bytes of weights than of memory.
    """
    if available is not None and weights > available:
        raise UsageError(
            f"the weights take {weights / 1e9:.1f} GB, and there are {available / 1e9:.1f} GB of memory: "
            "the model needs a larger machine, or fewer bits ('runner convert' packs a model)"
        )


def open_loaded(
    path: Path, *, dtype: str | None = None, adapters: Sequence[AdapterFiles] = (), activations: str = EXACT
) -> Loaded:
    """Load the model of a directory or GGUF file; no tokenizer is needed."""
    files = open_files(path)
    return assemble(files.config, files.source, dtype=dtype, adapters=adapters, activations=activations)
