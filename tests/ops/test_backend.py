"""What `doctor` is told of MLX and its device, on machines unlike this one."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import pytest
from apple import metal

from runner.cli.doctor import check_mlx
from runner.errors import BackendError
from runner.ops import backend, device


def on(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[tuple[str, str, str, str | None]]:
    """The checks of a machine whose device has these settings."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    here = dataclasses.replace(device.current(), notice=None, fix=None, needs=None, **settings)
    monkeypatch.setattr(device, "current", lambda: here)
    return [(check.name, check.state, check.value, check.fix) for check in check_mlx(backend.describe())]


def test_a_mac_shows_what_its_gpu_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    checks = on(monkeypatch, metal=metal(15))
    assert ("memory", "ok", "17.2 GB, of which macOS gives the GPU 12.9 GB", None) in checks
    assert all(state == "ok" for _, state, _, _ in checks)


def test_m1_and_m2_are_advised_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Apple M1 imitates it: --dtype float16 is faster, where a model stays in its range"
    assert ("bfloat16", "note", text, None) in on(monkeypatch, metal=metal(13))


def test_a_virtual_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = dataclasses.replace(metal(0), chip="Apple Paravirtual device")
    assert ("gpu", "note", "a virtual machine's: slower than the Mac's own", None) in on(monkeypatch, metal=gpu)


@pytest.mark.parametrize(("said", "noted"), [(None, True), ("1", True), ("01", True), ("0", False), ("", False)])
def test_tf32_is_said_unless_it_is_off(monkeypatch: pytest.MonkeyPatch, said: str | None, noted: bool) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if said is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", said)
    found = [check for check in on(monkeypatch, tf32=True) if check[0] == "float32"]
    assert [fix for *_, fix in found] == (["export MLX_ENABLE_TF32=0"] if noted else [])


def test_a_mac_without_a_device_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> device.Device:
        raise BackendError("MLX finds no Metal device: this session is headless")

    monkeypatch.setattr(device, "current", none)
    (check,) = check_mlx(backend.describe())
    assert (check.state, check.fix) == ("missing", None) and "no Metal device" in check.value
