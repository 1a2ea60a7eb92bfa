"""The library's entry points: `runner.load` and `LanguageModel`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import mlx.core as mx

from runner.answer import Answer, Chunk, Generation, Steps, gather
from runner.checkpoint.hub import resolve_adapter
from runner.checkpoint.model_files import ModelFiles, name_of, open_files
from runner.checkpoint.names import resolve
from runner.config.base import Config
from runner.config.rope import LONGEST
from runner.constraints import Constraint
from runner.engine.defaults import GenerationDefaults
from runner.engine.loaded import Loaded, assemble
from runner.engine.prompt_cache import PromptCache
from runner.engine.request import Cancelled, Run
from runner.engine.sampling import SamplingOptions, SamplingParams
from runner.engine.ticket import Order
from runner.errors import ConfigError, ContextLengthError, RunnerWarning, UsageError
from runner.families import Model, family_of
from runner.keywords import ChatOptions, StreamOptions, checked_keywords
from runner.ops.device import EXACT, Device
from runner.ops.owner import OWNER
from runner.progress import ProgressBar
from runner.text.answer_text import AnswerText
from runner.text.separator import PlainText, Separator
from runner.text.stop import StopMatcher
from runner.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runner.adapters import AdapterFiles, Given
    from runner.engine.budget import Footprint
    from runner.engine.draft import Drafter
    from runner.engine.part import Part
    from runner.engine.speculation import Guide, Proposer
    from runner.guidance import Grammars


@dataclass(frozen=True)
class Prepared:
    """A prompt to answer, checked: what is to be computed, and what its tokens become.

    Attributes:
        budget: how many tokens may be generated.
        ends: ids that end the answer.
        text: turns ids into text.
        guide: says which tokens may come next; None: all may.
        proposer: makes what guesses tokens ahead; None: nothing does.
        beside: bytes that its caches take, beside the model's own; None: it has none.
    """

    ids: list[int]
    params: SamplingParams
    budget: int
    ends: frozenset[int]
    text: AnswerText
    guide: Guide | None
    proposer: Callable[[], Proposer] | None
    beside: Footprint | None


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model, its tokenizer and its sampling defaults; made by `load`.

    Use it in a `with` statement, or call `close`, to give its memory back before the program ends.

    Attributes:
        path: the directory or GGUF file the model was read from.
        defaults: the model's own settings for generation (generation_config.json).
        eos_token_ids: ids of the tokens that end an answer.
        context_length: how many tokens prompt and answer can have together.
        notes: sentences about what was ignored, guessed or is doubtful; `load` gives each as a `RunnerWarning`, too.
    """

    path: Path
    engine: Loaded
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    eos_token_ids: frozenset[int]
    context_length: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        state = "closed" if self.engine.closed else f"{self.nbytes / 1e6:.1f} MB on {self.device.name}"
        context = self.context_length
        return f"LanguageModel({self.name!r}, {self.config.model_type}, {state}, context of {context} tokens)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory of the weights back; an answer that is under way elsewhere ends with a UsageError.

        What needs no weights can still be asked: config, defaults, tokenizer. Closing twice is fine.
        """
        self.engine.close()

    @property
    def name(self) -> str:
        """What to call it: the name of its directory or file, or of its repository on the hub."""
        return name_of(self.path)

    @property
    def config(self) -> Config:
        """The model's configuration, from its `config.json`."""
        return self.engine.config

    @property
    def sampling(self) -> SamplingParams:
        """The model's own sampling defaults."""
        return self.defaults.sampling

    @property
    def ignored_defaults(self) -> tuple[str, ...]:
        """Defaults of generation_config.json that are not honoured, as `"name = value"`."""
        return self.defaults.ignored

    @property
    def model(self) -> Model:
        """The tree of dataclasses that holds the weights; its repr shows it."""
        self.engine.check_open()
        return self.engine.model

    @property
    def device(self) -> Device:
        """The device that the model computes on."""
        return self.engine.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.engine.nbytes

    @property
    def adapters(self) -> dict[str, float]:
        """Names and current weights of the adapters that the model was loaded with."""
        return self.engine.adapter_weights

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Change the weights of the named adapters, from the next answer on; 0 turns an adapter off.

        Raises:
            UsageError: no adapter has the name, or the adapter cannot have the weight (one with whole tensors keeps the
                weight it was loaded with; DoRA and rows for single tokens take 0 or 1, and do not add up with others).
        """
        self.engine.check_open()
        if self.engine.adapters is None:
            raise UsageError("this model was loaded without adapters: pass them to load(adapters=...)")
        self.engine.adapters.set_weights(weights)

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Logits at every position, `[T, V]` float32, from one forward pass whose KV caches are discarded.

        Raises:
            UsageError: `ids` is empty, or an id is not an integer or is outside the vocabulary.
        """

        def job() -> mx.array:
            result = self.engine.logits(ids)
            mx.eval(result)  # what is still to be computed only the owner's thread could compute
            return result

        return self.engine.run(job)

    def prompt_cache(self) -> PromptCache:
        """Make an empty prompt cache: `stream` and `chat_stream` calls that share it prefill only what is new."""
        self.engine.check_open()
        return PromptCache(self.engine)

    @checked_keywords(SamplingOptions)
    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        prompt_cache: PromptCache | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        constraint: Constraint | None = None,
        lookup: bool | None = None,
        draft: Drafter | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Chunk]:
        """Generate an answer token by token.

        Args:
            prompt: text (special tokens spelled out in it are read as plain text), or token ids.
            max_tokens: the most tokens to generate; None: as the model says, else as many as the context has left.
            stop: a text, or several, before which the answer ends; None: the model's own, `()`: none. Special
                tokens count as their text, so `"</s>"` and `"\\n</s>"` are found; so is a text within the reasoning.
            prompt_cache: the KV caches of earlier turns (made by `prompt_cache()`); None: nothing is kept.
            on_prefill: called after each chunk of the prompt with the tokens done and the tokens in all.
            cancelled: asked before each chunk of the prompt and after each token; true ends the answer.
            constraint: what the answer must be (`JsonSchema`, `JsonObject`, `Regex`, `Lark` or `Choice`); reasoning
                before it is free. An end is only picked where the answer is complete; the length limit may come first.
            lookup: whether to guess tokens by what followed earlier in prompt and answer; the tokens are the same, and
                an answer that repeats its prompt comes faster. None: no.
            draft: a smaller model with the same vocabulary, loaded by `load`, that guesses tokens instead.
            sampling: fields of `SamplingParams`; None or absent: the model's own default, and where its files say
                nothing of sampling, the most likely token each time.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            UsageError: an argument is out of range or has another name, or the model was closed.
        """
        steps = self._text_steps(
            prompt,
            max_tokens=max_tokens,
            stop=stop,
            prompt_cache=prompt_cache,
            on_prefill=on_prefill,
            cancelled=cancelled,
            constraint=constraint,
            lookup=lookup,
            draft=draft,
            **sampling,
        )
        return chunks_of(steps)

    def _text_steps(self, prompt: str | Sequence[int], **options: Unpack[StreamOptions]) -> Steps:
        """The answer of `stream`, step by step."""
        return self._start(self.prepare(prompt, **options), options)

    def prepare(self, prompt: str | Sequence[int], **options: Unpack[StreamOptions]) -> Prepared:
        """Check the arguments of `stream`: what is to be computed, for an engine. Nothing runs yet."""
        self.engine.check_open()
        if isinstance(prompt, str):
            self._check_bytes(prompt)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return self._prepared(ids, PlainText(), goes_on=True, **options)

    def _check_bytes(self, text: str) -> None:
        """Refuse a text that is too long by its bytes alone, since splitting megabytes into tokens takes seconds."""
        if len(text) < 4 * self.context_length:  # short enough to be split
            return
        least = self.tokenizer.least_tokens(text)
        if least >= self.context_length:
            raise ContextLengthError(least, self.context_length, at_least=True)

    def _start(self, prepared: Prepared, options: StreamOptions) -> Steps:
        """Begin the answer that was prepared with `options`."""
        kept, cancelled = options.get("prompt_cache"), options.get("cancelled")
        # Adapters as they are weighted now, whatever `set_adapters` does while the answer is under way.
        order = Order(
            ids=prepared.ids, params=prepared.params, budget=prepared.budget, ends=prepared.ends, guide=prepared.guide,
            proposer=prepared.proposer, beside=prepared.beside, weights=self.engine.adapter_weights,
        )  # fmt: skip
        kept = PromptCache(self.engine, keeps=False) if kept is None else kept
        run = Run(self.engine, kept, order, options.get("on_prefill"), cancelled)
        return self._run(run, Answer(prepared.ends, prepared.text, len(prepared.ids), run.memory), cancelled)

    def _prepared(
        self,
        prompt: Sequence[int],
        separator: Separator,
        *,
        goes_on: bool = False,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        prompt_cache: PromptCache | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        constraint: Constraint | None = None,
        lookup: bool | None = None,
        draft: Drafter | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Prepared:
        """Check the arguments of `stream`; the answer's text goes through `separator`.

        With `goes_on` it goes on with the prompt's text; else it begins one.
        """
        ids = self.engine.checked(prompt)
        params = self.sampling.replace(**sampling)
        stops = [stop] if isinstance(stop, str) else list(self.defaults.stop if stop is None else stop)
        room = self.context_length - len(ids)
        if room < 1:
            raise ContextLengthError(len(ids), self.context_length)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise UsageError(f"max_tokens must be an integer of at least 1, or None, not {max_tokens!r}")
        if max_tokens is None:
            max_tokens = self.defaults.budget(len(ids))
        budget = room if max_tokens is None else min(max_tokens, room)
        # Arguments are checked above, in this plain method: a generator would raise only when its first token is read.
        guide = None if constraint is None else self._grammars.guide(constraint, separator)
        proposer, beside = self._proposer(lookup, draft)
        special = self.tokenizer.special_tokens
        ends = self.eos_token_ids | {special[token] for token in separator.ends if token in special}
        detokenizer = self.tokenizer.detokenizer(after=ids if goes_on else ())
        text = AnswerText(detokenizer, StopMatcher(stops), separator)
        return Prepared(ids, params, budget, ends, text, guide, proposer, beside)

    @functools.cached_property
    def _grammars(self) -> Grammars:
        from runner.guidance import Grammars  # for those who need it

        return Grammars(self.tokenizer, self.eos_token_ids, self.config.vocab_size)

    @functools.cached_property
    def _drafts(self) -> weakref.WeakSet[LanguageModel]:
        """Models that may guess for this one: comparing vocabularies takes a tenth of a second."""
        return weakref.WeakSet()

    def _proposer(
        self, lookup: bool | None, draft: Drafter | None
    ) -> tuple[Callable[[], Proposer] | None, Footprint | None]:
        """What makes that which guesses tokens ahead, and the bytes that its caches take; None: nothing does."""
        if draft is not None:
            if lookup:
                raise UsageError("tokens are guessed by lookup or by a draft model, not by both: leave one out")
            if not isinstance(draft, LanguageModel):
                raise UsageError(f"draft must be a model that runner.load has made, or None, not {draft!r:.80}")
            from runner.engine.draft import DraftModel, check_draft

            if draft not in self._drafts:
                check_draft(draft, self)
                self._drafts.add(draft)
            draft.engine.check_open()
            return functools.partial(DraftModel, draft.engine, self.config.vocab_size), draft.engine.footprint
        if not lookup and self.engine.prediction is not None:
            from runner.engine.prediction import Predicted

            return functools.partial(Predicted, self.engine), self.engine.prediction_footprint
        if not lookup:
            return None, None
        from runner.engine.lookup import PromptLookup

        return PromptLookup, None

    def _run(self, run: Run, answer: Answer, cancelled: Callable[[], bool] | None) -> Steps:
        made = 0
        try:
            for token in run:
                if token is None:
                    yield None
                    continue
                made += 1
                answer.cached_tokens = run.reused
                stopped = cancelled is not None and cancelled()
                chunk = answer.add(token, last=made == run.budget, cancelled=stopped)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        except Cancelled:
            answer.cached_tokens = run.reused
            yield answer.cancelled()

    @checked_keywords(StreamOptions)
    def generate(self, prompt: str | Sequence[int], **options: Unpack[StreamOptions]) -> Generation:
        """Generate a whole answer; takes the arguments of `stream`."""
        return gather(self.stream(prompt, **options))

    @checked_keywords(StreamOptions)
    def astream(self, prompt: str | Sequence[int], **options: Unpack[StreamOptions]) -> AsyncGenerator[Chunk, None]:
        """`stream` for asyncio: `async for chunk in lm.astream("Once upon a time")`. The event loop never waits.

        Answers of several tasks advance in turns, token by token. A cancelled task's answer ends after the token, or
        the chunk of the prompt, that is under way, and gives its prompt cache back. `on_prefill` is called in the event
        loop, `cancelled` on another thread. Errors come with the first chunk, but for unknown keywords.

        Raises:
            UsageError: as `stream`; also if another answer, which has not ended, is using the prompt cache.
        """
        return self._asynchronous(functools.partial(self._text_steps, prompt), options)

    @checked_keywords(StreamOptions)
    async def agenerate(self, prompt: str | Sequence[int], **options: Unpack[StreamOptions]) -> Generation:
        """`generate` for asyncio, as `astream` is `stream`."""
        return gather([chunk async for chunk in self.astream(prompt, **options)])

    @checked_keywords(ChatOptions)
    def achat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """`chat_stream` for asyncio, as `astream` is `stream`."""
        return self._asynchronous(functools.partial(self._chat_steps, messages), options)

    @checked_keywords(ChatOptions)
    async def achat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> Generation:
        """`chat` for asyncio, as `astream` is `stream`."""
        return gather([chunk async for chunk in self.achat_stream(messages, **options)])

    def _asynchronous(self, begin: Callable[..., Steps], options: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        from runner.asynchronous import chunks, in_loop  # asyncio is a tenth of the imports of a short answer

        on_prefill = in_loop(options.get("on_prefill"))
        return chunks(self.engine, lambda: begin(**{**options, "on_prefill": on_prefill}))

    @checked_keywords(StreamOptions)
    def chat_stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[StreamOptions],
    ) -> Iterator[Chunk]:
        """Answer a conversation through the chat template, token by token.

        Args:
            messages: `[{"role": ..., "content": ...}, ...]`, in OpenAI's shapes: content may be a list of parts with
                text, and is absent from a tool call.
            tools: JSON schemas of functions the model may call, for templates that take them.
            template: the name of one of the model's templates, or Jinja text; None: the one called `tool_use` if it
                exists and there are tools, else the default.
            template_kwargs: further variables for the template.
            options: the other arguments of `stream`.

        The model's reasoning comes in `Chunk.reasoning`, apart from the text. In the next turn's messages, give the
        text as `content` and, if you like, the reasoning as `reasoning_content`: the template decides what it keeps.

        Raises:
            TemplateError: the model has no chat template, a message has another shape, or the template refused it.
            UsageError: `template_kwargs` has a name that the template gets from elsewhere, such as `messages`.
        """
        steps = self._chat_steps(messages, tools=tools, template=template, template_kwargs=template_kwargs, **options)
        return chunks_of(steps)

    def _chat_steps(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[StreamOptions],
    ) -> Steps:
        """The answer of `chat_stream`, step by step."""
        return self._start(
            self.prepare_chat(messages, tools=tools, template=template, template_kwargs=template_kwargs, **options),
            options,
        )

    def prepare_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[StreamOptions],
    ) -> Prepared:
        """Check the arguments of `chat_stream`: what is to be computed, for an engine. Nothing runs yet."""
        self.engine.check_open()
        variables = self.tokenizer.template_kwargs(template_kwargs)
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, tools=tools, template=template,
            on_rendered=self._check_bytes, **variables,
        )  # fmt: skip
        separator = self.tokenizer.separator(ids, messages, tools=tools, template=template, **variables)
        return self._prepared(ids, separator, **options)

    @checked_keywords(ChatOptions)
    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> Generation:
        """Generate the whole answer to a conversation; takes the arguments of `chat_stream`."""
        return gather(self.chat_stream(messages, **options))


