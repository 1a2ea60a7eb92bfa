"""Says which tokens may come next under a constraint, by llguidance (the extra `constraints`).

A grammar is compiled with limits on its size, its work and the time it takes, and kept for later answers. What cannot
be enforced is refused when it is compiled: nothing is ever enforced in part.

Text is matched as it stands in the middle of a text. Vocabularies whose decoded text loses a space at its very start
lose it here, too, where a grammar begins with one.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from runner.constraints import Choice, Constraint, JsonObject, JsonSchema, Lark
from runner.errors import UsageError
from runner.installation import install
from runner.text.lead import Lead, lead_of
from runner.text.separator import Separator
from runner.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance
    import numpy as np
    import numpy.typing as npt

    Bits = npt.NDArray[np.uint32]

KEPT = 32
"""Compiled grammars that are kept for later answers; those not used for longest go first."""

SECONDS = 5.0
"""The longest that compiling a grammar may take."""

_JSON: Any = {
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
}
"""Options of llguidance's JSON compiler, set here so that a schema's own `x-guidance` sets none of them."""


class Grammars:
    """Compiles constraints for one model's vocabulary, and keeps what it compiled. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int], vocab_size: int) -> None:
        """Prepare nothing yet: reading a vocabulary takes a second.

        Args:
            ends: ids of the tokens that end an answer.
            vocab_size: of the model's logits, which may be padded.
        """
        self._tokenizer = tokenizer
        self._ends = sorted(end for end in ends if 0 <= end < min(vocab_size, tokenizer.vocab_size))
        self._vocab_size = vocab_size
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[object, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, constraint: Constraint, separator: Separator) -> Guide:
        """A new guide for an answer under `constraint`, of which `separator` tells reasoning from content.

        Raises:
            UsageError: llguidance is not installed; the constraint cannot be enforced, or is too large or too slow to
                compile; the model has no token that ends an answer, or reasons in a form that cannot be told apart.
        """
        lead = lead_of(separator, self._tokenizer, self._piece)
        return Guide(self._matcher(constraint), -(-self._vocab_size // 32), self._ends, lead)

    def _piece(self, token: int) -> tuple[str, bool]:
        """The text of a token, whole characters of it, and whether it is special."""
        text = self._tokenizer.piece(token) or ""
        if text in self._tokenizer.special_tokens:
            return text, True
        return self._tokenizer.decode([token], skip_special_tokens=False), False

    def _matcher(self, constraint: Constraint) -> llguidance.LLMatcher:
        """A matcher at the start of the constraint's grammar, which is compiled unless it is kept."""
        # By its text: a schema may be a dictionary that is changed later.
        key = constraint.text if isinstance(constraint, JsonSchema) else constraint
        with self._lock:
            vocabulary = self._read()
            kept = self._compiled.get(key)
        if kept is None:  # not under the lock: others need not wait for a grammar that takes its time
            kept = _within(SECONDS, lambda: _compile(constraint, vocabulary))
        with self._lock:
            self._compiled[key] = kept
            self._compiled.move_to_end(key)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return kept.deep_copy()

    def _read(self) -> llguidance.LLTokenizer:
        if self._vocabulary is None:
            try:
                import llguidance
            except ImportError as error:
                raise UsageError(f"constraints need the package llguidance: {install('constraints')}") from error
            if not self._ends:
                raise UsageError("this model has no token that ends an answer: a constraint could not end one")
            wrapped = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._ends, self._vocab_size))
            self._vocabulary = llguidance.LLTokenizer(wrapped, eos_token=list(self._ends))
        return self._vocabulary


