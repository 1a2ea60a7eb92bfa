"""What a tokenizer needs from a library, and the backend over `tokenizers`: a tokenizer.json, or one rebuilt."""

from __future__ import annotations

import json
import secrets
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import tokenizers

from runner.errors import TokenizerError
from runner.local_files import read_file
from runner.text.decoder_plan import MARK, plan_stream
from runner.text.detokenizer import Detokenizer, TokenStream
from runner.text.special_tokens import AddedToken, Match, TokenScanner
from runner.text.token_bounds import TokenBound
from runner.text.tokenizer_files import TokenizerFiles

LONG = 1 << 14
"""Characters from which a text is encoded as a batch: by that call the library lets other threads run."""

MAX_VOCABULARY_FILE = 128 << 20
_SAMPLED = 2048  # pieces that tell what kind a vocabulary is


T = TypeVar("T")


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
    make_stream: Callable[[], TokenStream]
    """Makes the streams that decode ids one by one."""

    @property
    def added(self) -> Sequence[tuple[AddedToken, int]]:
        """The other tokens that are matched as a whole in any text, and their ids."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]: ...
    def encode_rendered(self, text: str, scanner: TokenScanner) -> list[int]: ...
    def encode_matches(self, text: str, matches: Sequence[Match], scanner: TokenScanner) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token(self, token_id: int) -> str | None: ...
    def token_id(self, token: str) -> int | None: ...
    def least_tokens(self, text: str) -> int: ...


class JsonBackend:
    """Backend over the `tokenizers` library, whose tokenizer is read from a tokenizer.json or rebuilt from other files.

    The file's post-processor decides on BOS and EOS, as in transformers 5.23, which drops the flags of
    tokenizer_config.json beside a tokenizer.json. The one exception is add_bos_token: true, which puts BOS first where
    the post-processor does not: DeepSeek's files rely on the flag, and transformers 4 and llama.cpp honour it.
    """

    def __init__(self, library: tokenizers.Tokenizer, files: TokenizerFiles, kind: str = "tokenizer.json") -> None:
        self.kind = kind
        self._library = library
        # A tokenizer.json may ask for truncation or padding, which would change every prompt.
        self._library.no_truncation()
        self._library.no_padding()
        guarded("adding tokens", lambda: _add_tokens(self._library, files.added))
        self.vocab_size: int = self._library.get_vocab_size(with_added_tokens=True)
        added = self._library.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(self.special.values())
        self._bos = self.token_id(files.named.get("bos_token", "")) if files.add_bos_token else None
        self._unknown_id = _unknown_id(self._library)
        self.scanner = TokenScanner((_flags(token), index) for index, token in added.items() if token.special)
        self.added = [(_flags(token), index) for index, token in added.items() if not token.special]
        # The anchor stands for the special tokens that `encode_matches` is given, while the library takes all others as
        # plain text. It is random, so that no text can contain it.
        self._anchor = f"\U0010fffd{secrets.token_hex(16)}"
        self._library.add_tokens([tokenizers.AddedToken(self._anchor, special=False, normalized=False)])
        self._anchor_id = self._library.token_to_id(self._anchor)
        self._lock = threading.Lock()  # held while the library's one switch for special tokens is set and used
        self.make_stream = self._plan()

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        if parse_special:
            ids: list[int] = self._run(text, add_special_tokens, parse_special=True).ids
        else:
            ids = self._encode_anchored([text], [], add_special_tokens, self._special_ids)
        wanted = self._bos if add_special_tokens else None
        return ids if wanted is None or ids[:1] == [wanted] else [wanted, *ids]

    def encode_rendered(self, text: str, scanner: TokenScanner) -> list[int]:
        """Encode a rendered chat none of whose strings spells a token of the scanner's: all in it are the template's.

        The library matches some tokens only after normalisation, which can make a special token of a user's text that
        spells none: full-width letters under NFKC, capitals under lower-casing. A match of the library's counts only
        where the text itself spells the token.
        """
        matches = scanner.find(text)
        encoding = self._run(text, add_special_tokens=False, parse_special=True)
        spelled = iter(matches)
        for index, (start, end) in self._found_in(encoding, text, scanner.ids):
            # Both are in the order of the text, so each match is asked for once.
            if not any(m.id == index and m.start <= start and end <= m.end for m in spelled):
                return self.encode_matches(text, matches, scanner)
        ids: list[int] = encoding.ids
        return ids

    def encode_matches(self, text: str, matches: Sequence[Match], scanner: TokenScanner) -> list[int]:
        """Encode `text` with a token at each of `matches`, and no other token of the scanner's.

        The library sees an added token in the place of each match, so that the text around it is normalised and split
        as it is around the special token.
        """
        pieces: list[str] = []
        position = 0
        for match in matches:
            pieces.append(text[position : match.start])
            position = match.end
        between = [match.id for match in matches]
        return self._encode_anchored([*pieces, text[position:]], between, False, scanner.ids)

    def _run(self, text: str, add_special_tokens: bool, parse_special: bool) -> tokenizers.Encoding:
        with self._lock:
            self._library.encode_special_tokens = not parse_special
            if len(text) < LONG:
                return guarded("encoding", lambda: self._library.encode(text, add_special_tokens=add_special_tokens))
            batch = partial(self._library.encode_batch, [text], add_special_tokens=add_special_tokens)
            return guarded("encoding", batch)[0]

    def _found_in(
        self, encoding: tokenizers.Encoding, text: str, guarded: frozenset[int]
    ) -> list[tuple[int, tuple[int, int]]]:
        """Id and place of each guarded token that stands for a part of `text`; not those put around the text."""
        if guarded.isdisjoint(encoding.ids):
            return []
        rows = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        return [
            (index, place)
            for index, around, place in rows
            if index in guarded
            and not around
            # What stands for unknown characters is special too, and no harm where the text does not spell it.
            and (index != self._unknown_id or text[place[0] : place[1]] in self.special)
        ]

    def _encode_anchored(
        self, pieces: list[str], between: Sequence[int], add_special_tokens: bool, guarded: frozenset[int]
    ) -> list[int]:
        """Ids of plain text with the tokens `between` its pieces.

        The library matches guarded tokens that are not special in any text, and a vocabulary may hold special ones
        among its ordinary pieces, so that plain text reaches them without a match. Such text is cut in two by an anchor
        without an id, until no guarded token comes of it.
        """
        wanted: list[int | None] = list(between)
        while True:
            text = self._anchor.join(pieces)
            encoding = self._run(text, add_special_tokens, parse_special=False)
            reached = self._found_in(encoding, text, guarded)
            if not reached:
                break
            pieces, wanted = self._cut([place for _, place in reached], pieces, wanted)
        found = iter(wanted)
        ids = (next(found) if index == self._anchor_id else index for index in encoding.ids)
        return [index for index in ids if index is not None]

    def _cut(
        self, places: Sequence[tuple[int, int]], pieces: Sequence[str], wanted: Sequence[int | None]
    ) -> tuple[list[str], list[int | None]]:
        """Cut the pieces in the middle of each of the `places` in their joined text, with no token at the cut."""
        starts = list(accumulate((len(piece) + len(self._anchor) for piece in pieces), initial=0))
        cuts: dict[int, set[int]] = {}
        for start, end in places:
            number = bisect_right(starts, start) - 1
            spelled = pieces[number][start - starts[number] : end - starts[number]]
            if len(spelled) < 2:
                raise only_special(spelled)
            cuts.setdefault(number, set()).add((start + end) // 2 - starts[number])
        parts: list[str] = []
        tokens: list[int | None] = []
        for number, (piece, token) in enumerate(zip(pieces, [*wanted, None], strict=True)):
            edges = [0, *sorted(cuts.get(number, ())), len(piece)]
            parts += [piece[start:end] for start, end in pairwise(edges)]
            tokens += [*[None] * (len(edges) - 2), token]
        return parts, tokens[:-1]

    @cached_property
    def _bound(self) -> TokenBound:
        # Made for the first long text only, since it reads the whole vocabulary.
        added = self._library.get_added_tokens_decoder()
        return TokenBound(self._library, [_flags(added[index]) for index in added if index != self._anchor_id])

    def least_tokens(self, text: str) -> int:
        return self._bound.least_tokens(text)

    def _plan(self) -> Callable[[], TokenStream]:
        """Choose the stream by the file's decoder and by a sample of the vocabulary's pieces."""
        model, decoder = self._library.model, self._library.decoder
        size = self._library.get_vocab_size(with_added_tokens=False)
        added = self._library.get_added_tokens_decoder()
        # The pieces of single bytes come first in most vocabularies.
        ids = [*range(min(size, _SAMPLED)), *range(_SAMPLED, size, size // _SAMPLED + 1)]
        pieces = [model.id_to_token(index) for index in ids if index not in added]
        return plan_stream(
            None if decoder is None else json.loads(decoder.__getstate__()),
            [piece for piece in pieces if piece is not None],
            decode_ids=lambda ids: guarded(
                "decoding", lambda: str(self._library.decode(ids, skip_special_tokens=False))
            ),
            decode_tokens=lambda tokens: (
                " ".join(tokens) if decoder is None else guarded("decoding", lambda: str(decoder.decode(tokens)))
            ),
            prefixed=lambda: self._run("a", False, parse_special=False).tokens[:1] in ([f"{MARK}a"], [MARK]),
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return join_stream(self, ids, skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        if token_id == self._anchor_id:
            return None
        token: str | None = self._library.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        index: int | None = self._library.token_to_id(token)
        return index


def join_stream(backend: Backend, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Decode `ids` with the backend's own stream."""
    skip = frozenset(backend.special.values()) if skip_special_tokens else frozenset()
    stream = Detokenizer(backend.make_stream(), backend.token, skip)
    return "".join([*(stream.add(index) for index in ids), stream.flush()])