def chunks_of(steps: Steps) -> Iterator[Chunk]:
    """The chunks of an answer, without its other steps."""
    with contextlib.closing(steps):
        for chunk in steps:
            if chunk is not None:
                yield chunk


@checked_keywords()
def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    adapters: Given = (),
    context_length: int | None = None,
    mtp: bool = False,
    activations: str = EXACT,
    progress: bool = False,
    part: Part | None = None,
) -> LanguageModel:
    """Load a model from a directory, a GGUF file, a hub id `org/name[@revision][:Q4_K_M]`, or by a stored one's name.

    Args:
        dtype: "float32", "float16" or "bfloat16" for weights and activations; None: what suits this machine and the
            model. With the CPU kernels, weights as they are stored and float32; without them, both in float32; on a
            GPU both in bfloat16, or in float16 where the family's numbers are known to fit and config.json says so or
            nothing says bfloat16 (GGUF files), or in float32 if all matrices are.
        revision: branch, tag or commit of a hub id.
        adapters: adapters in PEFT's format or mlx-lm's, by directory or hub id: a list of "PATH" or "PATH=WEIGHT", or
            a mapping from paths to weights. Their updates add up; the base model's weights stay as they are.
        context_length: how many tokens prompt and answer can have together; None: as many as the model was made for.
        mtp: read the checkpoint's layer for multi-token prediction too, and guess tokens by it: answers are the same,
            and come faster where guesses are right (GLM-4.5 to 4.7, DeepSeek V3, Kimi K2).
        activations: "int8": round what is multiplied with packed weights to 8 bits, with a scale for each group of a
            row's weights: less exact, and faster, above all with prompts on CPUs with AVX-512 VNNI. It is for the CPU
            kernels, and says nothing of plain matrices, mxfp8 and nvfp4. "exact": to 16 bits, and 24 where needed.
        progress: show progress bars on stderr for a download, and for reading that takes over a second.
        part: this process's part, if `runner launch` shares the model out over several; None: all of it.

    Raises:
        RunnerError: a subclass that says what is missing, unknown or inconsistent.

    Warns:
        RunnerWarning: for each of `LanguageModel.notes`.
    """
    if not isinstance(model, str | Path):
        raise UsageError(f"model must be a text or a path, not {model!r:.80}")
    if context_length is not None and (type(context_length) is not int or not 1 <= context_length <= LONGEST):
        raise UsageError(f"context_length must be an integer from 1 to {LONGEST}, or None, not {context_length!r}")
    if not isinstance(mtp, bool):
        raise UsageError(f"mtp must be true or false, not {mtp!r:.80}")
    files = open_files(resolve(str(model), revision=revision, progress=progress))
    # On the owner's thread as well: what reading a vocabulary has used and freed, reading the weights can use again.
    tokenizer = OWNER.run(files.tokenizer)
    opened: Sequence[AdapterFiles] = ()
    if adapters:
        from runner.adapters import open_adapters

        opened = open_adapters(adapters, lambda spec: resolve_adapter(spec, progress=progress))
    with ProgressBar(f"loading {name_of(files.path)}", enabled=progress) as bar:

        def update(done: int, total: int) -> None:
            OWNER.check_wanted()  # Ctrl-C in the waiting thread ends the loading too
            bar.update(done, total)

        def job() -> Loaded:
            return assemble(
                files.config, files.source, dtype=dtype, adapters=opened, progress=update, mtp=mtp,
                activations=activations, part=part,
            )  # fmt: skip

        engine = OWNER.run(job, mx.default_device())
    if engine.adapters is not None:
        from runner.adapters import with_added_tokens

        # The base's tokenizer is at hand; the one beside an adapter takes its place if it has added tokens.
        base = tokenizer
        read = dataclasses.replace(files, tokenizer=lambda: base)
        tokenizer = with_added_tokens(read, engine.adapters, progress=progress).tokenizer()
    defaults = GenerationDefaults.read(files.generation_config)
    context, doubts = chosen_context(engine.config, context_length)
    notes = (*engine.config.notes, *files.notes, *doubts, *device_notes(engine, files.config, dtype))
    for note in notes:
        warnings.warn(note, RunnerWarning, stacklevel=3)  # the caller of what `checked_keywords` made
    ends = end_tokens(files, tokenizer)
    return LanguageModel(files.path, engine, tokenizer, defaults, ends, context, notes)