class Guide:
    """The way of one answer through a grammar: which tokens may come next, and on with the one that was picked.

    Reasoning before the content is free: while it lasts, every token but an end is allowed.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        words: int,
        ends: Sequence[int],
        lead: Lead,
    ) -> None:
        """Begin an answer; `words` of 32 bits are in each mask, and `lead` says what may stand before the content."""
        self._matcher = matcher
        self._words = words
        self._ends = ends
        self._lead = lead
        self._ended = False
        self._now = self._mask()

    def allowed(self) -> Bits | None:
        """The tokens that may come next, `[words]`: bit j of word i stands for token 32 i + j; None: any."""
        return self._now

    def add(self, token: int) -> None:
        """Take the token that was picked.

        Raises:
            UsageError: the grammar has become more work than its limits allow.
        """
        if self._ended:
            return
        if not self._lead.add(token):
            if token in self._ends:
                self._ended = True
            else:
                self._matcher.consume_token(token)
                self._check()
        self._now = self._mask()

    def allowed_after(self, drafts: Sequence[int]) -> list[Bits | None]:
        """`allowed()` now and after each of the `drafts`, up to one that is not allowed; it stays where it is."""
        found = [self._now]
        ahead = self._branch() if drafts else self
        for token in drafts:
            bits = found[-1]
            if bits is None or not bits[token // 32] >> token % 32 & 1 or not ahead._goes_on(token):
                break
            found.append(ahead._now)
        return found

    def forced(self, most: int) -> list[int]:
        """The next tokens as long as each is the only one allowed, at most so many; it stays where it is."""
        run: list[int] = []
        ahead = self if self._only() is None else self._branch()
        while len(run) < most and (token := ahead._only()) is not None:
            run.append(token)
            if not ahead._goes_on(token):
                break
        return run

    def _branch(self) -> Guide:
        """A copy, to look ahead with: a microsecond, most of it is shared."""
        other = copy.copy(self)
        other._matcher, other._lead = self._matcher.deep_copy(), self._lead.copy()
        return other

    def _goes_on(self, token: int) -> bool:
        """Take a token while looking ahead; false where it becomes too much work, which `add` says once it is real."""
        try:
            self.add(token)
        except UsageError:
            return False
        return True

    def _mask(self) -> Bits | None:
        import numpy as np

        if self._ended:
            return None
        bits, lead = np.zeros(self._words, np.uint32), self._lead
        if lead.free:
            bits[:] = 0xFFFFFFFF
            for end in self._ends:
                bits[end // 32] &= ~np.uint32(1 << end % 32)
            return bits
        if not lead.only:
            found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
            self._check()
            count = min(len(found), self._words)
            bits[:count] = found[:count]
        for token in (*lead.only, *lead.also):
            bits[token // 32] |= np.uint32(1 << token % 32)
        return bits

    def _only(self) -> int | None:
        """The token that is the only one allowed; None where there are several."""
        bits = self._now
        if bits is None:
            return None
        (words,) = bits.nonzero()
        if len(words) != 1:
            return None
        word = int(bits[words[0]])
        return None if word & (word - 1) else int(words[0]) * 32 + word.bit_length() - 1

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the constraint cannot be followed any further: {_first_line(self._matcher.get_error())}")


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int], vocab_size: int) -> None:
        self.tokens = tokenizer.token_bytes()[:vocab_size]
        # An end is never text, whatever it is spelled as.
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *ends} & set(range(len(self.tokens))))
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self._tokenizer = tokenizer
        special = set(self.special_token_ids)
        self._longest: dict[bytes, int] = {}
        for index, token in enumerate(self.tokens):
            if index not in special:
                self._longest.setdefault(token, index)
        self._width = max(map(len, self._longest), default=0)

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are those of `text`, as the model would write it where the tokenizer says how."""
        if not isinstance(text, str):
            raise TypeError("text is needed, not bytes")
        wanted = text.encode("utf-8")
        # Some tokenizers put a space before a text: behind a line break they do not.
        for before in ("", "\n"):
            ids = self._tokenizer.encode(before + text, add_special_tokens=False)
            for start in range(min(3, len(ids) + 1)):
                if b"".join(self.tokens[index] for index in ids[start:] if index < len(self.tokens)) == wanted:
                    return ids[start:]
        found, at = [], 0
        while at < len(wanted):
            size = next((n for n in range(self._width, 0, -1) if wanted[at : at + n] in self._longest), None)
            if size is None:
                break
            found.append(self._longest[wanted[at : at + size]])
            at += len(wanted[at : at + size])
        return found


def _compile(constraint: Constraint, vocabulary: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    import llguidance

    if isinstance(constraint, JsonSchema | JsonObject):
        text = constraint.text if isinstance(constraint, JsonSchema) else '{"type": "object"}'
        grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON)
    elif isinstance(constraint, Choice):
        # One expression, and not a rule: a parser would follow each option by itself.
        pattern = "|".join(re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", option) for option in constraint.options)
        grammar = llguidance.LLMatcher.grammar_from_regex(pattern)
    elif isinstance(constraint, Lark):
        grammar = llguidance.LLMatcher.grammar_from_lark(constraint.grammar)
    else:
        grammar = llguidance.LLMatcher.grammar_from_regex(constraint.pattern)
    _, complaints = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    if not complaints and not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        complaints = complaints or [matcher.get_error()]
    if complaints:
        raise UsageError(f"the constraint cannot be enforced: {'; '.join(map(_first_line, complaints))}")
    return matcher


def _first_line(message: str) -> str:
    """What went wrong, without the source that follows and without advice about llguidance's own options."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    last = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return re.sub(r"\. Enable .*", "", ": ".join([lines[0], *last]) if lines else message)


def _within(seconds: float, work: Any) -> Any:
    """What `work` returns, done on a thread that is not waited for any longer than that.

    Raises:
        UsageError: it takes longer. The limits on its work end the thread later.
    """
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, name="runner-grammar", daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise UsageError(f"the constraint takes more than {seconds:g} seconds to compile: make it smaller")
    (found,) = result
    if isinstance(found, BaseException):
        raise found
    return found
