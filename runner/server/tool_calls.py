"""Finds calls of functions in an answer's text as it comes; what turns out to be no call is text, and never lost."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runner.server.call_values import dumped, read_object
from runner.server.tool_formats import Called, Marks, Reading, read_calls
from runner.text.separator import Separator, Split
from runner.text.stop import unfinished

SPECIAL = "\ufdd0"
"""Around the text of a special token that is a mark: no text has this character, so no text spells the token."""

MOST_ENDS = 64
"""How often a text is tried to be read as a call: arguments may spell the marks, and each time all is read."""


def guarded(text: str, count: int) -> int:
    """How long the start of a text is that holds `count` characters beside those around its marks."""
    place = 0
    for part in text.split(SPECIAL):
        if count <= len(part):
            break
        count -= len(part)
        place += len(part) + 1
    return place + count


class KeepMarks:
    """A separator that passes on the special tokens `kept`, which others leave out, to whom looks for calls."""

    def __init__(self, inner: Separator, kept: Collection[str]) -> None:
        self._inner = inner
        self._kept = kept
        self.ends = inner.ends

    def add(self, text: str, special: bool) -> Split:
        """Take the next piece."""
        if special and text in self._kept:
            return self._inner.add(f"{SPECIAL}{text}{SPECIAL}", False)
        # A model can write that character, too.
        return self._inner.add(text if special else text.replace(SPECIAL, "\ufffd"), special)

    def flush(self) -> Split:
        """Take the end."""
        return self._inner.flush()


@dataclass(frozen=True)
class Call:
    """A call that was found: its place among those of the answer, and the id by which its result comes back.

    `arguments` are whole, or where a call is passed on as it is made "", and parts follow.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallPart:
    """More of the arguments of a call that is passed on as it is made."""

    index: int
    text: str


def gathered(calls: Sequence[Call | CallPart]) -> list[Call]:
    """Calls and parts as whole calls."""
    made: dict[int, Call] = {}
    for each in calls:
        if isinstance(each, CallPart):
            made[each.index] = replace(made[each.index], arguments=made[each.index].arguments + each.text)
        else:
            made[each.index] = each
    return list(made.values())


def arguments_of(call: Call) -> dict[str, Any] | None:
    """The arguments as an object; None where the length cut them off."""
    value = read_object(call.arguments)
    try:  # what was passed on as it was made has not been looked at
        return None if value is None else read_object(dumped(value))
    except ValueError:
        return None