def device_notes(engine: Loaded, raw: Mapping[str, Any], asked: str | None) -> list[str]:
    """Notes on how the model of the config `raw` goes with a Mac's GPU, where the dtype `asked` was asked for."""
    metal = engine.device.metal
    if metal is None:
        return []
    return metal.notes(engine.nbytes, engine.dtype, float16=asked is None and family_of(raw).float16)


def chosen_context(config: Config, wanted: int | None) -> tuple[int, list[str]]:
    """The context length in tokens to use where the caller wants `wanted` (None: the model's own), and notes on it.

    Raises:
        UsageError: the model has a table of positions, and it is shorter.
    """
    own, table = config.context_length, config.position_table
    if wanted is None:
        return own, []
    if table is not None and wanted > table:
        raise UsageError(f"context_length is {wanted}, but this model has learned {table} positions and no more")
    if wanted <= own:
        return wanted, []
    return wanted, [f"a context of {wanted} tokens is beyond the {own} that the model was made for: answers may suffer"]


def end_tokens(files: ModelFiles, tokenizer: Tokenizer) -> frozenset[int]:
    """Collect the ids that end an answer from config.json, generation_config.json and the tokenizer.

    Raises:
        ConfigError: an `eos_token_id` is neither an integer nor a list of integers.
    """
    ids = set(tokenizer.eos_token_ids)
    for name, values in (("config.json", files.config), ("generation_config.json", files.generation_config)):
        found = values.get("eos_token_id")
        for value in found if isinstance(found, list) else [found]:
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise ConfigError(f"{name}: eos_token_id must be an integer or a list of integers, not {found!r}")
            if value is not None:
                ids.add(value)
    return frozenset(ids)
