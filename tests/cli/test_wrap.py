"""Word wrap of streams: the same however the text is cut, no line too wide, nothing lost but the gaps at breaks."""

from __future__ import annotations

import io
import os
import random
import textwrap
from pathlib import Path

import pytest
from pseudo_terminal import Terminal
from scripted import scripted

from runner.cli.terminal import Output
from runner.cli.wrap import WordWrap, width


def wrapped(text: str, columns: int, pieces: int | None = None) -> str:
    wrap = WordWrap(lambda: columns)
    if pieces is None:
        return wrap.feed(text) + wrap.flush()
    cuts = sorted(random.Random(pieces).choices(range(len(text) + 1), k=pieces))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return "".join(map(wrap.feed, parts)) + wrap.flush()


def prose(seed: int) -> str:
    letters, pick = "abcdefghij", random.Random(seed)
    return " ".join("".join(pick.choices(letters, k=pick.randint(1, 12))) for _ in range(60))


@pytest.mark.parametrize("columns", [20, 31, 80])
def test_plain_words_as_textwrap_does_it(columns: int) -> None:
    """The naive twin sees the whole text; its words fit a line."""
    for seed in range(20):
        text = prose(seed)
        wanted = "\n".join(textwrap.wrap(text, columns, break_on_hyphens=False))
        assert wrapped(text, columns) == wanted
        assert wrapped(text, columns, pieces=9) == wrapped(text, columns, pieces=len(text)) == wanted


MIXED = (
    "A 東京は日本の首都です。 \u2014 caf\u0065\u0301 \U0001f469\u200d\U0001f4bb \u2764\ufe0f here  two\n\n    indented "
)


def test_no_line_is_too_wide_and_nothing_is_lost() -> None:
    for seed in range(30):
        words = [*MIXED.split(" "), *prose(seed).split()[:20]]
        random.Random(seed).shuffle(words)
        text = " ".join(words)
        shown = wrapped(text, 24, pieces=15)
        assert shown == wrapped(text, 24)
        assert all(width(line) <= 24 for line in shown.split("\n"))
        assert "".join(shown.split()) == "".join(text.split())


def test_wide_characters_break_anywhere_but_before_a_closing_one() -> None:
    assert wrapped("日" * 15, 20) == "日" * 10 + "\n" + "日" * 5
    assert wrapped("日" * 10 + "。本", 20) == "日" * 9 + "\n日。本"
    assert width("日本。") == 6 and width("e\u0301") == 1 and width("\u200d") == 0 and width("\U0001f469") == 2
    assert wrapped("x" * 18 + "\U0001f469\u200d\U0001f4bb", 20) == "x" * 18 + "\n\U0001f469\u200d\U0001f4bb"


def test_a_word_that_fits_no_line_is_the_terminals() -> None:
    address = "https://example.org/" + "x" * 50
    assert wrapped(f"see {address} there", 20) == f"see\n{address} there"
    assert wrapped(address, 20) == address


def test_code_passes_as_it_is() -> None:
    long = "x = 1; " * 20
    assert wrapped(f"{prose(1)[:10]}\n```python\n{long}\n```\n", 30, pieces=7).split("\n")[2] == long
    assert "\n" in wrapped(long, 30)
    assert "\n" in wrapped(f"```\n{long}\n```\n{long}", 30).split("```\n")[2]


def test_a_terminal_without_a_width_is_not_wrapped_and_nothing_waits() -> None:
    wrap = WordWrap(lambda: 0)
    assert [wrap.feed(piece) for piece in ("ab", "c d", "e", "f ")] == ["ab", "c d", "e", "f"]
    assert wrap.flush() == " "


def test_the_width_of_now_counts() -> None:
    columns = 40
    wrap = WordWrap(lambda: columns)
    first = wrap.feed("aaaa " * 8)
    columns = 20
    assert "\n" not in first and wrap.feed("bbbb ") == "\nbbbb"


def test_a_word_waits_until_it_has_ended() -> None:
    wrap = WordWrap(lambda: 20)
    assert [wrap.feed(piece) for piece in ("ab", "c", " ", "de\n")] == ["", "", "abc", " de\n"]
    assert not wrap.holds and wrap.feed("x") == "" and wrap.holds and wrap.flush() == "x"


def test_a_tab_goes_to_the_next_multiple_of_8() -> None:
    assert wrapped("日本語\t" + "x" * 12, 20) == "日本語\t" + "x" * 12
    assert wrapped("日本語ab\t" + "x" * 12, 20) == "日本語ab\n" + "x" * 12


class Screen(io.StringIO):
    """A terminal of 30 columns without colours."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_code_that_an_answer_leaves_open_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((30, 50)))
    output = Output(Screen(), wrap=True)
    output.write("```\n" + "x " * 20, "dim")
    output.end_line()
    output.write("y " * 20)
    output.end_line()
    assert output.stream.getvalue() == f"```\n{'x ' * 20}\n{('y ' * 15).rstrip()}\n{'y ' * 5}\n"


TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{# <think></think> #}"
SAID = f"<think>{prose(4)[:70]}</think>{prose(3)[:150]}"


@pytest.mark.parametrize("arguments", [["generate", "MODEL", "Hi"], ["chat", "MODEL"]])
@pytest.mark.parametrize("switch", ["--wrap", "--no-wrap"])
def test_a_terminal_is_wrapped_with_colours(tmp_path: Path, arguments: list[str], switch: str) -> None:
    """Reasoning is dim, and its codes take no columns."""
    model = scripted(tmp_path / "model", [([{"role": "user", "content": "Hi"}], SAID)], template=TEMPLATE)
    words = [str(model) if word == "MODEL" else word for word in arguments]
    program = Terminal(*words, "--temp", "0", switch, columns=40, NO_COLOR="")
    try:
        if "chat" in arguments:
            program.expect("lists the commands")
            program.send("Hi\r")
        end = prose(3)[140:150].split()[-1]
        text = program.expect(f"{end}\r\n").replace("\r\n", "\n").replace("\x1b[0m", "").replace("\x1b[2m", "")
    finally:
        program.process.kill()
        program.process.wait()
        os.close(program.master)
    for part in (prose(4)[:70], prose(3)[:150]):
        assert ("\n".join(textwrap.wrap(part, 40)) in text) is (switch == "--wrap")
        assert (part in text) is (switch == "--no-wrap")
