"""Description of a checkpoint (config, tokenizer, tensors), from its JSON files and tensor headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.checkpoint.model_files import open_files
from runner.checkpoint.names import resolve
from runner.config.memory import Memory, needed
from runner.engine.defaults import GenerationDefaults
from runner.families import find
from runner.language_model import end_tokens
from runner.weights.plan import ArrayPlan, count_parameters, plan
from runner.weights.tags import Source
from runner.weights.tree import leaves

if TYPE_CHECKING:
    from runner.ranks.settings import Settings


@dataclass(frozen=True)
class Entry:
    """A field of the model and the tensors that fill it.

    Attributes:
        field: the field's path in the model.
        tensors: names of the tensors in the checkpoint.
        shape: the field's shape in the model.
        dtype: the tensors' dtypes as safetensors spells them, joined by `+`.
        nbytes: bytes of the tensors in the checkpoint.
    """

    field: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class ModelReport:
    """What `inspect` finds in a checkpoint.

    Attributes:
        ignored: names of the tensors that no field uses.
        notes: sentences about keys of the config that nothing reads, and about what the files leave open.
        parameters: how many numbers the weights stand for, quantized or not; a tied tensor counts once.
        nbytes: bytes of the tensors in use.
        memory: what each layer remembers between tokens; `runner.config.memory.needed` counts its bytes.
        context_length: how many tokens the model was made for.
    """

    path: Path
    model_type: str
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    sampling: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    entries: list[Entry]
    ignored: tuple[str, ...]
    parameters: int
    nbytes: int
    bits_per_weight: float
    memory: tuple[tuple[Memory, ...], ...]
    context_length: int
    notes: tuple[str, ...]


def inspect(model: str | Path) -> ModelReport:
    """Describe the checkpoint in a directory, a GGUF file or under a hub id; raises the errors of `runner.load`."""
    files = open_files(resolve(str(model)))
    headers = files.source.headers
    config_class, model_class = find(files.config)
    config = config_class.from_dict(files.config)
    layout = plan(model_class, config, headers)
    tokenizer = files.tokenizer()
    defaults = GenerationDefaults.read(files.generation_config)
    arrays = list(layout.arrays())
    # A set: a tensor that two fields share (tied embeddings) counts once.
    used = {leaf.name for array in arrays for leaf in leaves(array.tree)}
    nbytes = sum(headers[name].nbytes for name in used)
    parameters = count_parameters(layout)
    return ModelReport(
        path=files.path,
        model_type=config.model_type,
        config=dict(files.config),
        tokenizer={
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_ids": sorted(tokenizer.eos_token_ids),
            "chat_templates": list(tokenizer.chat_templates),
        },
        sampling=_generation(defaults),
        eos_token_ids=tuple(sorted(end_tokens(files, tokenizer))),
        entries=[_entry(array, files.source) for array in arrays],
        ignored=tuple(sorted({*(set(headers) - used), *files.unread})),
        parameters=parameters,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / max(parameters, 1),
        memory=tuple(config.memory(index) for index in range(config.num_hidden_layers)),
        context_length=config.context_length,
        notes=(*config.notes, *files.notes),
    )


@dataclass(frozen=True)
class RankReport:
    """What one of several processes would hold of a model, and send.

    Attributes:
        layers: the layers that it computes.
        nbytes: bytes of its weights, in the dtypes that this machine would compute in.
        per_token: bytes that its layers remember of each token, where rows are as wide as activations.
        sends: bytes that it sends for each token.
        draws: bytes that it sends besides for each token that is drawn.
        notes: what every rank has all of, and why.
        twins: bytes that it holds besides, where a head that is stored beside the table turns out to be another matrix.
    """

    rank: int
    layers: range
    nbytes: int
    per_token: int
    sends: int
    draws: int
    notes: tuple[str, ...]
    twins: int


def inspect_ranks(model: str | Path, settings: Settings, *, dtype: str | None = None) -> list[RankReport]:
    """Say what each process of a run would hold and send; nothing is loaded. Errors as of `runner.load`."""
    from runner.engine.dtypes import choose
    from runner.engine.part import Whole
    from runner.ops.device import current
    from runner.ops.exchange import Exchange
    from runner.ranks.part import held

    files = open_files(resolve(str(model)))
    headers = files.source.headers
    config_class, model_class = find(files.config)
    config = config_class.from_dict(files.config)
    device = current()
    dtypes = choose(dtype, device, files.config, headers)
    provided = {"ops": device.ops, "activations": dtypes.activations}
    layout = plan(model_class, config, headers, provided)
    whole = Whole(model_class, layout, config, files.source, provided, dtypes.weights)
    reports = []
    for rank in range(settings.size):
        found = held(whole, settings, Exchange(rank, settings.size))
        memories = [memory for layer in found.own.memories for memory in layer]
        width = dtypes.activations.size
        row = needed(memories, 1, width) - needed(memories, 0, width)
        sent = (found.sends, found.draws)
        reports.append(RankReport(rank, found.layers, found.nbytes, row, *sent, found.notes, found.twins))
    return reports


def _generation(defaults: GenerationDefaults) -> dict[str, Any]:
    """The generation defaults for display; limits and stop texts only where the file sets them."""
    ends = {"stop": list(defaults.stop), "max_new_tokens": defaults.max_new_tokens, "max_length": defaults.max_length}
    return {
        **defaults.sampling.to_dict(),
        **{name: value for name, value in ends.items() if value},
        "ignored": list(defaults.ignored),
    }


def _entry(array: ArrayPlan, source: Source) -> Entry:
    names = tuple(dict.fromkeys(leaf.name for leaf in leaves(array.tree)))
    dtypes = sorted({source.headers[name].dtype for name in names})
    nbytes = sum(source.headers[name].nbytes for name in names)
    return Entry(array.path, names, array.shape, "+".join(dtypes), nbytes)
