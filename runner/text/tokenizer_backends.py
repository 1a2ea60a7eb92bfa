"""One interface over two libraries: `tokenizers` for a tokenizer.json, `sentencepiece` for a lone tokenizer.model."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from runner.errors import TokenizerError
from runner.local_files import read_file
from runner.text.detokenizer import DecoderPlan, Detokenizer, plan_decoder
from runner.text.special_tokens import AddedToken, Match, TokenScanner
from runner.text.tokenizer_files import TokenizerFiles

_MAX_VOCABULARY_FILE = 512 << 20


class Backend(Protocol):
    """Interface that `Tokenizer` needs from a library."""

    kind: str
    """Name of the format, for people."""
    vocab_size: int
    """Number of ids, added tokens included."""
    special: Mapping[str, int]
    """Id of each special token, by its text."""
    scanner: TokenScanner
    """Finds the special tokens in text."""
    plan: DecoderPlan
    """Makes the streams that decode ids one by one."""

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]: ...
    def encode_matches(self, text: str, matches: Sequence[Match]) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token(self, token_id: int) -> str | None: ...
    def token_id(self, token: str) -> int | None: ...


class JsonBackend:
    """Backend over the `tokenizers` library, whose tokenizer is read from a tokenizer.json or rebuilt from other files.

    The post-processor in the file decides on BOS and EOS; add_bos_token in tokenizer_config.json does not, as in
    transformers 5.23, which drops the flag if there is a tokenizer.json.
    """

    def __init__(self, library: tokenizers.Tokenizer, files: TokenizerFiles, kind: str = "tokenizer.json") -> None:
        self.kind = kind
        self._library = library
        # A tokenizer.json may ask for truncation or padding, which would change every prompt.
        self._library.no_truncation()
        self._library.no_padding()
        _add_tokens(self._library, files.added)
        self.vocab_size: int = self._library.get_vocab_size(with_added_tokens=True)
        added = self._library.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {token.content: index for index, token in added.items() if token.special}
        self.scanner = TokenScanner((_flags(token), index) for index, token in added.items() if token.special)
        # The anchor stands for the special tokens that `encode_matches` is given, while the library takes all others as
        # plain text. It is random, so that no text can contain it.
        self._anchor = f"\U0010fffd{secrets.token_hex(16)}"
        self._library.add_tokens([tokenizers.AddedToken(self._anchor, special=False, normalized=False)])
        self._anchor_id = self._library.token_to_id(self._anchor)
        self._lock = threading.Lock()  # held while the library's one switch for special tokens is set and used
        decoder = self._library.decoder
        spec = None if decoder is None else json.loads(decoder.__getstate__())
        self.plan = plan_decoder(spec, lambda ids: self._library.decode(ids, skip_special_tokens=False))

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            ids: list[int] = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_matches(self, text: str, matches: Sequence[Match]) -> list[int]:
        """Encode `text` with a special token at each of `matches` and everything else as plain text.

        The library sees an added token in the place of each match, so that the text around it is normalised and split
        as it is around the special token.
        """
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
        # The stream and `decode` must agree; where the library treats broken bytes differently, the stream decides.
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
    """Backend over the `sentencepiece` library, for a tokenizer.model without a tokenizer.json.

    It follows the conventions of LlamaTokenizer in transformers 5.23:

    - special tokens split the text, and SentencePiece encodes each part between them;
    - a space is put before the first part (with `legacy`, before every part) unless the part starts with one;
    - BOS comes first unless add_bos_token is false. This is the default that LlamaTokenizer documents and how these
      models were trained; 5.23 itself adds no BOS if the config lacks the key.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        self._library, model_prefix = _load_sentencepiece(path)
        pieces: int = self._library.get_piece_size()
        added = _place_added(files.added, self._library, pieces, path)
        # The model file's own control tokens and <unk> are special even if no other file lists them.
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
        # The config's word on the space before a text wins over that of the model file.
        prefix = model_prefix if files.add_prefix_space is None else files.add_prefix_space
        self._prefix_first = prefix
        self._prefix_every = prefix and files.legacy is True
        self._bos = self.named_id(files, "bos_token") if files.add_bos_token is not False else None
        self._eos = self.named_id(files, "eos_token") if files.add_eos_token is True else None
        # The decoder section that a tokenizer.json of this vocabulary would have. `PieceStream` can do these steps, so
        # the plan never calls the function that decodes for other kinds.
        steps: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]  # fmt: skip
        if prefix:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        self.plan = plan_decoder({"type": "Sequence", "decoders": steps}, lambda ids: "")

    def named_id(self, files: TokenizerFiles, name: str) -> int | None:
        """Id of `bos_token` or `eos_token`: as the config names it, otherwise as the model file does."""
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
        """Encode `text` with a special token at each of `matches` and all other special tokens as plain text.

        Added tokens that are not special are always recognised.
        """
        everywhere = list(matches)
        for plain in self._plain.find(text):
            if all(plain.end <= match.start or match.end <= plain.start for match in matches):
                everywhere.append(plain)
        return self._encode_parts(text, sorted(everywhere, key=lambda match: match.start))

    def _encode_parts(self, text: str, matches: Sequence[Match]) -> list[int]:
        """Ids of the matches and of the text between them."""
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
        # The library gives the id of <unk> for a text that is not a piece.
        index: int = self._library.piece_to_id(token)
        return index if self._library.id_to_piece(index) == token else None


