"""Hub ids, the cache, and fetching, against a hub of our own.

`huggingface_hub` reads its environment when it is imported, so each case runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, environment_of, fake_hub
from hub_cache import cached
from places import ROOT

from runner.checkpoint import hub
from runner.checkpoint.gguf_choice import gguf_models
from runner.errors import HubError, UsageError

NEWER = "b" * 40
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}

SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{ }",
    "tokenizer.model": b"spm",
    "tokenizer_config.json": b"{\n}",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/rag.jinja": b"{{ y }}",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "model.pt": b"pickle",
    "modeling_x.py": b"raise SystemExit",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "m.gguf": b"GGUF",
    "consolidated.safetensors": b"the same weights again",
    "README.md": b"# hello",
    "trainer_state.json": b"[]",
    "..\\evil.json": b"{}",
    "additional_chat_templates/..\\evil.jinja": b"",
}
SINGLE = {"model.safetensors": b"w" * 1000}
SHARDED = {name: name.encode() * 50 for name in INDEX["weight_map"].values()}
SHARDED["model.safetensors.index.json"] = json.dumps(INDEX).encode()


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    with fake_hub() as state:
        yield state


CALL = """
import json, sys
from runner.checkpoint import hub
from runner.checkpoint.gguf_choice import gguf_models
from runner.errors import RunnerError
results = []
for name, args, kwargs in json.loads(sys.argv[1]):
    try:
        value = getattr(hub, name)(*args, **kwargs)
    except RunnerError as error:
        results.append([type(error).__name__, str(error)])
    else:
        listed = name == "list_cached"
        results.append([[str(m.hub_id), m.nbytes, str(m.path)] for m in value] if listed else str(value))
