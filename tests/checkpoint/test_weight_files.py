"""Files beside each other: a stale index, shards of two versions, missing ones; what is whole is read, or named."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from model_dirs import model_dir, refusal, sharded, tensor_file

from runner.checkpoint.directory import Checkpoint
from runner.checkpoint.hub import _has_weights
from runner.checkpoint.weight_files import choose

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
OLD = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def index(*files: str) -> dict[str, object]:
    return {"metadata": {"total_size": 1}, "weight_map": {chr(ord("a") + i): file for i, file in enumerate(files)}}


def read(path: Path) -> dict[str, int]:
    """The tensors of a directory, each with the number that fills it."""
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name)[0].item() for name in checkpoint.headers}


def test_a_stale_index_yields_to_the_whole_file(tmp_path: Path) -> None:
    model_dir(tmp_path, {INDEX: index(*OLD), "model.safetensors": tensor_file(["x"], 9)})
    assert read(tmp_path) == {"x": 9} and _has_weights(tmp_path)


def test_a_stale_index_yields_to_the_whole_file_beside_some_of_its_shards(tmp_path: Path) -> None:
    whole = {"model.safetensors": tensor_file(["x"], 9), OLD[0]: tensor_file(["a"], 1)}
    model_dir(tmp_path, {INDEX: index(*OLD), **whole})
    assert read(tmp_path) == {"x": 9}


@pytest.mark.parametrize("stale", [False, True])
def test_numbered_shards_need_no_index(stale: bool, tmp_path: Path) -> None:
    files = {SHARDS[0]: tensor_file(["x"], 1), SHARDS[1]: tensor_file(["y"], 2)}
    model_dir(tmp_path, files | ({INDEX: index(*OLD)} if stale else {}))
    assert read(tmp_path) == {"x": 1, "y": 2}


def test_shards_without_an_index_may_not_hold_a_tensor_twice(tmp_path: Path) -> None:
    model_dir(tmp_path, {SHARDS[0]: tensor_file(["x"]), SHARDS[1]: tensor_file(["x"])})
    message = refusal(tmp_path)
    assert "'x'" in message and all(name in message for name in SHARDS)


def test_missing_shards_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    model_dir(tmp_path, {INDEX: index(*OLD), OLD[0]: tensor_file(["a"]), "consolidated.safetensors": b"x"})
    message = refusal(tmp_path)
    assert f"{OLD[1]}: no such file" in message and "2 of 3 files are missing" in message
    assert f"'{OLD[0]}'" in message and "'consolidated.safetensors'" in message
    assert "stale" in message and "incomplete download" in message


def test_shards_of_two_versions_are_not_mixed(tmp_path: Path) -> None:
    """Of the index's three, one is there, and so is a whole set of two: nobody can tell which was meant."""
    model_dir(tmp_path, {INDEX: index(*OLD), **{name: tensor_file([name]) for name in (*SHARDS, OLD[2])}})
    message = refusal(tmp_path)
    assert f"{OLD[0]}: no such file" in message and f"'{SHARDS[0]}'" in message


def test_an_index_with_no_file_of_its_own(tmp_path: Path) -> None:
    model_dir(tmp_path, {INDEX: index(*OLD)})
    assert "3 of 3 files are missing; found: no .safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("beside", ["model.safetensors", *SHARDS])
def test_consolidated_weights_are_left_alone(beside: str, tmp_path: Path) -> None:
    files = dict.fromkeys([beside] if beside not in SHARDS else SHARDS, b"")
    files = {name: tensor_file([f"t{i}"], i) for i, name in enumerate(files)}
    model_dir(tmp_path, {**files, "consolidated.safetensors": tensor_file(["layers.0.wq"])})
    assert list(read(tmp_path)) == [f"t{i}" for i in range(len(files))]


def test_consolidated_weights_alone_are_named(tmp_path: Path) -> None:
    message = refusal(model_dir(tmp_path, {"consolidated.safetensors": tensor_file(["a"]), "params.json": {}}))
    assert "'consolidated.safetensors'" in message and "Mistral" in message


def test_a_tensor_in_another_shard_than_the_index_says_is_taken_from_there(tmp_path: Path) -> None:
    weight_map = {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    sharded(tmp_path, weight_map, one=tensor_file(["a"], 1), two=tensor_file(["b", "c"], 2))
    assert read(tmp_path) == {"a": 1, "b": 2, "c": 2}


def test_a_tensor_in_two_shards_but_not_where_the_index_says_is_refused(tmp_path: Path) -> None:
    weight_map = {"a": "three.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    shards = {"one": tensor_file(["a", "b"]), "two": tensor_file(["a", "c"]), "three": tensor_file(["d"])}
    sharded(tmp_path, weight_map, **shards)
    assert "'a' is not in three.safetensors" in refusal(tmp_path)


def test_the_index_decides_between_three_copies(tmp_path: Path) -> None:
    weight_map = {"a": "two.safetensors", "b": "one.safetensors", "c": "three.safetensors"}
    shards = {"one": tensor_file(["a", "b"], 1), "two": tensor_file(["a"], 2), "three": tensor_file(["a", "c"], 3)}
    sharded(tmp_path, weight_map, **shards)
    assert read(tmp_path) == {"a": 2, "b": 1, "c": 3}


def test_a_tensor_that_no_shard_has_makes_the_index_stale(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "bias": "one.safetensors"}, one=tensor_file(["a"]))
    message = refusal(tmp_path)
    assert "'bias' is not in one.safetensors" in message and "stale" in message and INDEX in message


def test_of_all_directories_only_whole_ones_are_chosen() -> None:
    """Against the rules one by one, over every set of six files, with and without an index."""
    everything = ["model.safetensors", *SHARDS, *OLD]
    for present in itertools.product([False, True], repeat=len(everything)):
        names = list(itertools.compress(everything, present))
        for named in ([], OLD, SHARDS):
            found = choose(names, {str(i): name for i, name in enumerate(named)} or None)
            whole = [s for s in (SHARDS, OLD) if set(s) <= set(names)]
            if named and set(named) <= set(names):
                wanted = named
            elif "model.safetensors" in names:
                wanted = ["model.safetensors"]
            elif set(named) & set(names):
                wanted = named  # to be reported as incomplete
            else:
                wanted = whole[0] if len(whole) == 1 else named
            assert found == wanted, (names, named)
