"""Several models in one memory: loaded when they are asked for, gone when others need the memory, never in between."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import mlx.core as mx
import pytest
from gguf_cases import mixed_model
from places import ROOT
from told_backend import Running, ToldBackend, facts_of, waited

import runner
from runner.engine.scheduler import Scheduler
from runner.errors import UsageError
from runner.inspect_model import inspect
from runner.server.backend import STUCK, Status
from runner.server.durations import seconds_of
from runner.server.local import LocalModels
from runner.server.ollama_models import size
from runner.server.pool import Pool

FIXTURE = ROOT / "tests" / "fixtures" / "llama" / "llama-gqa"
LONG: dict[str, Any] = {"max_tokens": 2500, "ignore_eos": True, "temperature": 0}


@dataclass
class Several:
    """A server with the models `names`, all the same, and none loaded."""

    server: Running
    local: LocalModels
    paths: dict[str, Path]

    def complete(self, model: str, **fields: Any) -> httpx2.Response:
        body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, **fields}
        return httpx2.post(f"{self.server.url}/v1/completions", json=body, timeout=60)

    def text(self, model: str) -> str:
        answer = self.complete(model)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def there(self) -> list[str]:
        return [one["name"] for one in self.ps()]

    def loaded(self) -> list[str]:
        """The models that are loaded, which all that tell of it agree on."""
        cards = httpx2.get(f"{self.server.url}/v1/models").json()["data"]
        found = [card["id"] for card in cards if card["loaded"]]
        assert found == self.there()
        states = httpx2.get(f"{self.server.url}/health").json()["models"]
        assert found == [name for name, state in states.items() if state["status"] == "ok"]
        return found

    def ps(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx2.get(f"{self.server.url}/api/ps").json()["models"]
        return found

    def load(self, model: str, keep_alive: Any) -> dict[str, Any]:
        sent = httpx2.post(f"{self.server.url}/api/generate", json={"model": model, "keep_alive": keep_alive})
        answer: dict[str, Any] = sent.json()
        assert sent.status_code == 200, answer
        return answer

    def events(self, kind: str) -> list[str]:
        return [line["model"] for line in self.server.lines if line.get("event") == kind]


def widened(place: Path) -> Path:
    """The fixture with a context of 4,096 tokens and MLPs of 4,096 rows, all new ones 0: what it says is the same.

    Its weights are large beside what answers take.
    """
    shutil.copytree(FIXTURE, place)
    config = json.loads((place / "config.json").read_text())
    wide = {"max_position_embeddings": 4096, "intermediate_size": 4096}
    (place / "config.json").write_text(json.dumps({**config, **wide}))
    tensors = mx.load(str(place / "model.safetensors"))
    assert isinstance(tensors, dict)
    for name, tensor in tensors.items():
        if ".mlp." in name:
            rows, columns = (4096 - tensor.shape[0], 0) if "down_proj" not in name else (0, 4096 - tensor.shape[1])
            tensors[name] = mx.pad(tensor, [(0, rows), (0, columns)])
    mx.save_safetensors(str(place / "model.safetensors"), tensors)
    return place


@contextmanager
def several(
    place: Path, *names: str, room: float = 100.0, pinned: tuple[str, ...] = (), **options: Any
) -> Iterator[Several]:
    """Serve copies of one model in a memory of `room` times its weights."""
    wide = widened(place / "wide")
    with runner.load(wide) as lm:
        nbytes = lm.nbytes
    paths = {name: place / name for name in names}
    local = LocalModels(Pool(int(room * nbytes), **options))
    for name, path in paths.items():
        shutil.copytree(wide, path)
        local.add(name, path, pinned=name in pinned)
    with Running([served.backend for served in local.served.values()]) as server:
        yield Several(server, local, paths)


@pytest.fixture(scope="module")
def wanted() -> str:
    with runner.load(FIXTURE) as lm:
        return lm.generate("abc", max_tokens=8, temperature=0).text


def test_a_model_is_loaded_when_it_is_asked_for(tmp_path: Path, wanted: str) -> None:
    with several(tmp_path, "a", "b") as one:
        assert one.loaded() == []
        assert httpx2.post(f"{one.server.url}/tokenize", json={"model": "b", "prompt": "abc"}).json()["count"] > 0
        shown = httpx2.post(f"{one.server.url}/api/show", json={"model": "b"}).json()
        assert shown["model_info"]["llama.context_length"] == 4096
        assert one.complete("b", temperature=-1).status_code == 400
        assert one.loaded() == [], "what needs no weights loads none"
        assert one.text("b") == wanted
        assert one.loaded() == ["b"]
        assert [one.text(name) for name in ("a", "b", "a")] == [wanted] * 3
        assert one.loaded() == ["a", "b"] and one.events("loaded") == ["b", "a"]
        planned = {served.backend.facts.nbytes for served in one.local.served.values()}
        assert planned == {slot.nbytes for slot in one.local.pool.slots}, "what was planned is what is there"


def test_how_large_a_model_is_and_how_it_is_packed(tmp_path: Path) -> None:
    mixed_model(tmp_path / "m.gguf", "Q4_0")
    local = LocalModels(Pool(1 << 40))
    told = {"plain": ("0.03M", "BF16", "safetensors"), "packed": ("0.07M", "4-bit g32", "safetensors")}
    for name, path in (("plain", FIXTURE), ("packed", FIXTURE.parent / "llama-mlx-4bit")):
        local.add(name, path)
        with runner.load(path) as lm:
            assert facts_of(name, lm).forms == local.served[name].backend.facts.forms, "loaded or not"
        assert local.served[name].backend.facts.forms.total() == inspect(path).parameters
    local.add("gguf", tmp_path / "m.gguf")
    told["gguf"] = ("0.74M", "4-bit g32", "gguf")
    with Running([served.backend for served in local.served.values()]) as server:
        found = {card["name"]: card["details"] for card in httpx2.get(f"{server.url}/api/tags").json()["models"]}
        keys = ("parameter_size", "quantization_level", "format")
        assert {name: tuple(details[key] for key in keys) for name, details in found.items()} == told
        shown = httpx2.post(f"{server.url}/api/show", json={"model": "packed"}).json()
        assert shown["details"] == found["packed"]
        assert shown["model_info"]["general.parameter_count"] == inspect(FIXTURE.parent / "llama-mlx-4bit").parameters
    assert [size(count) for count in (0, 134_515_008, 8_030_261_248)] == ["", "134.52M", "8.0B"]


def test_metrics_say_how_full_the_room_for_caches_is(tmp_path: Path) -> None:
    with several(tmp_path, "a", "b") as one:

        def gauge(name: str, model: str) -> float:
            lines = httpx2.get(f"{one.server.url}/metrics").text.splitlines()
            (line,) = (line for line in lines if line.startswith(f'{name}{{model_name="{model}"}}'))
            return float(line.split()[1])

        body = {"model": "a", "prompt": "abc", "stream": True, **LONG}
        with httpx2.stream("POST", f"{one.server.url}/v1/completions", json=body, timeout=60) as sent:
            pieces = sent.iter_text()
            next(pieces)
            room = one.local.pool.engine.budget.room
            assert waited(lambda: 0 < gauge("kv_cache_usage_perc", "a") < 1)
            assert gauge("kv_cache_usage_perc", "b") == 0, "not loaded"
            status = one.local.served["a"].backend.status()
            assert status.room == room and status.usage == status.nbytes / room
        assert waited(lambda: gauge("kv_cache_usage_perc", "a") == 0)


def test_many_at_once_load_it_once(tmp_path: Path, wanted: str) -> None:
    with several(tmp_path, "a") as one:
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(one.text("a"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert texts == [wanted] * 8 and one.events("loaded") == ["a"]


def test_who_was_idle_longest_makes_way_for_another(tmp_path: Path, wanted: str) -> None:
    with several(tmp_path, "a", "b", "c", room=2.5) as one:
        for name, there in (("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
            assert one.text(name) == wanted
            assert one.loaded() == list(there)
        assert one.load("c", -1)["done_reason"] == "load"
        assert one.text("b") == wanted
        assert one.text("a") == wanted
        assert one.loaded() == ["a", "c"], "asked to stay for ever: it goes last"
        assert one.text("b") == wanted
        assert one.load("a", 0)["done_reason"] == "unload"


def test_a_pinned_model_stays(tmp_path: Path, wanted: str) -> None:
    with several(tmp_path, "a", "b", "c", room=2.5, pinned=("a",), keep=0.05) as one:
        for name in "abcb":
            assert one.text(name) == wanted
        away = {"model": "a", "keep_alive": 0}
        refused = httpx2.post(f"{one.server.url}/api/generate", json=away)
        assert refused.status_code == 400 and "a is pinned" in refused.json()["error"]
        answer = httpx2.post(
            f"{one.server.url}/api/generate", json={**away, "prompt": "Hi", "raw": True, "options": {"num_predict": 2}}
        )
        assert answer.status_code == 200 and answer.headers["x-runner-ignored"] == "keep_alive"
        assert (
            "x-runner-ignored"
            not in httpx2.post(f"{one.server.url}/api/generate", json={"model": "a", "keep_alive": -1}).headers
        )
        assert waited(lambda: one.there() == ["a"])
    with pytest.raises(UsageError, match=r"weights of b take .* MB, and .* MB are allowed, .* for what always stays"):
        several(tmp_path / "other", "a", "b", room=1.5, pinned=("a",)).__enter__()


def test_answers_under_way_keep_their_model_and_who_waits_gets_it_next(tmp_path: Path, wanted: str) -> None:
    with several(tmp_path, "a", "b", room=1.9) as one:
        body = {"model": "a", "prompt": "abc", "stream": True, **LONG}
        texts: dict[str, str] = {}
        with httpx2.stream("POST", f"{one.server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            waiters = [threading.Thread(target=lambda: texts.update(b=one.text("b")))]
            waiters[0].start()
            slot_a, slot_b = one.local.pool.slots
            assert waited(lambda: slot_a.leaving is not None)
            # From here on who asks for `a` waits until `b` had its turn: streams of `a` cannot keep it out for ever.
            waiters.append(threading.Thread(target=lambda: texts.update(a=one.text("a"))))
            waiters[1].start()
            time.sleep(0.1)
            assert not texts and slot_b.lm is None
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        for waiter in waiters:
            waiter.join(30)
        assert texts == {"a": wanted, "b": wanted} and list(texts) == ["b", "a"]
        assert one.events("loaded") == ["a", "b", "a"]


def test_waiting_for_memory_has_an_end(tmp_path: Path, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.server.pool.ROOM_SECONDS", 0.05)
    with several(tmp_path, "a", "b", room=1.9) as one:
        body = {"model": "a", "prompt": "abc", "stream": True, **LONG}
        with httpx2.stream("POST", f"{one.server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            refused = one.complete("b")
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "no_memory" and "(a)" in refused.text
            assert list(lines)[-2] == "data: [DONE]"
        assert one.text("a") == wanted and one.events("loaded") == ["a"], "it has stayed"


def test_answers_press_out_models_that_nobody_uses(tmp_path: Path) -> None:
    with several(tmp_path, "a", "b", room=2.1) as one:
        one.text("a")
        one.text("b")
        assert one.loaded() == ["a", "b"]
        assert one.complete("b", prompt=[5] * 900, **{**LONG, "max_tokens": 600}).status_code == 200
        assert one.loaded() == ["b"]
        refused = one.complete("b", n=1, prompt=[5] * 10, max_tokens=400)
        assert refused.status_code == 200
        one.local.pool.engine.budget.limit = one.local.pool.slots[1].nbytes + 2000
        refused = one.complete("b", prompt=[5] * 10, max_tokens=400)
        assert refused.status_code == 400 and "MB" in refused.text


def test_keep_alive(tmp_path: Path) -> None:
    with several(tmp_path, "a", "b") as one:
        assert one.load("a", "5m")["done_reason"] == "load"
        (shown,) = one.ps()
        assert shown["name"] == "a" and shown["size_vram"] == one.local.pool.slots[0].nbytes
        left = time.mktime(time.strptime(shown["expires_at"][:19], "%Y-%m-%dT%H:%M:%S")) - time.mktime(time.gmtime())
        assert 280 < left <= 301
        assert one.load("a", -1)["done_reason"] == "load"
        assert one.ps()[0]["expires_at"] > "2100"
        chat = {"model": "a", "prompt": "Hi", "raw": True, "stream": False, "options": {"num_predict": 2, "seed": 1}}
        answer = httpx2.post(f"{one.server.url}/api/generate", json={**chat, "model": "b", "keep_alive": 0}).json()
        assert answer["done_reason"] == "length" and answer["load_duration"] > 0
        assert waited(lambda: one.there() == ["a"]), "unloaded right after"
        httpx2.post(f"{one.server.url}/api/generate", json={**chat, "keep_alive": 0.05})
        assert waited(lambda: one.there() == [])
        assert one.load("a", 0)["done_reason"] == "unload" and one.loaded() == []
        bad = httpx2.post(f"{one.server.url}/api/generate", json={**chat, "keep_alive": "soon"})
        assert bad.status_code == 400 and "keep_alive" in bad.json()["error"]


def test_idle_models_go_after_the_time_that_was_asked_for(tmp_path: Path) -> None:
    with several(tmp_path, "a", keep=0.1) as one:
        body = {"model": "a", "prompt": "abc", "stream": True, **LONG}
        with httpx2.stream("POST", f"{one.server.url}/v1/completions", json=body, timeout=60) as stream:
            assert list(stream.iter_lines())[-2] == "data: [DONE]"
        assert waited(lambda: one.there() == [] and one.events("unloaded") == ["a"])
        budget = one.local.pool.engine.budget
        assert (budget.weights, budget.loose, budget.used) == (0, 0, 0)


def damaged(path: Path) -> bytes:
    """Cut off the end of a model's weights; returns them as they were."""
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    return whole


