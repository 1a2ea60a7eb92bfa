"""Matches regular expressions from untrusted files in bounded time.

Python's `re` tries every way to split a text among the loops of a pattern, so a short hostile pattern can run forever.
Here a pattern maps the set of positions where it may start to the set where it may end, as bits of an integer: no
position is tried twice, and an `Effort` that all patterns of one key share bounds what remains.
Supported: `.`, escapes, classes, groups, lookahead, `|`, `* + ? {m,n}` (lazy or not), `^ $ \\b`; the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from runner.errors import ConfigError

MAX_LENGTH = 4000
MAX_LOOP_DEPTH = 3
"""Groups allowed around a loop: each that is itself a loop multiplies the time by the length of the text."""
MAX_DEPTH = 32
MAX_COUNT = 64
MAX_STEPS = 4_000_000
"""Steps (an atom on a set of positions, 0.3 to 1 us) for all patterns of one key on all modules: a few seconds.

The longest published pattern takes 140 for a name: half of this for the 18,000 matrices of Qwen3-30B-A3B.
"""
MAX_TEXT = 1 << 16
"""Characters in all patterns of one key: `re` compiles each as a check, which takes about 5 us a character."""


@dataclass
class Effort:
    """What the patterns of one key of a config may still cost; counted, not timed, so every machine agrees."""

    key: str = "the pattern"
    steps: int = MAX_STEPS
    text: int = MAX_TEXT

    def spend(self, steps: int) -> None:
        """Count steps of matching; raises `ConfigError` when none are left."""
        self.steps -= steps
        if self.steps < 0:
            raise ConfigError(
                f"{self.key} takes more than {MAX_STEPS} steps to match with the names of this model's modules: "
                "write plain names, or patterns with fewer loops"
            )

    def read(self, text: str) -> None:
        """Count the characters of a pattern; raises `ConfigError` where there are too many."""
        self.text -= len(text)
        if self.text < 0:
            raise ConfigError(f"must have at most {MAX_TEXT} characters in all its patterns")


@dataclass
class Subject:
    """A text to match, and the positions `0 ... len(text)` in it as bits, by what is there."""

    text: str
    effort: Effort
    letters: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    looked: dict[tuple[int, int], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.effort.spend(len(self.text))
        for place, letter in enumerate(self.text):
            self.letters[letter] = self.letters.get(letter, 0) | 1 << place

    def fitting(self, pattern: str, fits: Callable[[str], object]) -> int:
        """The positions whose letter `fits` the one-letter `pattern`."""
        if pattern not in self.classes:
            self.effort.spend(len(self.letters))
            self.classes[pattern] = sum(places for letter, places in self.letters.items() if fits(letter))
        return self.classes[pattern]

    def words(self, word: str) -> int:
        """The positions where the letters `word` stand."""
        if word not in self.classes:
            first = self.letters.get(word[0], 0)
            self.effort.spend(first.bit_count())
            places = (at for at in range(first.bit_length()) if first >> at & 1)
            self.classes[word] = sum(1 << at for at in places if self.text.startswith(word, at))
        return self.classes[word]

    def places(self, pattern: str, fits: Callable[[str, int], object]) -> int:
        """The positions where the anchor `pattern` holds."""
        if pattern not in self.classes:
            self.effort.spend(len(self.text))
            self.classes[pattern] = sum(1 << at for at in range(len(self.text) + 1) if fits(self.text, at))
        return self.classes[pattern]


Matcher = Callable[[Subject, int], int]
"""Maps a text and the positions (bits) where a match may start to those where it may end."""


@dataclass(frozen=True)
class NamePattern:
    """A compiled pattern, and the `text` it was compiled from."""

    text: str
    matcher: Matcher
    effort: Effort

    @classmethod
    def compile(cls, text: str, effort: Effort | None = None) -> NamePattern:
        """Compile a pattern.

        Args:
            effort: shared by all patterns of a key; None: this pattern has one of its own.

        Raises:
            ConfigError: `text` is malformed, too large, or uses syntax that is not supported here.
        """
        effort = Effort() if effort is None else effort
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"must be a pattern of at most {MAX_LENGTH} characters")
        effort.read(text)
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"must be a regular expression ({error})") from error
        parser = _Parser(text)
        return cls(text, parser.alternatives(0), effort)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole name, as `re.fullmatch` does.

        Raises:
            ConfigError: here and in `ends`, the patterns of the key have taken too many steps.
        """
        return bool(self.matcher(Subject(name, self.effort), 1) >> len(name))

    def ends(self, name: str) -> bool:
        """Whether the pattern matches an end of `name` that starts at its start or after a dot."""
        subject = Subject(name, self.effort)
        return bool(self.matcher(subject, 1 | subject.letters.get(".", 0) << 1) >> len(name))


