"""Matches regular expressions from untrusted files in bounded time.

Python's `re` tries every way to split a text among the loops of a pattern, so a short hostile pattern can run forever.
Here a pattern maps the set of positions where it may start to the set where it may end: no position is tried twice.
Supported: `.`, escapes, classes, groups, lookahead, `|`, `* + ? {m,n}` (lazy or not), `^ $ \\b`; the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from runner.errors import ConfigError

Positions = frozenset[int]
Matcher = Callable[[str, Positions], Positions]
"""Maps a text and the positions where a match may start to those where it may end."""

MAX_LENGTH = 4000
MAX_LOOP_DEPTH = 3
"""Groups allowed around a loop: each that is itself a loop multiplies the time by the length of the text."""
MAX_DEPTH = 32
MAX_COUNT = 64


@dataclass(frozen=True)
class NamePattern:
    """A compiled pattern, and the `text` it was compiled from."""

    text: str
    matcher: Matcher

    @classmethod
    def compile(cls, text: str) -> NamePattern:
        """Compile a pattern.

        Raises:
            ConfigError: `text` is malformed, too large, or uses syntax that is not supported here.
        """
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"must be a pattern of at most {MAX_LENGTH} characters")
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"must be a regular expression ({error})") from error
        parser = _Parser(text)
        return cls(text, parser.alternatives(0))

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole name, as `re.fullmatch` does."""
        return len(name) in self.matcher(name, frozenset([0]))

    def ends(self, name: str) -> bool:
        """Whether the pattern matches an end of `name` that starts at its start or after a dot."""
        starts = frozenset([0, *(i + 1 for i, letter in enumerate(name) if letter == ".")])
        return len(name) in self.matcher(name, starts)


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
        return lambda text, starts: frozenset().union(*(option(text, starts) for option in options))

    def sequence(self, depth: int) -> Matcher:
        """Repeated atoms, one after another: the ends of each are the starts of the next."""
        parts: list[Matcher] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.repeated(depth))

        def match(text: str, starts: Positions) -> Positions:
            for part in parts:
                starts = part(text, starts)
            return starts

        return match

    def repeated(self, depth: int) -> Matcher:
        """One atom with the quantifier after it, if any."""
        inner = self.atom(depth + 1)
        counted = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}").match(self.text, self.at)
        if counted is None or counted[0] in ("{}", "{,}"):
            return inner
        self.at = counted.end()
        self.take("?")  # lazy or not, the ends are the same set
        if counted[0] == "?":
            return lambda text, starts: starts | inner(text, starts)
        # Bound the time: a loop within loops repeats the inner one's rounds for each of its own.
        if depth >= MAX_LOOP_DEPTH:
            raise ConfigError(f"must not have loops within {MAX_LOOP_DEPTH} groups, as {self.text[:80]!r} has")
        if counted[0] in "*+":
            least, most = (1 if counted[0] == "+" else 0), None
        else:
            least = int(counted[1] or 0)
            most = int(counted[3]) if counted[3] else None if counted[2] else least
        if max(least, most or 0) > MAX_COUNT:
            raise ConfigError(f"must not have repeat counts above {MAX_COUNT}")
        return _loop(inner, least, most)

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
            if escape in ("\\b", "\\B", "\\Z", "\\A"):
                return self.place(escape)
            if escape[1].isalnum() and escape[1] not in "dDwWsS":
                raise self.unknown()
            return self.letter(escape)
        if letter in "^$":
            return self.place(letter)
        return self.letter(letter if letter == "." else re.escape(letter), len(letter))

    def group(self, depth: int) -> Matcher:
        """One plain or non-capturing group, or a lookahead; other groups are refused."""
        opening = re.compile(r"\((?:\?(?::|=|!))?").match(self.text, self.at)
        assert opening is not None, "its letter is a bracket"
        if depth > MAX_DEPTH:
            raise ConfigError(f"must not nest groups more than {MAX_DEPTH} deep, as {self.text[:80]!r} has")
        if self.text[opening.end() - 1 : opening.end() + 1] == "(?":
            raise self.unknown()
        self.at = opening.end()
        inner = self.alternatives(depth)
        if not self.take(")"):
            raise self.unknown()
        if opening[0] in ("(", "(?:"):
            return inner
        # A lookahead takes no text: it keeps or drops each start by itself.
        wanted = opening[0] == "(?="
        return lambda text, starts: frozenset(i for i in starts if bool(inner(text, frozenset([i]))) == wanted)

    def letter(self, pattern: str, length: int | None = None) -> Matcher:
        """Matcher of the one letter that `pattern` (no loop) describes; `length` is its length in the text."""
        self.at += len(pattern) if length is None else length
        fits = re.compile(pattern).match
        return lambda text, starts: frozenset(i + 1 for i in starts if i < len(text) and fits(text, i))

    def place(self, pattern: str) -> Matcher:
        """Matcher of a position: an anchor or a word boundary."""
        self.at += len(pattern)
        fits = re.compile(pattern).match
        return lambda text, starts: frozenset(i for i in starts if fits(text, i))

    def take(self, letter: str) -> bool:
        """Skip `letter` if it comes next; returns whether it did."""
        found = self.text[self.at : self.at + 1] == letter
        self.at += found
        return found

    def unknown(self) -> ConfigError:
        """The error for unsupported syntax at this place."""
        return ConfigError(f"must not use {self.text[self.at : self.at + 4]!r} in the pattern {self.text[:80]!r}")


def _loop(inner: Matcher, least: int, most: int | None) -> Matcher:
    """Matcher of `least` to `most` repetitions of `inner` (None: without end)."""

    def match(text: str, starts: Positions) -> Positions:
        for _ in range(least):
            starts = inner(text, starts)
        # Only positions that are new go around again, so there are at most as many rounds as positions.
        seen = frontier = starts
        rounds = 0
        while frontier and (most is None or rounds < most - least):
            frontier = inner(text, frontier) - seen
            seen |= frontier
            rounds += 1
        return seen

    return match