def test_a_model_that_cannot_be_loaded_says_why_to_each_who_waits(tmp_path: Path, wanted: str) -> None:
    with several(tmp_path, "a", "b") as one:
        whole = damaged(one.paths["b"])
        refused: list[httpx2.Response] = []
        threads = [threading.Thread(target=lambda: refused.append(one.complete("b"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [each.status_code for each in refused] == [500] * 4
        assert all("b cannot be loaded: " in each.json()["error"]["message"] for each in refused)
        assert {each.json()["error"]["code"] for each in refused} == {"model_failed_to_load"}
        hello = {"model": "b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        told = httpx2.post(f"{one.server.url}/v1/completions", json={"model": "b", "prompt": "x", "stream": True})
        assert told.status_code == 500 and told.headers["content-type"] == "application/json"
        told = httpx2.post(f"{one.server.url}/api/generate", json={"model": "b", "prompt": "x", "raw": True})
        assert told.status_code == 500 and "cannot be loaded" in told.json()["error"]
        told = httpx2.post(f"{one.server.url}/v1/messages", json=hello)
        assert told.status_code in (400, 500) and told.json()["type"] == "error"
        assert one.text("a") == wanted and one.loaded() == ["a"]
        assert one.server.serving.places.taken == 0
        (one.paths["b"] / "model.safetensors").write_bytes(whole)
        assert one.text("b") == wanted
        assert "Traceback" not in json.dumps(one.server.lines)


def test_what_can_never_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"weights of a take 1.6 MB, and 0.8 MB are allowed"):
        several(tmp_path / "start", "a", room=0.5).__enter__()
    with several(tmp_path, "a") as one:
        one.local.pool.limit = 1000
        refused = one.complete("a")
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "model_too_large"
        assert "take 1.6 MB" in refused.text and "0.0 MB are allowed" in refused.text
        refused = httpx2.post(f"{one.server.url}/api/generate", json={"model": "a", "prompt": "x", "raw": True})
        assert refused.status_code == 400 and "are allowed" in refused.json()["error"]


def test_clients_that_leave_while_a_model_is_loaded(tmp_path: Path, wanted: str) -> None:
    with several(tmp_path, "a", keep=0.1) as one:
        gate = threading.Event()
        slot = one.local.pool.slots[0]
        real = slot.load
        slot.load = lambda: (gate.wait(10), real())[1]
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{one.server.url}/v1/completions", json={"model": "a", "prompt": "x"}, timeout=0.2)
        assert waited(lambda: one.server.serving.places.taken == 0 and slot.users == 0)
        gate.set()
        assert waited(lambda: one.events("unloaded") == ["a"]), "loaded for nobody: it goes like an idle one"
        assert one.text("a") == wanted


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h30m", 5400), ("0", 0), (0, 0), ("300", 300), (2.5, 2.5), ("1.5s", 1.5), ("100ms", 0.1)],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert seconds_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["1" * 1_000_000 + "x", "1h" * 500_000, "9" * 5000, "1" * 65])
def test_no_duration_is_looked_at_for_long(text: str) -> None:
    with pytest.raises(ValueError, match="is no duration"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["-1", -1, "-1m", "-5s"])
def test_endless_durations(text: str | float) -> None:
    assert seconds_of(text) == float("inf")


@pytest.mark.parametrize("text", ["", "m", "5 m", "5x", "--1m", "nan", "5m3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        seconds_of(text)


def test_an_engine_that_fails_begins_anew_with_the_models_it_had(
    tmp_path: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = LocalModels(Pool(1 << 30))
    for name in ("a", "b"):
        local.add(name, FIXTURE)
    backends = [served.backend for served in local.served.values()]
    with Running(backends, on_engine_failure="restart") as server:
        one = Several(server, local, {})
        assert one.text("a") == one.text("b") == wanted
        with monkeypatch.context() as patched:
            patched.setattr(Scheduler, "step", lambda self: 1 // 0)
            assert one.complete("a").status_code >= 500
        assert waited(lambda: one.complete("a").status_code == 200)
        assert one.text("a") == one.text("b") == wanted
        weights = sum(slot.nbytes for slot in local.pool.slots)
        assert local.pool.engine.budget.weights == weights, "counted once"


def test_a_stuck_engine_shows_in_health() -> None:
    backend = ToldBackend(lambda prompt, order: "ok")
    with Running([backend]) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        backend.status = lambda: Status(stuck_for=STUCK + 1, running=1)  # type: ignore[method-assign]
        health = httpx2.get(f"{server.url}/health")
        assert health.status_code == 503 and health.json()["models"]["told"]["status"] == "stuck"
