"""NVIDIA's driver without a GPU: what is asked of it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from runner.errors import BackendError
from runner.ops.cuda.driver import Driver


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_memory_that_mlx_keeps_is_asked_back(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows nothing of what MLX holds of freed buffers."""
    asked: list[str] = []

    def do(name: str, *arguments: Any) -> None:
        asked.append(name)
        if name == "cuMemAlloc_v2" and asked.count(name) <= fails:
            raise BackendError("out of memory")

    driver = object.__new__(Driver)
    monkeypatch.setattr(driver, "_do", do, raising=False)
    monkeypatch.setattr(mx, "clear_cache", lambda: asked.append("clear"))
    if fails == 2:
        with pytest.raises(BackendError, match="out of memory"):
            driver.allocate(64)
        return
    driver.allocate(64)
    assert asked[: 1 + 2 * fails] == ["cuMemAlloc_v2", *["clear", "cuMemAlloc_v2"] * fails]