print(json.dumps(results))
"""

Call = tuple[str, list[str], dict[str, Any]]


def call(tmp_path: Path, endpoint: str, *calls: Call, **environment: str) -> tuple[list[Any], str]:
    """Call functions in another process: the result of each (an error as [type, message]), and stderr."""
    kept = environment_of(tmp_path, endpoint) | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", CALL, json.dumps(calls)]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def resolve(model: str, **kwargs: Any) -> Call:
    return ("resolve", [model], kwargs)


def names(snapshot: str) -> set[str]:
    root = Path(snapshot)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def error_of(result: Any, *expected: str) -> None:
    kind, message = result
    assert kind == "HubError" and "\n" not in message
    for part in expected:
        assert part in message, message


# --- fetching ---------------------------------------------------------------------------------------------------------


STALE = {**SINGLE, "model.safetensors.index.json": SHARDED["model.safetensors.index.json"]}
"""One whole file beside the index of shards that are gone."""


@pytest.mark.parametrize("weights", [SINGLE, SHARDED, STALE], ids=["single", "sharded", "stale index"])
def test_only_what_is_needed_and_then_no_request(fake: FakeHub, tmp_path: Path, weights: dict[str, bytes]) -> None:
    fake.add("org/name", UNWANTED | SMALL | weights)
    (path,), errors = call(tmp_path, fake.endpoint, resolve("org/name"))
    assert path == str(tmp_path / f"hf/hub/models--org--name/snapshots/{COMMIT}")
    assert names(path) == {*SMALL, *weights}
    assert all((Path(path) / name).read_bytes() == data for name, data in (SMALL | weights).items())
    assert errors == ""
    bodies = [request for request in fake.requests if request.startswith("GET /org/")]
    assert len(bodies) == len(set(bodies)) == len(SMALL) + len(weights)

    fake.requests.clear()
    again = [resolve("org/name"), resolve("org/name@main"), resolve(f"org/name@{COMMIT}"), ("list_cached", [], {})]
    (*paths, listed), errors = call(tmp_path, fake.endpoint, *again)
    size = sum(len(data) for data in (SMALL | weights).values())
    assert paths == [path] * 3 and listed == [[f"org/name@{COMMIT}", size, path]]
    assert fake.requests == [] and errors == ""
    (offline,), _ = call(tmp_path, fake.endpoint, ("pull", ["org/name"], {}), HF_HUB_OFFLINE="1")
    assert offline == path and fake.requests == []


def test_no_progress_bar_when_none_is_wanted(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/name", SMALL | SINGLE)
    (path,), errors = call(tmp_path, fake.endpoint, resolve("org/name", progress=False), HF_TOKEN="hf_x")
    assert names(path) == {*SMALL, *SINGLE} and "%" not in errors and "hf_x" not in errors


def test_revisions_and_pull(fake: FakeHub, tmp_path: Path) -> None:
    """When the branch moves on, `resolve` stays with the cached commit and `pull` fetches the new one."""
    fake.add("org/name", SMALL | SINGLE)
    fake.add("org/name", SMALL | SINGLE, "c" * 40, "refs/pr/1")
    first, other, by_argument = call(
        tmp_path,
        fake.endpoint,
        resolve("org/name"),
        resolve("org/name@refs/pr/1"),
        resolve("org/name", revision=COMMIT),
    )[0]
    assert first == by_argument and first.endswith(COMMIT) and other.endswith("c" * 40)
    fake.add("org/name", SMALL | {"model.safetensors": b"v2" * 400}, NEWER)
    cached, pulled, after = call(
        tmp_path, fake.endpoint, resolve("org/name"), ("pull", ["org/name"], {}), resolve("org/name")
    )[0]
    assert cached == first and pulled == after and pulled.endswith(NEWER)
    assert (Path(pulled) / "model.safetensors").read_bytes() == b"v2" * 400


def test_a_dropped_connection_is_resumed(fake: FakeHub, tmp_path: Path) -> None:
    """The hub library writes in pieces of 10 MiB, and resumes after the last complete piece."""
    content = os.urandom(1 << 20) * 12
    fake.add("org/name", SMALL | {"model.safetensors": content})
    fake.cut = 11 << 20
    (path,), _ = call(tmp_path, fake.endpoint, resolve("org/name"))
    assert (Path(path) / "model.safetensors").read_bytes() == content
    assert [wanted.split("-")[0] for wanted in fake.ranges] == [f"bytes={10 << 20}"]


def test_a_later_run_goes_on_where_an_earlier_one_ended(fake: FakeHub, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 32
    fake.add("org/name", SMALL | {"model.safetensors": content})
    fake.cut, fake.resumable = 21 << 20, False
    (broken,), _ = call(tmp_path, fake.endpoint, resolve("org/name"))
    error_of(broken, "refused org/name@main", "503")
    (partial,) = (tmp_path / "hf/hub/models--org--name/blobs").glob("*.incomplete")
    assert partial.read_bytes() == content[: 20 << 20]
    fake.resumable = True
    (path,), _ = call(tmp_path, fake.endpoint, resolve("org/name"))
    assert (Path(path) / "model.safetensors").read_bytes() == content and not partial.exists()
    assert [wanted.split("-")[0] for wanted in fake.ranges] == [f"bytes={20 << 20}"]


@pytest.mark.parametrize(("length", "cut"), [(400, None), (3000, None), (24 << 20, None), (24 << 20, 21 << 20)])
def test_what_is_not_the_file_that_its_hash_names_is_not_kept(
    fake: FakeHub, tmp_path: Path, length: int, cut: int | None
) -> None:
    """By git for a small file, SHA-256 for others; also where the connection breaks, and the rest is another file's."""
    content = os.urandom(length)
    fake.add("org/name", SMALL | {"model.safetensors": content})
    fake.wrong, fake.cut = "model.safetensors", cut
    (refused,), _ = call(tmp_path, fake.endpoint, resolve("org/name"))
    error_of(refused, "is not the file that its hash names, and is removed: run it again")
    assert not list((tmp_path / "hf/hub/models--org--name/blobs").glob("*.incomplete"))
    fake.wrong = None
    (path,), _ = call(tmp_path, fake.endpoint, resolve("org/name"))
    assert (Path(path) / "model.safetensors").read_bytes() == content


@pytest.mark.parametrize("begun", [b"x" * 1000, b"x" * 5000])
def test_what_is_not_the_files_beginning_is_not_taken_for_it(fake: FakeHub, tmp_path: Path, begun: bytes) -> None:
    content = os.urandom(3000)
    fake.add("org/name", SMALL | {"model.safetensors": content})
    blobs = tmp_path / "hf/hub/models--org--name/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(content).hexdigest()}.runner.incomplete").write_bytes(begun)
    first, second = call(tmp_path, fake.endpoint, resolve("org/name"), resolve("org/name"))[0]
    if len(begun) < len(content):
        error_of(first, "was not that file's beginning, and is removed: run it again")
    assert (Path(second) / "model.safetensors").read_bytes() == content
    assert not list(blobs.glob("*.incomplete"))


