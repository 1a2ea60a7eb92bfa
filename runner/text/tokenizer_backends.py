"""Two libraries behind one interface: `tokenizers` for tokenizer.json, `sentencepiece` for a lone tokenizer.model."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from runner.errors import TokenizerError
from runner.text.detokenizer import DecoderPlan, Detokenizer, plan_decoder
from runner.text.special_tokens import AddedToken, Match, TokenScanner
from runner.text.tokenizer_files import TokenizerFiles

_MAX_VOCABULARY_FILE = 512 << 20


class Backend(Protocol):
    """What `Tokenizer` needs of a library. Ids are Python ints; `special` maps each special token to its id."""

    kind: str
    vocab_size: int
    special: Mapping[str, int]
    scanner: TokenScanner  # of the special tokens
    plan: DecoderPlan

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]: ...
    def encode_matches(self, text: str, matches: Sequence[Match]) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token(self, token_id: int) -> str | None: ...
    def token_id(self, token: str) -> int | None: ...


class JsonBackend:
    """A tokenizer of the `tokenizers` library, read from a tokenizer.json or rebuilt.

    Its post-processor decides on BOS and EOS; the config's add_bos_token does not (as in transformers 5.23, which drops
    the flag when there is a tokenizer.json).
    """

    def __init__(self, library: tokenizers.Tokenizer, files: TokenizerFiles, kind: str = "tokenizer.json") -> None:
        self.kind = kind
        self._library = library
        self._library.no_truncation()
        self._library.no_padding()
        _add_tokens(self._library, files.added)
        self.vocab_size: int = self._library.get_vocab_size(with_added_tokens=True)
        added = self._library.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {token.content: index for index, token in added.items() if token.special}
        self.scanner = TokenScanner((_flags(token), index) for index, token in added.items() if token.special)
        # Stands for the special tokens of `encode_matches` while the library takes all others as plain text; random,
        # so that no text can hold it.
        self._anchor = f"\U0010fffd{secrets.token_hex(16)}"
        self._library.add_tokens([tokenizers.AddedToken(self._anchor, special=False, normalized=False)])
        self._anchor_id = self._library.token_to_id(self._anchor)
        self._lock = threading.Lock()  # around the library's one switch for special tokens and its use
        decoder = self._library.decoder
        spec = None if decoder is None else json.loads(decoder.__getstate__())
        self.plan = plan_decoder(spec, lambda ids: self._library.decode(ids, skip_special_tokens=False))

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_matches(self, text: str, matches: Sequence[Match]) -> list[int]:
        """Plain text but for `matches`: the library sees an added token in each one's place, so that the text around
        it is normalised and split just as around the special token."""
        pieces: list[str] = []
        position = 0
        for match in matches:
            pieces += [text[position : match.start], self._anchor]
            position = match.end
        pieces.append(text[position:])
        found = iter(matches)
        ids = self.encode("".join(pieces), add_special_tokens=False, parse_special=False)
        return [next(found).id if index == self._anchor_id else index for index in ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        known = [index for index in ids if index != self._anchor_id]
        text: str = self._library.decode(known, skip_special_tokens=skip_special_tokens)
        if self.plan.keeps_characters and "\N{REPLACEMENT CHARACTER}" in text:
            return _join_stream(self, known, skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        if token_id == self._anchor_id:
            return None
        token: str | None = self._library.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        index: int | None = self._library.token_to_id(token)
        return index


class SentencePieceBackend:
    """A tokenizer.model alone, with the conventions of transformers 5.23's LlamaTokenizer:

    - special tokens split the text; each part between is SentencePiece's own business;
    - a space is put before the first part (`legacy`: before every part) unless the part starts with one;
    - BOS first unless add_bos_token is false: the default that LlamaTokenizer documents, and how these models were
      trained (5.23 itself adds none where the config has no such key).
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        self._library, model_prefix = _load_sentencepiece(path)
        pieces: int = self._library.get_piece_size()
        added = _place_added(files.added, self._library, pieces, path)
        for index in range(pieces):
            if self._library.is_control(index) or self._library.is_unknown(index):
                added.setdefault(index, AddedToken(self._library.id_to_piece(index), index, special=True))
        self._names = {index: token.content for index, token in added.items()}
        self._ids = {token.content: index for index, token in added.items()}
        self.vocab_size = max(pieces, *(index + 1 for index in added)) if added else pieces
        self.special: Mapping[str, int] = {token.content: index for index, token in added.items() if token.special}
        self.scanner = TokenScanner((token, index) for index, token in added.items() if token.special)
        self._all = TokenScanner((token, index) for index, token in added.items())
        self._plain = TokenScanner((token, index) for index, token in added.items() if not token.special)
        prefix = model_prefix if files.add_prefix_space is None else files.add_prefix_space
        self._prefix_first = prefix
        self._prefix_every = prefix and files.legacy is True
        self._bos = self.named_id(files, "bos_token") if files.add_bos_token is not False else None
        self._eos = self.named_id(files, "eos_token") if files.add_eos_token is True else None
        steps: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]  # fmt: skip
        if prefix:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        self.plan = plan_decoder({"type": "Sequence", "decoders": steps}, lambda ids: "")

    def named_id(self, files: TokenizerFiles, name: str) -> int | None:
        """The id of `bos_token` or `eos_token`: the config's, else the model file's own."""
        if name in files.named:
            return self.token_id(files.named[name])
        index: int = self._library.bos_id() if name == "bos_token" else self._library.eos_id()
        return index if index >= 0 else None

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        ids = self._encode_parts(text, (self._all if parse_special else self._plain).find(text))
        if not add_special_tokens:
            return ids
        return [*([] if self._bos is None else [self._bos]), *ids, *([] if self._eos is None else [self._eos])]

    def encode_matches(self, text: str, matches: Sequence[Match]) -> list[int]:
        """Plain text but for `matches`, and for added tokens that are not special, which are always recognised."""
        everywhere = list(matches)
        for plain in self._plain.find(text):
            if all(plain.end <= match.start or match.end <= plain.start for match in matches):
                everywhere.append(plain)
        return self._encode_parts(text, sorted(everywhere, key=lambda match: match.start))

    def _encode_parts(self, text: str, matches: Sequence[Match]) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in matches:
            ids += [*self._encode_part(text[position : match.start], position == 0), match.id]
            position = match.end
        return ids + self._encode_part(text[position:], position == 0)

    def _encode_part(self, part: str, first: bool) -> list[int]:
        if not part:
            return []
        wanted = self._prefix_first if first else self._prefix_every
        spaced = f" {part}" if wanted and not part.startswith((" ", "▁")) else part
        ids: list[int] = self._library.encode(spaced)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return _join_stream(self, ids, skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        if token_id in self._names:
            return self._names[token_id]
        piece: str | None = self._library.id_to_piece(token_id) if token_id < self._library.get_piece_size() else None
        return piece

    def token_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        index: int = self._library.piece_to_id(token)
        return index if self._library.id_to_piece(index) == token else None


def _join_stream(backend: Backend, ids: Sequence[int], skip_special_tokens: bool) -> str:
    skip = frozenset(backend.special.values()) if skip_special_tokens else frozenset()
    stream = Detokenizer(backend.plan.make(), backend.token, skip)
    return "".join([*(stream.add(index) for index in ids), stream.flush()])


def load_json(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json; TokenizerError where the library refuses it."""
    _check_size(path)
    return _parsed(lambda: tokenizers.Tokenizer.from_file(str(path)), str(path))


def parse_json(text: str, where: str) -> tokenizers.Tokenizer:
    """`load_json` of a file's text; `where` begins the message of an error."""
    return _parsed(lambda: tokenizers.Tokenizer.from_str(text), where)


def _parsed(parse: Callable[[], tokenizers.Tokenizer], where: str) -> tokenizers.Tokenizer:
    try:
        return parse()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics on malformed files derive from BaseException
        raise TokenizerError(
            f"{where} is not a tokenizer.json that `tokenizers` reads ({error}): fetch it again"
        ) from error


def _check_size(path: Path) -> None:
    if (size := path.stat().st_size) > _MAX_VOCABULARY_FILE:
        raise TokenizerError(f"{path} has {size} bytes, more than the {_MAX_VOCABULARY_FILE} that are read")


def _add_tokens(library: tokenizers.Tokenizer, added: Sequence[AddedToken]) -> None:
    """Adds or re-flags the config's tokens; the flags of tokenizer_config.json win, as in transformers."""
    present = {token.content: _flags(token) for token in library.get_added_tokens_decoder().values()}
    wanted = [token for token in added if token.content]
    # A name in the config (no id of its own) only makes its token special; the other flags stay as they are.
    merged = [
        AddedToken(**{**vars(present[token.content]), "special": True})
        if token.id is None and token.content in present
        else token
        for token in wanted
    ]
    changed = [t for t in merged if present.get(t.content) != AddedToken(**{**vars(t), "id": None})]
    library.add_tokens(
        [
            tokenizers.AddedToken(
                t.content, special=t.special, normalized=t.normalized, lstrip=t.lstrip, rstrip=t.rstrip,
                single_word=t.single_word,
            )
            for t in changed
        ]
    )  # fmt: skip


def _flags(token: tokenizers.AddedToken) -> AddedToken:
    return AddedToken(
        token.content, special=token.special, normalized=token.normalized, lstrip=token.lstrip, rstrip=token.rstrip,
        single_word=token.single_word,
    )  # fmt: skip


def _load_sentencepiece(path: Path) -> tuple[Any, bool]:
    """The processor without a space of its own before each text, and whether the model file asks for that space."""
    try:
        import sentencepiece
    except ImportError as error:
        raise TokenizerError(f"{path} needs the sentencepiece package: pip install sentencepiece") from error
    _check_size(path)
    data = path.read_bytes()
    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=data)
        prefix = library.normalize("a").startswith("▁")
        # Protobuf: a message appended to another is merged into it. Field 3 of ModelProto is normalizer_spec, whose
        # field 3 is add_dummy_prefix (sentencepiece_model.proto); this sets it to false.
        return sentencepiece.SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00"), prefix
    except (RuntimeError, IndexError, OSError, ValueError) as error:
        raise TokenizerError(
            f"{path} is neither a sentencepiece model ({error}) nor a list of tiktoken ranks: fetch it again"
        ) from error


def _place_added(tokens: Sequence[AddedToken], library: Any, pieces: int, path: Path) -> dict[int, AddedToken]:
    """Ids of the added tokens: the piece of that name, else the config's id, else the next free one."""
    placed: dict[int, AddedToken] = {}
    for token in (token for token in tokens if token.content):
        index = library.piece_to_id(token.content)
        if library.id_to_piece(index) != token.content:
            index = token.id if token.id is not None else max(pieces, *(i + 1 for i in placed), pieces)
            if index < pieces and not library.is_unused(index) and not library.is_control(index):
                raise TokenizerError(
                    f"{path}: added token {token.content!r} takes id {index}, which is the piece "
                    f"{library.id_to_piece(index)!r}: tokenizer_config.json belongs to another vocabulary"
                )
        placed[index] = token
    return placed
