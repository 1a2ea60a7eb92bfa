"""What is asked of an Apple GPU, and the wired limit; a stand-in has its facts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from apple import Limit, metal

from runner.errors import BackendError
from runner.ops import metal as seam
from runner.ops.device import current
from runner.ops.metal import Wired

GB = 1 << 30
INFO = {
    "device_name": "Apple M1 Pro",
    "architecture": "applegpu_g13s",
    "max_recommended_working_set_size": 11 * GB,
    "memory_size": 16 * GB,
}


def info(**more: Any) -> Any:
    return lambda device: {**INFO, **more}


@pytest.fixture
def a_mac(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mx, "device_info", info())
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    return monkeypatch


def test_there_is_none_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert seam.find() is None


@pytest.mark.parametrize(
    ("architecture", "generation", "bfloat16", "tf32"),
    [
        ("applegpu_g13g", 13, False, False),
        ("applegpu_g14d", 14, False, False),
        ("applegpu_g15s", 15, True, False),
        ("applegpu_g16p", 16, True, False),
        ("applegpu_g17g", 17, True, True),
        ("unheard-of", 0, True, False),
    ],
)
def test_a_chip_is_known_by_its_generation(
    a_mac: pytest.MonkeyPatch, architecture: str, generation: int, bfloat16: bool, tf32: bool
) -> None:
    a_mac.setattr(mx, "device_info", info(architecture=architecture))
    found = seam.find()
    assert found is not None and (found.generation, found.bfloat16, found.tf32) == (generation, bfloat16, tf32)
    assert (found.chip, found.working_set, found.memory) == ("Apple M1 Pro", 11 * GB, 16 * GB)
    device = current()
    assert device.metal == found and device.tf32 is tf32
    assert (device.chunk, device.keeps, device.name) == (1024, 0, "MLX's GPU kernels")


def test_a_mac_without_a_device_is_said_to_have_none(a_mac: pytest.MonkeyPatch) -> None:
    """As in MLX's load_device, where a session is headless or in a sandbox; its CPU arrays need the device too."""

    def none(device: mx.Device) -> dict[str, Any]:
        raise RuntimeError("[metal::load_device] No Metal device available.")

    a_mac.setattr(mx, "device_info", none)
    with pytest.raises(BackendError, match="no Metal device: this session is headless, in a sandbox"):
        current()
    a_mac.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    with pytest.raises(BackendError, match="no Metal device"):
        current()


def test_on_its_cpu_a_mac_has_no_gpu_to_wire_for(a_mac: pytest.MonkeyPatch) -> None:
    a_mac.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    device = current()
    assert device.metal is None and device.chunk == 512 and device.keeps is None


def test_notes_on_a_model() -> None:
    assert metal(14).notes(GB, mx.bfloat16, float16=True) == [
        "Apple M2 has no bfloat16 in hardware: dtype float16 is faster"
    ]
    for quiet in (
        metal(15).notes(GB, mx.bfloat16, float16=True),
        metal(14).notes(GB, mx.float16, float16=True),
        metal(13).notes(GB, mx.bfloat16, float16=False),  # Gemma's activations do not fit into it
    ):
        assert quiet == []
    assert metal(16, working_set=10 * GB).notes(9 * GB - 1, mx.bfloat16, float16=True) == []
    (full,) = metal(16, working_set=10 * GB).notes(9 * GB, mx.bfloat16, float16=True)
    assert "take 9.7 GB of the 10.7 GB" in full and "iogpu.wired_limit_mb" in full


def test_the_limit_is_raised_by_the_first_and_put_back_by_the_last() -> None:
    limit, wired = Limit(start=5), Wired()
    gpu, one, two = metal(limit=limit, working_set=100), object(), object()
    wired.hold(one, gpu, 40)
    wired.hold(two, gpu, 60)
    wired.release(one, gpu)
    assert limit.said == [40, 60]  # the other still runs
    wired.release(one, gpu)
    wired.release(two, gpu)
    assert limit.said == [40, 60, 5]
    wired.hold(one, gpu, 30)
    wired.release(one, gpu)
    assert limit.said[3:] == [30, 5]


def test_the_limit_stays_within_the_working_set_and_above_the_programs_own() -> None:
    limit, wired = Limit(), Wired()
    gpu = metal(limit=limit, working_set=100)
    wired.hold(wired, gpu, 1000)
    assert limit.now == 100
    wired.release(wired, gpu)
    own, wired = Limit(start=80), Wired()
    wired.hold(wired, metal(limit=own, working_set=100), 40)
    assert own.now == 80
    wired.release(wired, metal(limit=own))
    assert own.now == 80