def _join_stream(backend: Backend, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Decode `ids` with the backend's own stream."""
    skip = frozenset(backend.special.values()) if skip_special_tokens else frozenset()
    stream = Detokenizer(backend.plan.make(), backend.token, skip)
    return "".join([*(stream.add(index) for index in ids), stream.flush()])


def load_json(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Raises:
        TokenizerError: the file is too large, or the library refuses it.
    """
    data = read_file(path, _MAX_VOCABULARY_FILE)
    return _parsed(lambda: tokenizers.Tokenizer.from_buffer(data), str(path))


def parse_json(text: str, where: str) -> tokenizers.Tokenizer:
    """Parse the text of a tokenizer.json, as `load_json`; error messages start with `where`."""
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


def _add_tokens(library: tokenizers.Tokenizer, added: Sequence[AddedToken]) -> None:
    """Add the config's tokens to the library's tokenizer; the flags in the config win, as in transformers."""
    present = {token.content: _flags(token) for token in library.get_added_tokens_decoder().values()}
    wanted = [token for token in added if token.content]
    # A token that the config only names, without an id, becomes special; its other flags stay as they are.
    merged = [
        AddedToken(**{**vars(present[token.content]), "special": True})
        if token.id is None and token.content in present
        else token
        for token in wanted
    ]
    # Tokens that are there already with the same flags are not added again.
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
    """The library's token as ours, without an id."""
    return AddedToken(
        token.content, special=token.special, normalized=token.normalized, lstrip=token.lstrip, rstrip=token.rstrip,
        single_word=token.single_word,
    )  # fmt: skip


def _load_sentencepiece(path: Path) -> tuple[Any, bool]:
    """Load a tokenizer.model.

    Returns the processor, set to put no space before a text, and whether the model file asks for that space.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise TokenizerError(f"{path} needs the sentencepiece package: pip install sentencepiece") from error
    data = read_file(path, _MAX_VOCABULARY_FILE)
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
    """Give each added token the id of the piece with its text, else the config's id, else the next free one."""
    placed: dict[int, AddedToken] = {}
    for token in (token for token in tokens if token.content):
        index = library.piece_to_id(token.content)
        if library.id_to_piece(index) != token.content:
            # Only ids that the model does not use for text can be given to a token that is not one of its pieces.
            index = token.id if token.id is not None else max(pieces, *(i + 1 for i in placed), pieces)
            if index < pieces and not library.is_unused(index) and not library.is_control(index):
                raise TokenizerError(
                    f"{path}: added token {token.content!r} takes id {index}, which is the piece "
                    f"{library.id_to_piece(index)!r}: tokenizer_config.json belongs to another vocabulary"
                )
        placed[index] = token
    return placed
