"""`runner.load` and `LanguageModel`: the library's front door."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from runner.answer import Answer, Chunk, Generation, flat, gather
from runner.checkpoint.hub import resolve, resolve_adapter
from runner.checkpoint.model_files import ModelFiles, open_files
from runner.config.base import Config
from runner.engine.engine import Engine, assemble
from runner.engine.generate import Cancelled, decode, prefill
from runner.engine.prompt_cache import PromptCache
from runner.engine.sampling import Sampler, SamplingParams
from runner.errors import ConfigError, ContextLengthError, UsageError
from runner.families import Model
from runner.ops.device import Device
from runner.progress import ProgressBar
from runner.text.stop import StopMatcher
from runner.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runner.adapters import AdapterFiles, Given


@dataclass(frozen=True)
class LanguageModel:
    """A model, its tokenizer and its defaults; `load` makes one."""

    path: Path
    engine: Engine
    tokenizer: Tokenizer
    sampling: SamplingParams
    ignored_defaults: tuple[str, ...]
    eos_token_ids: frozenset[int]

    @property
    def config(self) -> Config:
        """`config.json`."""
        return self.engine.config

    @property
    def model(self) -> Model:
        """The tree of dataclasses that holds the weights."""
        return self.engine.model

    @property
    def device(self) -> Device:
        """What it computes on."""
        return self.engine.device

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.config.max_position_embeddings

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.engine.nbytes

    @property
    def adapters(self) -> dict[str, float]:
        """Names and weights of the adapters it was loaded with."""
        return {} if self.engine.adapters is None else dict(self.engine.adapters.weights)

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Change the weights of adapters by name, from the next answer on; the others keep theirs, 0 leaves one out.

        Raises:
            UsageError: no adapter has the name, or it cannot have the weight (a DoRA has 0 or 1, one with whole tensors
                what it was loaded with).
        """
        if self.engine.adapters is None:
            raise UsageError("this model was loaded without adapters: name them in load(adapters=...)")
        self.engine.adapters.set_weights(weights)

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Logits at every position, `[T, V]` float32, in one pass and without a cache to keep.

        Raises:
            UsageError: no ids, or an id outside the vocabulary.
        """
        return self.engine.logits(ids)

    def prompt_cache(self) -> PromptCache:
        """For `stream` and `chat_stream`: turns of one conversation that share it read only what is new."""
        return PromptCache(self.engine)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        prompt_cache: PromptCache | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Generate token by token.

        Args:
            prompt: text (special tokens in it are plain text), or ids.
            max_tokens: None: what is left of the context.
            stop: text (or several) that ends the answer, and is not part of it; None: none.
            prompt_cache: what earlier turns left (`prompt_cache()` makes one); None: nothing is kept.
            on_prefill: called with prompt tokens done and in all.
            cancelled: asked between two prompt chunks and two tokens.
            sampling: fields of `SamplingParams`; None or absent: the model's own default.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            UsageError: an argument is out of range.
        """
        ids = self.engine.checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
        params = self.sampling.replace(**sampling)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        room = self.context_length - len(ids)
        if room < 1:
            raise ContextLengthError(len(ids), self.context_length)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise UsageError(f"max_tokens must be an integer from 1, not {max_tokens!r}")
        budget = room if max_tokens is None else min(max_tokens, room)
        kept = self.prompt_cache() if prompt_cache is None else prompt_cache
        return self._run(ids, params, StopMatcher(stops), budget, kept, on_prefill, cancelled)

    def _run(
        self,
        ids: list[int],
        params: SamplingParams,
        stops: StopMatcher,
        budget: int,
        kept: PromptCache,
        on_prefill: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[Chunk]:
        reused = kept.reuse(ids)
        answer = Answer(self.eos_token_ids, self.tokenizer.detokenizer(), stops, len(ids) - reused, reused)
        sampler = Sampler(params, self.config.vocab_size, ids, argmax=self.device.ops.argmax)

        def sample(logits: mx.array) -> tuple[mx.array, ...]:
            return flat(sampler(logits))

        try:
            logits = prefill(self.model, ids[reused:], kept.caches, on_progress=on_prefill, cancelled=cancelled)
        except Cancelled:
            yield answer.cancelled()
            return
        steps = decode(self.model, logits, kept.caches, sample, budget, self.device.ops)
        for index, step in enumerate(steps):
            stopped = cancelled is not None and cancelled()
            chunk = answer.add(step, last=index + 1 == budget, cancelled=stopped)
            kept.add(chunk.token)
            yield chunk
            if chunk.finish_reason is not None:
                return

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Generation:
        """The whole answer at once; arguments of `stream`."""
        return gather(self.stream(prompt, **options))

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Answer a conversation `[{"role", "content"}, ...]` through the chat template; other arguments of `stream`.

        Raises:
            TemplateError: the model has no chat template, or the template refused the messages.
        """
        ids = self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            tokenize=True,
            tools=None if tools is None else list(tools),
            template=template,
            **(template_kwargs or {}),
        )
        return self.stream(ids, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """The whole answer to a conversation; arguments of `chat_stream`."""
        return gather(self.chat_stream(messages, **options))


def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    adapters: Given = (),
    progress: bool = False,
) -> LanguageModel:
    """Load a model from a directory, a GGUF file or a hub id `org/name[@revision]`.

    Args:
        dtype: "float32", "float16" or "bfloat16" for weights and activations; None: what is stored, computed in what is
            fastest and no less exact on this machine.
        adapters: LoRA or DoRA adapters in PEFT's format, by directory or hub id: a list of "PATH" or "PATH=WEIGHT", or
            a mapping from them to weights. They add up; the base's weights stay as they are.
        progress: show bars on stderr for a download, and for reading that takes over a second.

    Raises:
        RunnerError: one of its kinds, naming what does not fit.
    """
    files = open_files(resolve(str(model), revision=revision, progress=progress))
    tokenizer = files.tokenizer()
    opened: Sequence[AdapterFiles] = ()
    if adapters:
        from runner.adapters import open_adapters

        opened = open_adapters(adapters, lambda spec: resolve_adapter(spec, progress=progress))
    with ProgressBar(f"loading {files.path.name}", enabled=progress) as bar:
        engine = assemble(files.config, files.source, dtype=dtype, adapters=opened, progress=bar.update)
    params, ignored = SamplingParams.from_generation_config(files.generation_config)
    return LanguageModel(files.path, engine, tokenizer, params, ignored, end_tokens(files, tokenizer))


def end_tokens(files: ModelFiles, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends an answer: those of config.json, generation_config.json and the tokenizer together.

    Raises:
        ConfigError: an `eos_token_id` is neither an integer nor a list of them.
    """
    ids = set(tokenizer.eos_token_ids)
    for name, values in (("config.json", files.config), ("generation_config.json", files.generation_config)):
        found = values.get("eos_token_id")
        for value in found if isinstance(found, list) else [found]:
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise ConfigError(f"{name}: eos_token_id must be an integer or a list of them, not {found!r}")
            if value is not None:
                ids.add(value)
    return frozenset(ids)
