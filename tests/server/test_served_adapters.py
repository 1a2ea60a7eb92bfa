"""Adapters by the names of models: on one base, at the same time, each as if it were loaded alone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tokenizers
from places import TESTS
from told_backend import Running

import runner
from runner.cli import main
from runner.errors import UsageError
from runner.server.local import LocalModels
from runner.server.pool import Pool

BASE = TESTS / "fixtures" / "llama" / "llama-gqa"
ADAPTERS = TESTS / "fixtures" / "adapters"
TWO = {name: ADAPTERS / "llama-two" / name for name in ("first", "second")}


def answer(server: Running, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": "abc", "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
    sent = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert sent.status_code == 200, sent.text
    found: dict[str, Any] = sent.json()
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    local = LocalModels(Pool(1 << 30))
    local.add("base", BASE, adapters=TWO)
    with Running([served.backend for served in local.served.values()], {"other": "second"}) as running:
        yield running


@pytest.fixture(scope="module")
def wanted() -> dict[str, str]:
    texts = {}
    for name, adapters in (("base", ()), ("first", (str(TWO["first"]),)), ("second", (str(TWO["second"]),))):
        with runner.load(BASE, adapters=adapters) as lm:
            made = lm.generate("abc", max_tokens=24, temperature=0, logit_bias=dict.fromkeys(lm.eos_token_ids, -100.0))
            texts[name] = made.text
    assert len(set(texts.values())) == 3
    return texts


def test_each_answers_as_if_it_were_alone(server: Running, wanted: dict[str, str]) -> None:
    for name in ("base", "first", "second", "first", "base"):
        assert answer(server, name)["choices"][0]["text"] == wanted[name]
    assert answer(server, "other")["choices"][0]["text"] == wanted["second"]


def test_all_at_once_on_one_scheduler(server: Running, wanted: dict[str, str]) -> None:
    found: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        found.append((name, answer(server, name)["choices"][0]["text"]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in [*wanted] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(list(wanted.items()) * 4)


def test_nothing_of_one_is_reused_by_another(server: Running) -> None:
    prompt = "A long prompt that only one of them has read before."
    counts = [
        answer(server, name, prompt=prompt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for name in ("first", "second", "base", "first")
    ]
    assert max(counts[:3]) <= 1 < 10 < counts[3], "the first token was read before"


def test_lists_say_whose_adapters_they_are(server: Running) -> None:
    cards = {card["id"]: card for card in httpx2.get(f"{server.url}/v1/models").json()["data"]}
    assert list(cards) == ["base", "first", "second", "other"]
    assert [cards[name]["parent"] for name in cards] == [None, "base", "base", "base"]
    tags = httpx2.get(f"{server.url}/api/tags").json()["models"]
    assert {tag["name"]: tag["details"]["parent_model"] for tag in tags}["first"] == "base"
    assert len({tag["digest"] for tag in tags}) == 3, "an alias is the same model, an adapter another"


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (ADAPTERS / "llama-saved" / "adapter", "replaces whole tensors"),
        (ADAPTERS / "llama-grown-tokens" / "adapter", "replaces whole tensors"),
        (ADAPTERS / "gpt2" / "adapter", "adapter"),
        (TESTS, "adapter_config.json"),
    ],
)
def test_what_cannot_share_a_base_is_refused_by_name(adapter: Path, why: str) -> None:
    with pytest.raises((UsageError, runner.RunnerError), match=why):
        LocalModels(Pool(1 << 30)).add("base", BASE, adapters={"mine": adapter})


def test_one_with_tokens_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    for source in (BASE, ADAPTERS / "llama-qv" / "adapter"):
        shutil.copytree(source, tmp_path / "mine", dirs_exist_ok=True)
    library = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    library.add_tokens(["<one more>"])
    library.save(str(tmp_path / "mine" / "tokenizer.json"))
    with pytest.raises(UsageError, match="mine has tokens of its own"):
        LocalModels(Pool(1 << 30)).add("base", BASE, adapters={"mine": tmp_path / "mine"})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    first = str(TWO["first"])
    for words, told in (
        ([str(BASE), "--adapter", first], "NAME=PATH"),
        ([str(BASE), "--adapter", f"llama-gqa={first}"], "is taken"),
        ([str(BASE), "--adapter", f"a={first}", "--adapter", f"b={first}"], "another name already"),
        ([str(BASE), "--adapter", f"a={TESTS}"], "adapter_config.json"),
        ([str(other), str(other) + "/", "--adapter", f"a={first}"], "none of the models"),
    ):
        assert main(["serve", *words, "--port", "0"]) != 0
        assert told in capsys.readouterr().err
