"""`Tokenizer`: text to ids and back, and chats to text or ids, whichever files the vocabulary comes in."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from runner.errors import TemplateError, TokenizerError
from runner.local_files import find_file, path_in
from runner.text import tokenizer_rebuilt
from runner.text.blocks import BlockSeparator
from runner.text.chat_inputs import REASONING, RESERVED, Message, chat_inputs, checked_variables, system_texts, text_of
from runner.text.chat_template import ChatTemplates
from runner.text.detokenizer import Detokenizer
from runner.text.guard import Guard
from runner.text.harmony import START, HarmonySeparator, speaks_harmony
from runner.text.reasoning import BlockFormat, Marks, block_format, reasoning_key
from runner.text.sentencepiece_backend import SentencePieceBackend
from runner.text.separator import Separator
from runner.text.special_tokens import choose_markers
from runner.text.thinking_switch import thinking_off
from runner.text.tokenizer_backends import Backend, JsonBackend, load_json
from runner.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

_MAX_ID = 1 << 31
_MAX_GUARDS = 16
_PROMPT_END = 64  # ids at the end of a prompt that say how its answer begins


class Tokenizer:
    """A checkpoint's tokenizer.

    Its ids equal those of transformers for the same files; the backends' docstrings list the differences. Safe to share
    between threads. Text is untrusted: a string such as `<|im_end|>` in it is plain text unless `parse_special` is set.
    """

    def __init__(self, backend: Backend, files: TokenizerFiles) -> None:
        self._backend = backend
        self._special_ids = frozenset(backend.special.values())
        self._guards: dict[str, Guard] = {}
        self.bos_token_id: int | None = _named_id(backend, files, "bos_token")
        eos = _named_id(backend, files, "eos_token")
        self.eos_token_ids: frozenset[int] = frozenset() if eos is None else frozenset([eos])
        named = {name: text for name, text in files.named.items() if text}
        for name, index in (("bos_token", self.bos_token_id), ("eos_token", eos)):
            if index is not None and (token := backend.token(index)) is not None:
                named.setdefault(name, token)
        # An empty name ("bos_token": "") is still a variable that templates may print.
        self._templates = ChatTemplates(files.templates, {**files.named, **named})

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size} tokens)"

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Load the tokenizer of the directory `path`: the first of `SOURCES` that is there, and the small files.

        Raises:
            TokenizerError: the directory has no tokenizer (the message lists what it holds), or a file is malformed.
            CheckpointError: a file is a link out of the directory, or cannot be read.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise TokenizerError(f"{directory} is not a directory: expected one that holds a tokenizer.json")
        files = read_tokenizer_files(directory)
        for names, backend in SOURCES.items():
            paths = [find_file(directory, name) for name in names]
            if None not in paths:
                return cls(backend(directory, files), files)
        # A directory of weights can hold hundreds of files; a dozen names show what it is.
        held = sorted(entry.name for entry in directory.iterdir())
        listed = ", ".join(held[:12]) + (f" and {len(held) - 12} more" if len(held) > 12 else "")
        wanted = ", ".join(" + ".join(names) for names in SOURCES)
        raise TokenizerError(
            f"{directory} has no tokenizer, one of {wanted} (it holds: {listed or 'nothing'}): "
            "copy one of them from the model's repository"
        )

    @classmethod
    def is_in(cls, path: Path) -> bool:
        """Whether the directory `path` has the files of a tokenizer."""
        return any(all(find_file(path, name) is not None for name in names) for names in SOURCES)

    def with_templates(self, sources: Mapping[str, str]) -> Tokenizer:
        """Copy the tokenizer, with other chat templates (source by name), which read its special tokens."""
        result = copy.copy(self)
        result._templates = self._templates.replaced(sources)
        return result

    @property
    def template_sources(self) -> Mapping[str, str]:
        """The Jinja source of each chat template, by name."""
        return self._templates.sources

    @property
    def kind(self) -> str:
        """Format: "tokenizer.json", "tekken.json", "sentencepiece", "tiktoken" or "vocab.json + merges.txt"."""
        return self._backend.kind

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; ids are in `[0, vocab_size)`. A model's logits may be padded beyond."""
        return self._backend.vocab_size

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Id of each special token, by its text."""
        return self._backend.special

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates.names)

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """Names of the chat templates; a single one is called "default"."""
        return self._templates.names

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`. Added tokens that are not special are always recognised, as in transformers.

        Args:
            text: the text to encode.
            add_special_tokens: add BOS and EOS if the tokenizer is set up to. A rendered chat has its BOS already: pass
                False with it, or use the ids that `apply_chat_template` returns.
            parse_special: turn the strings of special tokens in `text` into those tokens (the default of transformers).

        Raises:
            TokenizerError: `text` is not valid Unicode (it has a lone surrogate).
        """
        return self._backend.encode(_unicode(text), add_special_tokens=add_special_tokens, parse_special=parse_special)

    def least_tokens(self, text: str) -> int:
        """Return a number of tokens that `text` has at least, from its bytes alone; 0 if nothing is known."""
        return self._backend.least_tokens(_unicode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Ids outside the vocabulary add no text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is negative, or 2**31 or more.
        """
        return self._backend.decode([_checked_id(index) for index in ids], skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, in its byte alphabet if it has one; None outside the vocabulary.

        Raises:
            TokenizerError: the id is negative, or 2**31 or more.
        """
        return self._backend.token(_checked_id(token_id))

    def token_bytes(self) -> list[bytes]:
        """What each id adds to the middle of a text, as UTF-8, which may be a part of a character; b"" for none.

        Reads the whole vocabulary.
        """
        stream, tokens = self._backend.make_stream(), map(self._backend.token, range(self.vocab_size))
        return [b"" if token is None else stream.bytes_of(index, token) for index, token in enumerate(tokens)]

    def detokenizer(self, skip_special_tokens: bool = True, *, after: Sequence[int] = ()) -> Detokenizer:
        """Return a new streaming decoder, whose pieces joined together equal `decode` of the same ids.

        With `after` they equal what the ids add to the text of these: only at the start of a text do many vocabularies
        drop a space.
        """
        skip = self._special_ids if skip_special_tokens else frozenset()
        stream = Detokenizer(self._backend.make_stream(), lambda index: self._backend.token(_checked_id(index)), skip)
        for index in after[-_PROMPT_END:]:
            stream.add(index)
        return stream

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        template: str | None = ...,
        on_rendered: Callable[[str], None] | None = ...,
        **kwargs: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = ...,
        tokenize: Literal[False],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        template: str | None = ...,
        on_rendered: Callable[[str], None] | None = ...,
        **kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        on_rendered: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> list[int] | str:
        """Render a chat and return its ids, or its text, equal to that of transformers, if `tokenize` is False.

        The ids have the special tokens that the template writes, BOS among them, and no others: special tokens spelled
        in messages, tools or keywords are plain text, and so are others that control the model, but in the assistant's
        own messages (see `runner.text.guard`). If a template takes such a string apart, the ids are those of the
        text that it makes while the string is marked (see `runner.text.special_tokens`).

        Args:
            messages: the chat, oldest message first; content may be text or parts with text, and a tool call's
                arguments an object or its JSON text: they are brought into the shape that the template reads.
            add_generation_prompt: end with the start of the assistant's turn.
            tokenize: return ids rather than text.
            tools: JSON schemas of the functions that the model may call.
            template: the name of one of `chat_templates`, or Jinja source; None: the model's own choice.
            on_rendered: called with the text before it is encoded; what it raises ends the call.
            kwargs: `continue_final_message` (a bool, or a key of the last message), and variables for the template.

        Raises:
            TemplateError: there is no template, it refuses the messages (for example their order of roles), or it
                exceeds the limits.
        """
        source = self._templates.choose(template, tools)
        given = chat_inputs(messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs)
        # Before special tokens are looked for: arguments of a tool call may spell them with JSON escapes.
        inputs = self._templates.fit(source, given)
        text = self._templates.render(source, inputs)
        if on_rendered is not None:
            on_rendered(text)
        if not tokenize:
            return text
        # The usual case: no string of the caller's spells a special token, so every one in the text is the template's.
        guard = self._guard(source)
        scanner = guard.scanner
        if not guard.touches(inputs):
            return self._backend.encode_rendered(_unicode(text), scanner)
        # Otherwise render again with the callers' spellings marked, and parse only the tokens that no mark touches.
        markers = choose_markers(source, text, inputs.messages, inputs.tools, inputs.extra)
        marked = scanner.unmark(self._templates.render(source, guard.mark(inputs, markers)), markers)
        return self._backend.encode_matches(_unicode(marked.text), scanner.find(marked.text, marked), scanner)

    def _guard(self, source: str) -> Guard:
        """The tokens that only the template `source` may write; that of the last few templates is kept."""
        guard = self._guards.get(source)
        if guard is None:
            guard = Guard(self._backend.scanner, self._backend.added, source)
            while len(self._guards) >= _MAX_GUARDS:
                self._guards.pop(next(iter(self._guards)), None)
            self._guards[source] = guard
        return guard

    def template_kwargs(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return a caller's variables for the chat templates, checked, as keywords of `apply_chat_template`.

        Raises:
            UsageError: one has the name of a variable or argument that a rendering gets from elsewhere.
        """
        return checked_variables(given, self._templates.variables)

    def separator(
        self,
        ids: Sequence[int],
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> Separator:
        """Return what tells reasoning from content in the answer to the prompt `ids`.

        The other arguments are those from which `apply_chat_template` made the ids, a generation prompt left out. The
        marks of the reasoning are those that the template, the vocabulary or a system message names; see
        `runner.text.reasoning`. An answer that continues a message is what this text of it makes it: content, unless
        the text has opened a block and not closed it.
        """
        source = self._templates.choose(template, tools)
        end = list(ids[-_PROMPT_END:])
        if speaks_harmony(source, self._has_token):
            # From the last header on, which may stand far before the end of a message that is continued.
            start = self.token_id(START)
            places = [place for place, index in enumerate(ids) if index == start]
            end = list(ids[places[-1] :]) if places else end
            stream = self.detokenizer()
            pieces = [(stream.skipped(index) or stream.add(index), bool(stream.skipped(index))) for index in end]
            return HarmonySeparator(self.special_tokens, pieces)
        named = "\n".join([source, *system_texts(messages)])
        known = block_format(named, self.special_tokens, self._has_token)
        if continue_final_message in REASONING:
            opened = known.opened(self.decode(ids, skip_special_tokens=False))
            return BlockSeparator(known, self.special_tokens, opened)
        if continue_final_message:
            return BlockSeparator.behind(text_of(messages[-1]), known, self.special_tokens)
        opened = known.opened(self.decode(end, skip_special_tokens=False))
        if opened is not None:
            opened = self._opened_by_template(known, opened, messages, tools=tools, template=template, **kwargs)
        return BlockSeparator(known, self.special_tokens, opened)

    def _opened_by_template(
        self, known: BlockFormat, found: Marks, messages: Sequence[Message], **arguments: Any
    ) -> Marks | None:
        """The block that the generation prompt opens; None if the mark `found` at the end is a message's own text."""
        whole = self.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
        bare = self.apply_chat_template(messages, add_generation_prompt=False, tokenize=False, **arguments)
        if whole != bare and whole.startswith(bare):
            return known.opened(whole[len(bare) :])
        # The template does the same without the flag: the mark is the template's if no message ends with it.
        quoted = text_of(messages[-1]).rstrip().endswith(found.opening)
        return found if whole.rstrip().endswith(found.opening) and not quoted else None

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is spelled so in the vocabulary; None if there is none."""
        return self._backend.token_id(text)

    def _has_token(self, text: str) -> bool:
        return self.token_id(text) is not None

    def template_variables(self) -> frozenset[str]:
        """Names of the variables that the default template reads and a caller may set (`template_kwargs`).

        Raises:
            TemplateError: there is no default template, or it is not valid.
        """
        return self._templates.reads(self._templates.choose(None, None)) - RESERVED - set(self._templates.variables)

    def thinking_off(self) -> dict[str, Any] | None:
        """Return the variables that tell the default template that the model is to answer without reasoning.

        None if it has no such switch; see `runner.text.thinking_switch`. Raises `TemplateError` as above.
        """
        source = self._templates.choose(None, None)
        asked = [{"role": "user", "content": "Hello"}]
        return thinking_off(
            source,
            self.template_variables(),
            lambda given: self.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **given),
        )

    def reasoning_key(self) -> str | None:
        """Key under which the default template reads the reasoning of a message; None if it reads none."""
        try:
            return reasoning_key(self._templates.choose(None, None))
        except TemplateError:
            return None


def _from_model_file(directory: Path, files: TokenizerFiles) -> Backend:
    """Load a `tokenizer.model`: a SentencePiece protobuf, or lines of base64 and rank (Llama 3's original files)."""
    path = path_in(directory, "tokenizer.model")
    with path.open("rb") as file:
        first = file.readline(2048)
    if re.fullmatch(rb"[A-Za-z0-9+/]+=* 0\r?\n", first):
        return JsonBackend(tokenizer_rebuilt.tiktoken(path, files), files, "tiktoken")
    return SentencePieceBackend(path, files)


SOURCES: Mapping[tuple[str, ...], Callable[[Path, TokenizerFiles], Backend]] = {
    ("tokenizer.json",): lambda directory, files: JsonBackend(load_json(path_in(directory, "tokenizer.json")), files),
    ("tekken.json",): lambda directory, files: JsonBackend(
        tokenizer_rebuilt.tekken(path_in(directory, "tekken.json"), files), files, "tekken.json"
    ),
    ("tokenizer.model",): _from_model_file,
    ("vocab.json", "merges.txt"): lambda directory, files: JsonBackend(
        tokenizer_rebuilt.byte_level(directory, files), files, "vocab.json + merges.txt"
    ),
}
"""Maps the files that a vocabulary can come in to their loader, in the order in which they are looked for."""


def _unicode(text: str) -> str:
    """Return `text` if it is valid Unicode; the libraries fail on a lone surrogate with less helpful errors."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate {text[error.start]!r} at {error.start}: it is not valid Unicode"
        ) from error
    return text


def _named_id(backend: Backend, files: TokenizerFiles, name: str) -> int | None:
    if isinstance(backend, SentencePieceBackend):
        return backend.named_id(files, name)
    return backend.token_id(files.named[name]) if files.named.get(name) else None


def _checked_id(index: int) -> int:
    if not 0 <= index < _MAX_ID:
        raise TokenizerError(f"{index} is not a token id, expected 0 to {_MAX_ID - 1}")
    return int(index)