def only_special(spelled: str) -> TokenizerError:
    """The error for a text that no ordinary token can stand for."""
    return TokenizerError(
        f"the text has {spelled!r} where the vocabulary knows it as a special token only: take it out of the text"
    )


def _unknown_id(library: tokenizers.Tokenizer) -> int | None:
    """Id that the model gives a character no vocabulary has; None if it has bytes for it, nothing, or an error."""
    try:
        pieces = library.model.tokenize("\U0010fffe")
    except Exception:  # the library raises bare exceptions, for example where a vocabulary lacks its unknown token
        return None
    return pieces[0].id if len(pieces) == 1 else None


def load_json(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Raises:
        TokenizerError: the file is too large, or the library refuses it.
    """
    data = read_file(path, MAX_VOCABULARY_FILE)
    return _parsed(lambda: tokenizers.Tokenizer.from_buffer(data), str(path))


def parse_json(text: str, where: str) -> tokenizers.Tokenizer:
    """Parse the text of a tokenizer.json, as `load_json`; error messages start with `where`."""
    return _parsed(lambda: tokenizers.Tokenizer.from_str(text), where)


def _parsed(parse: Callable[[], tokenizers.Tokenizer], where: str) -> tokenizers.Tokenizer:
    try:
        return guarded("parsing", parse)
    except TokenizerError as error:
        raise TokenizerError(
            f"{where} is not a tokenizer.json that `tokenizers` reads ({error.__cause__}): fetch it again"
        ) from error


def guarded(doing: str, call: Callable[[], T]) -> T:
    """Return what a call of the library returns.

    Raises:
        TokenizerError: the call failed. The library's errors are bare exceptions, and its panics (on a decoder's or a
            text's corner cases) are no `Exception` at all: they would pass every handler up to the end of the program.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(
            f"the tokenizers library failed while {doing} ({error}): the tokenizer's files contradict themselves, or "
            "the library has a fault; fetch the files again, or report the model"
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