class _Parser:
    """Recursive-descent parser for a pattern that `re` has accepted; `depth` counts the groups around a position."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def alternatives(self, depth: int) -> Matcher:
        """Sequences separated by `|`, up to the end of the group or pattern."""
        options = [self.sequence(depth)]
        while self.take("|"):
            options.append(self.sequence(depth))
        if depth == 0 and self.at < len(self.text):
            raise self.unknown()
        if len(options) == 1:
            return options[0]

        def match(subject: Subject, starts: int) -> int:
            ends = 0
            for option in options:
                ends |= option(subject, starts)
            return ends

        return match

    def sequence(self, depth: int) -> Matcher:
        """Repeated atoms, one after another: the ends of each are the starts of the next."""
        parts: list[Matcher] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.repeated(depth))

        def match(subject: Subject, starts: int) -> int:
            subject.effort.spend(1)  # an empty sequence is a step too: loops may go around it
            for part in parts:
                if not starts:
                    return 0
                starts = part(subject, starts)
            return starts

        return match

    def repeated(self, depth: int) -> Matcher:
        """One atom with the quantifier after it, if any."""
        simple = self.text[self.at] not in "(^$" and self.text[self.at : self.at + 2] not in _ESCAPED_PLACES
        inner = self.atom(depth + 1)
        counted = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}").match(self.text, self.at)
        if counted is None or counted[0] in ("{}", "{,}"):
            return inner
        self.at = counted.end()
        self.take("?")  # lazy or not, the ends are the same set
        if self.text[self.at : self.at + 1] == "+":
            raise self.unknown()  # possessive: it can refuse what the set of ends would accept
        if counted[0] == "?":
            return lambda subject, starts: starts | inner(subject, starts)
        # A loop within loops repeats the inner one's rounds for each of its own.
        if depth >= MAX_LOOP_DEPTH:
            raise ConfigError(f"must not have loops within {MAX_LOOP_DEPTH} groups, as {self.text[:80]!r} has")
        if counted[0] in "*+":
            least, most = (1 if counted[0] == "+" else 0), None
        else:
            least = int(counted[1] or 0)
            most = int(counted[3]) if counted[3] else None if counted[2] else least
        if max(least, most or 0) > MAX_COUNT:
            raise ConfigError(f"must not have repeat counts above {MAX_COUNT}")
        return _letters(inner, least) if simple and most is None else _loop(inner, least, most)

    def atom(self, depth: int) -> Matcher:
        """One group, character class, escape, anchor or literal letter."""
        letter = self.text[self.at]
        if letter == "(":
            return self.group(depth)
        if letter == "[":
            closing = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(self.text, self.at)
            assert closing is not None, "re has accepted it"
            return self.letter(closing[0])
        if letter == "\\":
            # Letters and digits after a backslash may mean anything (\1, \x61): only known classes pass.
            escape = self.text[self.at : self.at + 2]
            if escape in _ESCAPED_PLACES:
                return self.place(escape)
            if escape[1].isalnum() and escape[1] not in "dDwWsS":
                raise self.unknown()
            return self.letter(escape)
        if letter in "^$":
            return self.place(letter)
        word = _WORD.match(self.text, self.at)
        if word is not None:
            return self.word(word[0])
        return self.letter(letter if letter == "." else re.escape(letter), len(letter))

    def group(self, depth: int) -> Matcher:
        """One plain or non-capturing group, or a lookahead; other groups are refused."""
        opening = re.compile(r"\((?:\?(?::|=|!))?").match(self.text, self.at)
        assert opening is not None, "its letter is a bracket"
        if depth > MAX_DEPTH:
            raise ConfigError(f"must not nest groups more than {MAX_DEPTH} deep, as {self.text[:80]!r} has")
        if self.text[opening.end() - 1 : opening.end() + 1] == "(?":
            raise self.unknown()
        here = self.at
        self.at = opening.end()
        inner = self.alternatives(depth)
        if not self.take(")"):
            raise self.unknown()
        if opening[0] in ("(", "(?:"):
            return inner
        return _lookahead(here, inner, opening[0] == "(?=")

    def letter(self, pattern: str, length: int | None = None) -> Matcher:
        """Matcher of the one letter that `pattern` (no loop) describes; `length` is its length in the text."""
        self.at += len(pattern) if length is None else length
        fits = re.compile(pattern).match

        def match(subject: Subject, starts: int) -> int:
            subject.effort.spend(1)
            return (starts & subject.fitting(pattern, fits)) << 1

        return match

    def word(self, word: str) -> Matcher:
        """Matcher of several letters, in one step."""
        self.at += len(word)

        def match(subject: Subject, starts: int) -> int:
            subject.effort.spend(1)
            return (starts & subject.words(word)) << len(word)

        return match

    def place(self, pattern: str) -> Matcher:
        """Matcher of a position: an anchor or a word boundary."""
        self.at += len(pattern)
        fits = re.compile(pattern).match
        return lambda subject, starts: starts & subject.places(pattern, fits)

    def take(self, letter: str) -> bool:
        """Skip `letter` if it comes next; returns whether it did."""
        found = self.text[self.at : self.at + 1] == letter
        self.at += found
        return found

    def unknown(self) -> ConfigError:
        """The error for unsupported syntax at this place."""
        return ConfigError(f"must not use {self.text[self.at : self.at + 4]!r} in the pattern {self.text[:80]!r}")


_WORD = re.compile(r"\w{2,}(?![*+?{])")
"""Letters of which none is repeated."""
_ESCAPED_PLACES = ("\\b", "\\B", "\\Z", "\\A")


def _lookahead(key: int, inner: Matcher, wanted: bool) -> Matcher:
    """Matcher that takes no text and keeps each start by itself; `key` is the group's place in its pattern."""

    def match(subject: Subject, starts: int) -> int:
        kept = 0
        for at in range(starts.bit_length()):
            if starts >> at & 1:
                # Asked once for each position: lookaheads within lookaheads would multiply the questions.
                if (key, at) not in subject.looked:
                    subject.looked[key, at] = bool(inner(subject, 1 << at)) == wanted
                kept |= subject.looked[key, at] << at
        return kept

    return match


def _letters(letter: Matcher, least: int) -> Matcher:
    """Matcher of `least` or more letters of one kind."""

    def match(subject: Subject, starts: int) -> int:
        for _ in range(least):
            starts = letter(subject, starts)
        subject.effort.spend(1)
        # An addition carries from each start through the fitting letters after it: the bits that flip are the ends.
        fitting = letter(subject, (1 << len(subject.text)) - 1) >> 1
        return starts | ((starts & fitting) + fitting) ^ fitting

    return match


def _loop(inner: Matcher, least: int, most: int | None) -> Matcher:
    """Matcher of `least` to `most` repetitions of `inner` (None: without end)."""

    def match(subject: Subject, starts: int) -> int:
        for _ in range(least):
            starts = inner(subject, starts)
        # Only positions that are new go around again, so there are at most as many rounds as positions.
        seen = frontier = starts
        rounds = 0
        while frontier and (most is None or rounds < most - least):
            subject.effort.spend(1)
            frontier = inner(subject, frontier) & ~seen
            seen |= frontier
            rounds += 1
        return seen

    return match