FROM_PYTHON = """
import shutil, sys
from collections import namedtuple
from runner.checkpoint import hub, names

{before}
try:
    print(names.pull(sys.argv[1], progress=True))
except hub.HubError as error:
    print(error)
"""
SMALL_DISK = "shutil.disk_usage = lambda place: namedtuple('Usage', 'free')(2500)"


def from_python(tmp_path: Path, endpoint: str, before: str, **pipes: Any) -> subprocess.Popen[bytes]:
    """`names.pull("org/name")` in a process of its own, after the lines `before`."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    environment |= {"XDG_DATA_HOME": str(tmp_path / "data"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", FROM_PYTHON.format(before=before), "org/name"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, **pipes)


def test_the_disk_is_asked_before_the_weights_are(fake: FakeHub, tmp_path: Path) -> None:
    content = os.urandom(3000)
    fake.add("org/name", SMALL | {"model.safetensors": content})
    said = from_python(tmp_path, fake.endpoint, SMALL_DISK).communicate()[0].decode()
    assert f"org/name needs 0.00 GB more, and the disk of the cache ({tmp_path}/hf/hub) has 0.00 GB free: " in said
    assert f"GET /org/name/resolve/{COMMIT}/model.safetensors" not in fake.requests
    # What is there already needs no room.
    begun = tmp_path / f"hf/hub/models--org--name/blobs/{hashlib.sha256(content).hexdigest()}.runner.incomplete"
    begun.write_bytes(content[:600])
    said = from_python(tmp_path, fake.endpoint, SMALL_DISK).communicate()[0].decode()
    assert (Path(said.strip()) / "model.safetensors").read_bytes() == content


def test_the_bar_has_the_rate_and_the_time_left(fake: FakeHub, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 32
    fake.add("org/name", SMALL | {"model.safetensors": content})
    fake.pause = 0.12
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 100))
    process = from_python(tmp_path, fake.endpoint, "", stderr=writing)
    os.close(writing)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while piece := os.read(reading, 4096):
            shown += piece
    os.close(reading)
    assert process.wait(timeout=60) == 0
    assert re.search(rb"fetching org/name.*\d/33\.6 MB.*[\d.]+ MB/s.*0:00:\d\d.*left", shown), shown


def test_a_failed_download_keeps_finished_files(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/name", SMALL | SHARDED)
    fake.failing = "model-00002-of-00002.safetensors"
    (broken, listed), errors = call(tmp_path, fake.endpoint, resolve("org/name"), ("list_cached", [], {}))
    error_of(broken, "refused org/name@main", "500")
    assert listed == [] and "Traceback" not in errors
    fake.failing = None
    fake.requests.clear()
    (path,), _ = call(tmp_path, fake.endpoint, resolve("org/name"))
    assert names(path) == {*SMALL, *SHARDED}
    assert not [r for r in fake.requests if r.startswith("GET /org/") and not r.endswith(".safetensors")]


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_refusals_of_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/name", SMALL | SINGLE)
    fake.add("org/gated", SMALL | SINGLE)
    fake.gated, fake.token = {"org/gated"}, "hf_right"
    (missing, revision, gated), errors = call(
        tmp_path, fake.endpoint, resolve("org/gone"), resolve("org/name@v9"), resolve("org/gated")
    )
    error_of(missing, "org/gone is not on", "spelling", "HF_TOKEN")
    error_of(revision, "org/name has no revision 'v9'")
    error_of(gated, "org/gated is gated", "accept its terms", "HF_TOKEN")
    assert "Traceback" not in errors
    (gated,), errors = call(tmp_path, fake.endpoint, resolve("org/gated"), HF_TOKEN="hf_wrong")
    error_of(gated, "org/gated is gated", "accept its terms", "with the account of your token, which has no access yet")
    assert "hf_wrong" not in errors + str(gated)
    (path,), errors = call(tmp_path, fake.endpoint, resolve("org/gated"), HF_TOKEN="hf_right")
    assert names(path) == {*SMALL, *SINGLE} and "hf_right" not in errors


def test_repositories_without_safetensors_are_refused_before_a_download(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/bin", SMALL | {"pytorch_model.bin": b"x"})
    fake.add("org/data", {"train.csv": b"x"})
    fake.add("org/none", SMALL)
    fake.add("org/lies", SMALL | {k: v for k, v in SHARDED.items() if "00002-of" not in k})
    evil = {"weight_map": {"a": "../../../../x.safetensors"}}
    fake.add("org/evil", SMALL | {"model.safetensors.index.json": json.dumps(evil).encode()})
    repos = ["org/bin", "org/data", "org/none", "org/lies", "org/evil"]
    (pickle, data, none, lies, bad), _ = call(tmp_path, fake.endpoint, *map(resolve, repos))
    error_of(pickle, "org/bin", "pickle")
    error_of(data, "org/data", "no config.json")
    error_of(none, "org/none", "neither model.safetensors nor")
    error_of(lies, "org/lies@main", "'model-00002-of-00002.safetensors'")
    assert bad[0] == "CheckpointError" and "plain name" in bad[1]
    fetched = {request.split("/")[2] for request in fake.requests if request.startswith("GET /org/")}
    assert fetched == {"lies", "evil"}
    assert not [request for request in fake.requests if request.endswith(".safetensors")]


def test_no_network_and_offline(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port: refused at once
    (unreachable,), errors = call(tmp_path, nobody, resolve("org/name"))
    error_of(unreachable, "org/name@main", nobody, "check the network")
    assert "Traceback" not in errors
    (offline,), _ = call(tmp_path, nobody, resolve("org/name"), HF_HUB_OFFLINE="1")
    error_of(offline, "org/name@main is not in the cache", str(tmp_path / "hf"), "HF_HUB_OFFLINE")


FULL = """
import errno, shutil, sys
import huggingface_hub
from runner.checkpoint import hub
from runner.checkpoint.gguf_choice import gguf_models

