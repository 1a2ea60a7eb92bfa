"""Regular expressions from files nobody vouches for, matched in bounded time.

Python's `re` tries every way to share a text among the loops of a pattern, so a short hostile pattern runs for ever.
Here a pattern maps the set of positions where it may begin to the set of those where it may end: no way is tried twice.
Known: `.`, escapes, classes, groups, lookahead, `|`, `* + ? {m,n}` (lazy or not), `^ $ \\b`; the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from runner.errors import ConfigError

Positions = frozenset[int]
Matcher = Callable[[str, Positions], Positions]

MAX_LENGTH = 4000
MAX_LOOP_DEPTH = 3
"""Groups around a loop: each, if it is a loop too, multiplies the time by the length of the text."""
MAX_DEPTH = 32
MAX_COUNT = 64


@dataclass(frozen=True)
class NamePattern:
    """A compiled pattern; `text` is what it was made from."""

    text: str
    matcher: Matcher

    @classmethod
    def compile(cls, text: str) -> NamePattern:
        """Raises `ConfigError`: malformed, or uses what is not known here."""
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"must be a pattern of at most {MAX_LENGTH} characters")
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"must be a regular expression ({error})") from error
        parser = _Parser(text)
        return cls(text, parser.alternatives(0))

    def matches(self, name: str) -> bool:
        """As `re.fullmatch`."""
        return len(name) in self.matcher(name, frozenset([0]))

    def ends(self, name: str) -> bool:
        """Whether it matches `name` from its start, or from behind one of its dots, to its end."""
        starts = frozenset([0, *(i + 1 for i, letter in enumerate(name) if letter == ".")])
        return len(name) in self.matcher(name, starts)


class _Parser:
    """Recursive descent over a pattern that `re` has accepted."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def alternatives(self, depth: int) -> Matcher:
        options = [self.sequence(depth)]
        while self.take("|"):
            options.append(self.sequence(depth))
        if depth == 0 and self.at < len(self.text):
            raise self.unknown()
        return lambda text, starts: frozenset().union(*(option(text, starts) for option in options))

    def sequence(self, depth: int) -> Matcher:
        parts: list[Matcher] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.repeated(depth))

        def match(text: str, starts: Positions) -> Positions:
            for part in parts:
                starts = part(text, starts)
            return starts

        return match

    def repeated(self, depth: int) -> Matcher:
        inner = self.atom(depth + 1)
        counted = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}").match(self.text, self.at)
        if counted is None or counted[0] in ("{}", "{,}"):
            return inner
        self.at = counted.end()
        self.take("?")
        if counted[0] == "?":
            return lambda text, starts: starts | inner(text, starts)
        if depth >= MAX_LOOP_DEPTH:
            raise ConfigError(f"must not have loops within so many groups, as the pattern {self.text[:80]!r} has")
        if counted[0] in "*+":
            least, most = (1 if counted[0] == "+" else 0), None
        else:
            least = int(counted[1] or 0)
            most = int(counted[3]) if counted[3] else None if counted[2] else least
        if max(least, most or 0) > MAX_COUNT:
            raise ConfigError(f"must count no further than {MAX_COUNT}")
        return _loop(inner, least, most)

    def atom(self, depth: int) -> Matcher:
        letter = self.text[self.at]
        if letter == "(":
            return self.group(depth)
        if letter == "[":
            closing = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(self.text, self.at)
            assert closing is not None, "re has accepted it"
            return self.letter(closing[0])
        if letter == "\\":
            escape = self.text[self.at : self.at + 2]
            if escape in ("\\b", "\\B", "\\Z", "\\A"):
                return self.place(escape)
            if escape[1].isalnum() and escape[1] not in "dDwWsS":
                raise self.unknown()
            return self.letter(escape)
        if letter in "^$":
            return self.place(letter)
        return self.letter(letter if letter == "." else re.escape(letter), len(letter))

    def group(self, depth: int) -> Matcher:
        opening = re.compile(r"\((?:\?(?::|=|!))?").match(self.text, self.at)
        assert opening is not None, "its letter is a bracket"
        if depth > MAX_DEPTH:
            raise ConfigError(f"must not have groups within so many groups, as the pattern {self.text[:80]!r} has")
        if self.text[opening.end() - 1 : opening.end() + 1] == "(?":
            raise self.unknown()
        self.at = opening.end()
        inner = self.alternatives(depth)
        if not self.take(")"):
            raise self.unknown()
        if opening[0] in ("(", "(?:"):
            return inner
        wanted = opening[0] == "(?="
        return lambda text, starts: frozenset(i for i in starts if bool(inner(text, frozenset([i]))) == wanted)

    def letter(self, pattern: str, length: int | None = None) -> Matcher:
        """One letter that `pattern` (no loop) matches."""
        self.at += len(pattern) if length is None else length
        fits = re.compile(pattern).match
        return lambda text, starts: frozenset(i + 1 for i in starts if i < len(text) and fits(text, i))

    def place(self, pattern: str) -> Matcher:
        self.at += len(pattern)
        fits = re.compile(pattern).match
        return lambda text, starts: frozenset(i for i in starts if fits(text, i))

    def take(self, letter: str) -> bool:
        found = self.text[self.at : self.at + 1] == letter
        self.at += found
        return found

    def unknown(self) -> ConfigError:
        return ConfigError(f"must not use {self.text[self.at : self.at + 4]!r} in the pattern {self.text[:80]!r}")


def _loop(inner: Matcher, least: int, most: int | None) -> Matcher:
    def match(text: str, starts: Positions) -> Positions:
        for _ in range(least):
            starts = inner(text, starts)
        seen = frontier = starts
        rounds = 0
        while frontier and (most is None or rounds < most - least):
            frontier = inner(text, frontier) - seen
            seen |= frontier
            rounds += 1
        return seen

    return match