class ValueEnd:
    """Finds the end of a JSON object in text that comes in pieces and is known to be valid."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def take(self, text: str) -> tuple[int, bool]:
        """How many characters of `text` belong to the object, and whether it ends there."""
        for place, letter in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or letter != '"'
                self._escaped = letter == "\\" and not self._escaped
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1, True
        return len(text), False


HEAD = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
"""How a call begins that a grammar leads."""


def new_id(nine: bool = False) -> str:
    """An id for a call; some templates want `nine` letters and digits."""
    if not nine:
        return f"call_{secrets.token_hex(12)}"
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class CallFinder:
    """Takes the text of one answer piece by piece; returns text for the reader, and calls once each is complete."""

    def __init__(
        self,
        marks: Sequence[Marks],
        schemas: Mapping[str, Any],
        *,
        special: Collection[str] = (),
        bare: bool = False,
        nine: bool = False,
        led: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            marks: the texts around calls.
            schemas: JSON schemas of arguments by the names of functions.
            special: which of the marks' texts are special tokens, passed on by `KeepMarks`.
            bare: whether an answer that is nothing but the JSON of calls is one.
            nine: whether ids have nine letters and digits.
            led: whether a grammar leads the calls: they are passed on as they are made, since they will be valid.
        """
        self._led = led
        self._value: ValueEnd | None = None
        self._begun = False  # whether the call that is open was passed on
        self._schemas = schemas
        self._special = special
        self._nine = nine
        self._openings = {self._spelled(each.opening): each for each in marks}
        self._bare = bare
        self._held = ""
        self._inside: Marks | None = None
        self._searched = 0  # characters of the held text that were searched for the closing text
        self._tries = 0  # how often the held text was read, and was no call
        self._fresh = True  # nothing but white space so far
        self._before = ""  # white space before the call: it belongs to the text only if this is none
        self._trailing: str | None = None  # behind a call, white space and this are left out
        self._space = ""  # such white space, so far
        self._spoke = False  # whether there was text for the reader
        self._count = 0

    def _spelled(self, text: str) -> str:
        return f"{SPECIAL}{text}{SPECIAL}" if text in self._special else text

    def add(self, text: str) -> tuple[str, list[Call | CallPart]]:
        """Take the next piece; return text to show, and the calls that it completes."""
        self._held += text
        shown = ""
        calls: list[Call | CallPart] = []
        while True:
            more, found = self._outside() if self._inside is None else self._within(calls)
            shown += more
            self._spoke = self._spoke or bool(more)
            if not found:
                return shown, calls

    def flush(self, *, ended: bool = False) -> tuple[str, list[Call | CallPart]]:
        """Take the end of the answer.

        Args:
            ended: whether the model ended it, so that nothing was cut off.
        """
        shown = ""
        calls: list[Call | CallPart] = []
        while True:
            more, found = self._outside() if self._inside is None else self._within(calls)
            if not found and self._inside is not None:
                more, found = self._last(calls, ended), True
            shown += more
            self._spoke = self._spoke or bool(more)
            if not found:
                text, self._held = self._held, ""
                return shown + ("" if self._count and not text.strip() else self._plain(text)), calls

    def _last(self, calls: list[Call | CallPart], ended: bool) -> str:
        """What is text of a call that the answer's end leaves open; calls that are whole are added to `calls`."""
        marks, self._inside = self._inside, None
        assert marks is not None
        if self._begun:  # what comes behind the arguments is of no use, and cut arguments were passed on
            self._held, self._begun = "", False
            return ""
        text = self._plain(self._held)
        read = read_calls(text, self._schemas, cut=not ended)
        if not marks.opening:
            # A bare answer is a call only if there is such a function: people talk in JSON, too.
            if read.end < len(text) or any(call.name not in self._schemas for call in read.calls):
                read = Reading(begun=True)
        elif not read.calls and not read.begun and self._again():
            return self._uncalled(marks, self._start(marks))
        if not read.calls:
            return self._uncalled(marks, len(self._held))
        calls += self._numbered(read.calls)
        self._trailing, self._before = self._spelled(marks.trailing), ""
        self._held = self._held[guarded(self._held, read.end) :]
        if not read.begun:
            return ""
        cut, self._held = self._held, ""
        return self._plain(cut)

    def _start(self, marks: Marks) -> int:
        """Where the held text goes on behind its opening mark."""
        return len(self._spelled(marks.opening)) if marks.kept else 0

    def _again(self) -> bool:
        """Whether one more call may be looked for in what was no call: each time all is read."""
        self._tries += 1
        return self._tries <= MOST_ENDS

    def _uncalled(self, marks: Marks, end: int) -> str:
        """What has turned out to be no call, as it was written, up to a place in the held text."""
        before, self._before = self._before, ""
        text, self._held, self._inside = self._held[:end], self._held[end:], None
        return before + ("" if marks.kept else marks.opening) + self._plain(text)

    def _outside(self) -> tuple[str, bool]:
        """Text before the next call, and whether one begins."""
        if self._trailing is not None and not self._behind(self._trailing):
            return "", False
        if self._fresh and self._held.strip():
            self._fresh = False
            if self._bare and self._held.lstrip()[0] == "{":
                self._begin(Marks(""))
                return "", True
        places = {self._held.find(opening): opening for opening in self._openings}
        places.pop(-1, None)
        if not places:
            # The tail that may begin a mark waits, and so does white space before it.
            cut = len(self._held) - unfinished(self._held, list(self._openings))
            ready = self._held[:cut].rstrip()
            self._held = self._held[len(ready) :]
            return self._plain(ready), False
        place = min(places)
        opening = places[place]
        marks = self._openings[opening]
        before = self._held[:place].rstrip()
        self._begin(marks, self._held[len(before) : place])
        self._held = self._held[place if marks.kept else place + len(opening) :]
        return self._plain(before), True

    def _begin(self, marks: Marks, before: str = "") -> None:
        self._inside, self._before, self._searched = marks, before, 0

    def _behind(self, trailing: str) -> bool:
        """Leave out what may stand behind a call; whether something else follows."""
        self._unspace()
        if trailing and self._held.startswith(trailing):
            self._held, self._trailing, trailing, self._space = self._held[len(trailing) :], "", "", ""
            self._unspace()
        if not self._held or (trailing and trailing.startswith(self._held)):
            return False
        if self._spoke:  # between two texts it stays
            self._held = self._space + self._held
        self._trailing, self._space = None, ""
        return True

    def _unspace(self) -> None:
        rest = self._held.lstrip()
        self._space += self._held[: len(self._held) - len(rest)]
        self._held = rest

    def _within(self, calls: list[Call | CallPart]) -> tuple[str, bool]:
        """Whether the call that has begun is complete; then it is added to `calls`, or is text after all."""
        assert self._inside is not None
        if self._led and not self._begun and (head := HEAD.match(self._held)):
            self._held, self._value, self._begun = self._held[head.end() :], ValueEnd(), True
            calls.append(Call(self._count, new_id(self._nine), json.loads(head[1]), ""))
            self._count += 1
        if self._value is not None:
            count, ended = self._value.take(self._held)
            if count:
                calls.append(CallPart(self._count - 1, self._held[:count]))
            self._held = self._held[count:]
            if not ended:
                return "", False
            self._value, self._searched = None, 0
        closing = self._spelled(self._inside.closing)
        if not closing:
            return "", False
        if self._begun:
            behind = self._held.find(closing)
            if behind >= 0:
                self._begun = False
                self._end(behind + len(closing))
            return "", behind >= 0
        while (place := self._held.find(closing, self._searched)) >= 0:
            end = place + len(closing)
            body = self._held[: end if self._inside.kept else place]
            marks, text = self._inside, self._plain(body)
            read = read_calls(text, self._schemas)
            if read.calls and (read.end == len(text) or read.over):
                self._end(end)
                calls += self._numbered(read.calls)
                return text[read.end :], True
            more = self._again()
            if not read.begun and not read.calls and more:  # it only mentions the mark
                return self._uncalled(marks, self._start(marks)), True
            if read.over or not read.begun or not more:
                self._tries = 0
                if read.begun and not read.over:  # what else comes may be an argument's
                    self._openings = {}
                return self._uncalled(marks, end), True
            # An argument may spell the mark: the call may end at a later one.
            self._searched = end
        self._searched = max(self._searched, len(self._held) - len(closing) + 1)
        return "", False

    def _end(self, end: int) -> None:
        """Go on behind a call."""
        assert self._inside is not None
        self._trailing, self._tries = self._spelled(self._inside.trailing), 0
        self._held, self._inside, self._before = self._held[end:], None, ""

    def _numbered(self, found: Sequence[Called]) -> list[Call]:
        first = self._count
        self._count += len(found)
        return [Call(first + place, new_id(self._nine), call.name, call.arguments) for place, call in enumerate(found)]

    @staticmethod
    def _plain(text: str) -> str:
        return text.replace(SPECIAL, "")