def full(*args, **kwargs):
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise RuntimeError("writer failed") from error

huggingface_hub.snapshot_download = full
try:
    hub.resolve("org/name")
except hub.HubError as error:
    print(error)
"""


def test_a_full_disk(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/name", SMALL | SINGLE)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": fake.endpoint, "NO_PROXY": "*"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", FULL]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"the disk of the cache ({tmp_path / 'hub'}) is full" in done.stdout and done.stdout.count("\n") == 1


# --- the cache, without a hub -----------------------------------------------------------------------------------------


def test_an_offline_cache(tmp_path: Path) -> None:
    whole = cached(tmp_path / "hf/hub", "org/whole", SMALL | SHARDED)
    cached(tmp_path / "hf/hub", "org/partial", SMALL | {k: v for k, v in SHARDED.items() if "00002-of" not in k})
    cached(
        tmp_path / "hf/hub", "org/broken", SMALL | {"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'}
    )
    bare = cached(tmp_path / "hf/hub", "org/bare", {"config.json": b"{}"} | SINGLE)
    (tmp_path / "hf/hub/models--org--whole/refs/odd").write_text("../../../etc")
    (tmp_path / "hf/hub/datasets--org--d/snapshots/x").mkdir(parents=True)
    requests = ["org/whole", "org/whole@odd", "org/partial", "org/broken", "org/bare"]
    results, errors = call(
        tmp_path, "http://127.0.0.1:9", *map(resolve, requests), ("list_cached", [], {}), HF_HUB_OFFLINE="1"
    )
    assert results[0] == str(whole) and results[4] == str(bare) and errors == ""
    error_of(results[1], "org/whole@odd is not in the cache")
    error_of(results[2], "org/partial@main is only in part in the cache")
    error_of(results[3], "org/broken@main is only in part")
    places = [(f"org/bare@{COMMIT}", str(bare)), (f"org/whole@{COMMIT}", str(whole))]
    assert [(row[0], row[2]) for row in results[5]] == places


def test_a_gguf_repository_with_a_config_is_whole_without_a_request(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "m-Q4_K_M.gguf": b"GGUF"}
    whole = cached(tmp_path / "hf/hub", "org/gguf", files)
    cached(tmp_path / "hf/hub", "org/both", files | {"tokenizer.json": b"{}"})
    wanted = [resolve("org/gguf"), resolve("org/both")]
    (found, refused), _ = call(tmp_path, "http://127.0.0.1:9", *wanted, HF_HUB_OFFLINE="1")
    assert found == str(whole / "m-Q4_K_M.gguf")
    error_of(refused, "org/both@main is only in part")


def test_a_snapshot_without_tokenizer_is_completed(fake: FakeHub, tmp_path: Path) -> None:
    """Other programs fetch file by file: missing files are fetched, and files in the cache are not fetched again."""
    fake.add("org/name", SMALL | SINGLE)
    snapshot = cached(tmp_path / "hf/hub", "org/name", {"config.json": SMALL["config.json"]} | SINGLE)
    (path,), _ = call(tmp_path, fake.endpoint, resolve("org/name"))
    assert path == str(snapshot) and names(path) == {*SMALL, *SINGLE}
    assert f"GET /org/name/resolve/{COMMIT}/model.safetensors" not in fake.requests


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve("~/org") == tmp_path / "org"
    with pytest.raises(UsageError, match="'main' was given, but org/name is a directory"):
        hub.resolve("org/name", revision="main")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert hub.resolve("m.gguf") == Path("m.gguf")
    with pytest.raises(UsageError, match=r"'main' was given, but m\.gguf is a file"):
        hub.resolve("m.gguf", revision="main")
    (tmp_path / "blob").write_bytes(b"GGUF and so on")  # ollama's files have no suffix
    assert hub.resolve("blob") == Path("blob")
    (tmp_path / "m.bin").write_bytes(b"GGU")
    with pytest.raises(UsageError, match=r"m\.bin is a file, neither"):
        hub.resolve("m.bin")


BAD_IDS = [
    "",
    "name",
    "/abs/olute",
    "./org/name",
    "../name",
    "a/b/c",
    "org/",
    "/name",
    "-a/b",
    "a/.b",
    "a/b.",
    "a--b/c",
]
BAD_IDS += [
    "a/b..c",
    "a/b c",
    "a/b\n",
    "a\\b/c",
    "é/b",
    "a/b.git",
    "a/" + "b" * 96,
    "a\0/b",
]
BAD_REVISIONS = [
    "",
    "..",
    "a/../b",
    "/a",
    "a//b",
    "a/",
    "-x",
    "a b",
    "a\n",
    "x.lock",
    "a\\b",
    "%2e%2e",
    "r" * 256,
    "a@b",
]


@pytest.mark.parametrize("model", BAD_IDS)
def test_what_is_not_a_hub_id(model: str) -> None:
    for function in (hub.resolve, hub.pull):
        with pytest.raises(HubError, match="neither an existing directory nor a hub id") as caught:
            function(model)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("revision", BAD_REVISIONS)
def test_what_is_not_a_revision(revision: str) -> None:
    with pytest.raises(HubError, match="not a revision"):
        hub.resolve(f"org/name@{revision}")
    with pytest.raises(HubError, match="not a revision"):
        hub.resolve("org/name", revision=revision)


def test_two_revisions() -> None:
    with pytest.raises(UsageError, match="two revisions of org/name"):
        hub.resolve("org/name@a", revision="b")


def test_importing_does_not_load_the_hub_library() -> None:
    heavy = {"huggingface_hub", "mlx.core", "safetensors", "numpy"}
    code = f"import sys, runner.checkpoint.hub; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- GGUF files -------------------------------------------------------------------------------------------------------


GGUF = {f"m-{label}.gguf": f"GGUF {label}".encode() * 9 for label in ("Q4_K_M", "Q8_0", "UD-Q4_K_XL", "F16")}
SPLIT = {f"BF16/m-BF16-0000{n}-of-00002.gguf": f"GGUF {n}".encode() * 9 for n in (1, 2)}
BESIDE = {"mmproj-F16.gguf": b"GGUF", "imatrix.gguf": b"GGUF", "README.md": b"", "config.json": b"{}"}


def test_a_gguf_file_is_fetched_by_its_quantization_and_nothing_else(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/m-GGUF", GGUF | SPLIT | BESIDE)
    wanted = ["org/m-GGUF:q8_0", "hf.co/org/m-GGUF:Q4_K_XL", "org/m-GGUF:BF16", "org/m-GGUF"]
    found, errors = call(tmp_path, fake.endpoint, *map(resolve, wanted), ("list_cached", [], {}))
    snapshot = tmp_path / f"hf/hub/models--org--m-GGUF/snapshots/{COMMIT}"
    files = ["m-Q8_0.gguf", "m-UD-Q4_K_XL.gguf", "BF16/m-BF16-00001-of-00002.gguf", "m-Q4_K_M.gguf"]
    assert found[:4] == [str(snapshot / file) for file in files] and "Traceback" not in errors
    assert names(str(snapshot)) == {*files, "BF16/m-BF16-00002-of-00002.gguf"}
    assert {row[0].partition("@")[2] for row in found[4]} == {
        f"{COMMIT}:{label}" for label in ("Q8_0", "UD-Q4_K_XL", "BF16", "Q4_K_M")
    }
    sizes = {row[0].rpartition(":")[2]: row[1] for row in found[4]}
    assert sizes["BF16"] == sum(map(len, SPLIT.values())) and sizes["Q8_0"] == len(GGUF["m-Q8_0.gguf"])
    fake.requests.clear()
    again, errors = call(tmp_path, fake.endpoint, *map(resolve, wanted))
    assert again == found[:4] and fake.requests == [] and errors == ""
    stored = json.loads((tmp_path / "data/runner/names.json").read_text())["stored"]
    assert {path: kept["files"] for path, kept in stored.items()} == {
        str(snapshot / files[0]): [files[0]],
        str(snapshot / files[1]): [files[1]],
        str(snapshot / files[2]): [f"m-BF16-0000{n}-of-00002.gguf" for n in (1, 2)],
        str(snapshot / files[3]): [files[3]],
    }


def test_an_address_from_a_browser_is_a_file_or_a_repository(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/m-GGUF", GGUF | SPLIT)
    fake.add("org/name", SMALL | SINGLE)
    fake.add("org/name", SMALL | SINGLE, NEWER, "v1")
    page = f"{fake.endpoint}/org"
    ends = {
        f"{page}/m-GGUF/blob/main/m-F16.gguf": f"{COMMIT}/m-F16.gguf",
        f"{page}/m-GGUF/resolve/main/m-F16.gguf?download=true": f"{COMMIT}/m-F16.gguf",
        f"{page}/m-GGUF?show_file_info=m-F16.gguf": f"{COMMIT}/m-F16.gguf",
        f"{page}/m-GGUF/resolve/main/BF16/m-BF16-00002-of-00002.gguf": f"{COMMIT}/BF16/m-BF16-00001-of-00002.gguf",
        "org/m-GGUF:m-F16.gguf": f"{COMMIT}/m-F16.gguf",
        f"{page}/name/": COMMIT,
        f"{page}/name/tree/v1": NEWER,
        f"{page}/name/blob/v1/config.json": NEWER,
        "https://huggingface.co/org/name/blob/main/model.safetensors": COMMIT,
        "hf.co/org/name": COMMIT,
    }
    found, _ = call(tmp_path, fake.endpoint, *map(resolve, ends))
    for (address, end), path in zip(ends.items(), found, strict=True):
        assert path.endswith(end), (address, path)


def test_what_no_gguf_file_is_meant_by_is_answered_with_those_there_are(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/m-GGUF", {**GGUF, "o-Q8_0.gguf": b"GGUF"})
    fake.add("org/few", {"m-Q5_0.gguf": b"GGUF", "m-Q6_K.gguf": b"GGUF"})
    fake.add("org/torn", {"m-Q5_0-00002-of-00003.gguf": b"GGUF"})
    fake.add("org/only", {"m.gguf": b"GGUF"})
    fake.add("org/plain", SMALL | SINGLE)
    asked = ["org/m-GGUF:Q8_0", "org/m-GGUF:Q2_K", "org/few", "org/torn:Q5_0", "org/plain:Q4_0", "org/only"]
    (twice, none, several, torn, plain, only), _ = call(tmp_path, fake.endpoint, *map(resolve, asked))
    error_of(twice, "org/m-GGUF has more than one 'Q8_0': there are m-Q8_0.gguf, o-Q8_0.gguf")
    error_of(none, "org/m-GGUF has no 'Q2_K': there are F16, Q4_K_M, m-Q8_0.gguf, UD-Q4_K_XL, o-Q8_0.gguf")
    error_of(several, "org/few has several GGUF files: name one, as in org/few:Q5_0 (there are Q5_0, Q6_K)")
    error_of(torn, "org/torn has only 1 of the shards")
    error_of(plain, "org/plain has no GGUF files, and so no 'Q4_0'")
    assert only.endswith("/m.gguf")
    (offline,), _ = call(tmp_path, fake.endpoint, resolve("org/only:Q4_0"), HF_HUB_OFFLINE="1")
    error_of(offline, "org/only@main:Q4_0 is only in part in the cache")


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org/org/name",
        "https://huggingface.co.example.org/org/name",
        "ftp://huggingface.co/org/name",
        "https://huggingface.co/org",
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/org/name/discussions/1",
        "https://huggingface.co/org/name/tree/main/folder",
        "https://huggingface.co/org/name/blob/main/folder/model.safetensors",
        "https://huggingface.co/org/name/resolve/main/../../x.gguf",
        "https://huggingface.co/org/name/resolve/main/%2e%2e/x.gguf",
        "https://huggingface.co/org/name/resolve/%2e%2e/x.gguf",
        "https://huggingface.co/../name",
        "https://[huggingface.co/org/name",
        "https://",
        "hf.co/org/name:../x.gguf",
        "org/name:",
        "org/name:a b",
        "org/name:Q4/K",
        "org/name:/x.gguf",
    ],
)
def test_addresses_that_are_no_models(address: str) -> None:
    with pytest.raises(HubError) as caught:
        hub.resolve(address)
    assert "\n" not in str(caught.value)


def test_names_of_files_that_lead_elsewhere_are_no_models() -> None:
    assert gguf_models(["../x-Q4_0.gguf", "a/../../x.gguf", "/x.gguf", "a\\b.gguf", "x.gguf\n", ".."]) == []


# --- adapters ---------------------------------------------------------------------------------------------------------


ADAPTER = {"adapter_config.json": b"{ }", "adapter_model.safetensors": b"a" * 100}


def test_an_adapter_is_two_files(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/lora", ADAPTER | UNWANTED | {"tokenizer.json": b"{}", "optimizer.safetensors": b"o"})
    wanted: Call = ("resolve_adapter", ["org/lora"], {})
    (path,), _ = call(tmp_path, fake.endpoint, wanted)
    assert names(path) == set(ADAPTER)
    fake.requests.clear()
    found, errors = call(tmp_path, fake.endpoint, wanted, ("resolve_adapter", [f"org/lora@{COMMIT}"], {}))
    assert found == [path, path] and fake.requests == [] and errors == ""
    (local,), _ = call(tmp_path, fake.endpoint, ("resolve_adapter", [path], {}), HF_HUB_OFFLINE="1")
    assert local == path


def test_an_adapters_tokenizer_is_fetched_when_asked_for(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/grown", ADAPTER | UNWANTED | {"tokenizer.json": b"{}", "added_tokens.json": b"{}"})
    wanted: list[Call] = [("resolve_adapter", ["org/grown"], {"tokenizer": flag}) for flag in (False, True, True)]
    found, _ = call(tmp_path, fake.endpoint, *wanted)
    assert found[0] == found[1] == found[2]
    assert {*ADAPTER, "tokenizer.json", "added_tokens.json"} <= names(found[0]) and "model.bin" not in names(found[0])


def test_an_adapter_of_mlx_lm_is_two_files_too(fake: FakeHub, tmp_path: Path) -> None:
    files = {"adapter_config.json": b"{ }", "adapters.safetensors": b"a" * 100}
    checkpoint = {"0000100_adapters.safetensors": b"an earlier state"}
    fake.add("org/lora", files | UNWANTED | checkpoint)
    wanted: Call = ("resolve_adapter", ["org/lora"], {})
    (path,), _ = call(tmp_path, fake.endpoint, wanted)
    assert names(path) == set(files)
    fake.requests.clear()
    found, errors = call(tmp_path, fake.endpoint, wanted)
    assert found == [path] and fake.requests == [] and errors == ""


def test_adapters_that_cannot_be_had(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("org/model", SMALL | SINGLE)
    fake.add("org/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    wanted: list[Call] = [
        ("resolve_adapter", [name], {}) for name in ("org/model", "org/old", "org/none", "no such/a/b")
    ]
    found, _ = call(tmp_path, fake.endpoint, *wanted)
    error_of(found[0], "org/model has no adapter_config.json")
    error_of(found[1], "org/old has no adapter_model.safetensors, only adapter_model.bin, a pickle")
    error_of(found[2], "org/none is not on")
    error_of(found[3], "'no such/a/b' is neither an existing directory nor a hub id")
    (offline,), _ = call(tmp_path, fake.endpoint, ("resolve_adapter", ["org/x"], {}), HF_HUB_OFFLINE="1")
    error_of(offline, "org/x@main is not in the cache", "HF_HUB_OFFLINE")
