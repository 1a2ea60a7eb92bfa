"""Backend over the `sentencepiece` library, for a tokenizer.model without a tokenizer.json."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from runner.errors import TokenizerError
from runner.local_files import read_file
from runner.text.decoder_plan import sentencepiece_stream
from runner.text.special_tokens import AddedToken, Match, TokenScanner
from runner.text.tokenizer_backends import MAX_VOCABULARY_FILE, join_stream
from runner.text.tokenizer_files import TokenizerFiles


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
        data = read_file(path, MAX_VOCABULARY_FILE)
        self._library, model_prefix = _load_sentencepiece(data, path)
        pieces: int = self._library.get_piece_size()
        added = _place_added(files.added, self._library, pieces, path)
        # The model file's own control tokens and <unk> are special even if no other file lists them.
        for index in range(pieces):
            if self._library.is_control(index) or self._library.is_unknown(index):
                added.setdefault(index, AddedToken(self._library.id_to_piece(index), index, special=True))
        # Gemma's `<start_of_turn>` is a piece for text in its model file: plain text must not reach it.
        special = frozenset(index for index, token in added.items() if token.special and index < pieces)
        reached = special.difference(
            filter(self._library.is_control, special), filter(self._library.is_unknown, special)
        )
        if reached:
            self._library, _ = _load_sentencepiece(_as_control(data, reached), path)
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
        self.make_stream = sentencepiece_stream(prefix)

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

    @cached_property
    def added(self) -> Sequence[tuple[AddedToken, int]]:
        """The tokens besides special ones that are matched as a whole: other files' and the model file's own."""
        # The library does not tell a piece's type; user-defined ones have the score 0, as few others have.
        count = self._library.get_piece_size()
        own = {index: AddedToken(self._library.id_to_piece(index), index) for index in range(count)
               if not self._library.get_score(index) and index not in self._names}  # fmt: skip
        listed = [(token, index) for token, index in self._all.tokens if not token.special]
        return [*listed, *((token, index) for index, token in own.items() if not self._library.is_byte(index))]

    def encode_rendered(self, text: str, scanner: TokenScanner) -> list[int]:
        """Encode a rendered chat none of whose strings spells a token of the scanner's: all are the template's."""
        return self.encode(text, add_special_tokens=False, parse_special=True)

    def encode_matches(self, text: str, matches: Sequence[Match], scanner: TokenScanner) -> list[int]:
        """Encode `text` with a token at each of `matches`, and no other token of the scanner's.

        Other added tokens that are not special are always recognised.
        """
        taken = {place for match in matches for place in range(match.start, match.end)}

        def is_free(found: Match) -> bool:
            return taken.isdisjoint(range(found.start, found.end))

        plain = [each for each in self._plain.find(text) if each.id not in scanner.ids and is_free(each)]
        # The library itself matches pieces that are not special: the text of one is cut in two.
        special = self.scanner.ids
        cuts = [(each.start + each.end) // 2 for each in scanner.find(text) if each.id not in special and is_free(each)]
        return self._encode_parts(text, sorted([*matches, *plain], key=lambda match: match.start), cuts)

    def _encode_parts(self, text: str, matches: Sequence[Match], cuts: Sequence[int] = ()) -> list[int]:
        """Ids of the matches and of the text between them, no piece of which reaches over one of the `cuts`."""
        ids: list[int] = []
        position, waiting = 0, deque(cuts)
        for start, end, index in [*((m.start, m.end, [m.id]) for m in matches), (len(text), len(text), [])]:
            edges = [position]
            while waiting and waiting[0] < start:
                edges.append(waiting.popleft())
            for place, (left, right) in enumerate(pairwise([*edges, start])):
                ids += self._encode_part(text[left:right], first=left == 0, follows=place > 0)
            ids += index
            position = end
        return ids

    def _encode_part(self, part: str, *, first: bool, follows: bool) -> list[int]:
        """Ids of a part; `follows` one that a cut ends."""
        if not part:
            return []
        wanted = not follows and (self._prefix_first if first else self._prefix_every)
        spaced = f" {part}" if wanted and not part.startswith((" ", "▁")) else part
        ids: list[int] = self._library.encode(spaced)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return join_stream(self, ids, skip_special_tokens)

    def least_tokens(self, text: str) -> int:
        return 0  # the library's own normalisation may drop characters, and it is fast

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


def _load_sentencepiece(data: bytes, path: Path) -> tuple[Any, bool]:
    """Load the contents of a tokenizer.model.

    Returns the processor, set to put no space before a text, and whether the model file asks for that space.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise TokenizerError(f"{path} needs the sentencepiece package: pip install sentencepiece") from error
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


def _as_control(data: bytes, ids: frozenset[int]) -> bytes:
    """Return the model file with the pieces `ids` turned into control tokens, which no text is encoded to.

    In sentencepiece_model.proto, field 1 of ModelProto is the list of pieces, and field 3 of a piece is its type, which
    is 3 for control tokens; of a field that is there twice the last counts.
    """
    parts: list[bytes] = []
    position = piece = 0
    while position < len(data):
        start = position
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            _, position = _varint(data, position)
        elif kind == 2:
            size, body = _varint(data, position)
            position = body + size
        else:
            position += {1: 8, 5: 4}[kind]
        if key == 0x0A:
            if piece in ids:
                changed = data[body:position] + b"\x18\x03"
                parts.append(b"\x0a" + _as_varint(len(changed)) + changed)
                start = position
            piece += 1
        parts.append(data[start:position])
    return b"".join(parts)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that starts at `position` of a protobuf message, 7 bits a byte, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _as_varint(value: int) -> bytes:
    """The number as protobuf writes it."""
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


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
