"""What an Apple GPU is and can be told beyond MLX's arrays: the one place that knows Metal, for tests to stand in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from runner.errors import BackendError

LARGE = 1 << 30
"""Bytes of weights from which memory is wired: macOS leaves less alone by itself."""

MARGIN = 512 << 20
"""Bytes wired beyond weights and cache: a chunk's activations, and the buffers that MLX keeps for the next token."""

NEARLY_FULL = 0.9
"""Share of the working set from which a model is said to be slow: mlx-lm's."""


@dataclass(frozen=True)
class Metal:
    """An Apple GPU.

    Attributes:
        chip: its name, as in "Apple M2 Pro".
        generation: the number in its architecture: 13 for M1, 14 M2, 15 M3, 16 M4, 17 M5; 0 where it is unknown.
        working_set: bytes that macOS recommends a GPU to use at once; most of the memory.
        memory: bytes of the machine.
        set_wired_limit: sets how many bytes macOS must not move away, and returns what was set before; at most
            `working_set`. Not to be called while something is computed.
    """

    chip: str
    generation: int
    working_set: int
    memory: int
    set_wired_limit: Callable[[int], int] = mx.set_wired_limit

    @property
    def bfloat16(self) -> bool:
        """Whether the chip computes in bfloat16; M1 and M2 imitate it."""
        return self.generation not in (13, 14)

    @property
    def tf32(self) -> bool:
        """Whether MLX multiplies float32 matrices in TF32, unless MLX_ENABLE_TF32=0: from M5 on."""
        return self.generation >= 17

    @property
    def virtual(self) -> bool:
        """Whether it is a virtual machine's."""
        return self.chip == "Apple Paravirtual device"

    def notes(self, weights: int, dtype: mx.Dtype, *, float16: bool) -> list[str]:
        """Sentences for the user of a model with `weights` bytes that computes in `dtype`.

        Args:
            float16: whether the model can compute in float16.
        """
        found = []
        if dtype == mx.bfloat16 and not self.bfloat16 and float16:
            found.append(f"{self.chip} has no bfloat16 in hardware: dtype float16 is faster")
        if weights >= NEARLY_FULL * self.working_set:
            found.append(
                f"the weights take {weights / 1e9:.1f} GB of the {self.working_set / 1e9:.1f} GB that macOS gives the "
                "GPU: answers can be slow; fewer bits, or a higher limit (sudo sysctl iogpu.wired_limit_mb=...), help"
            )
        return found


def find() -> Metal | None:
    """The GPU of this Mac; None where MLX is not built for Macs.

    Raises:
        BackendError: there is no GPU to be reached. MLX allocates with it, so that nothing runs on the CPU either.
    """
    if not mx.metal.is_available():
        return None
    try:
        info = mx.device_info(mx.Device(mx.gpu))
    except RuntimeError as error:
        raise BackendError(
            "MLX finds no Metal device: this session is headless, in a sandbox, or in a virtual machine without a GPU; "
            "run it in a session of a user who is logged in at the Mac, outside the sandbox"
        ) from error
    generation = re.search(r"_g(\d+)", str(info["architecture"]))
    return Metal(
        str(info["device_name"]),
        int(generation[1]) if generation else 0,
        int(info["max_recommended_working_set_size"]),
        int(info["memory_size"]),
    )


class Wired:
    """The wired limit while answers are under way: raised with the first, put back with the last.

    MLX has one for the process. It is changed by jobs of the thread that owns the device alone, which do not overlap.
    """

    def __init__(self) -> None:
        self._holders: set[int] = set()
        self._limit = 0
        self._before = 0

    def hold(self, holder: object, metal: Metal, nbytes: int) -> None:
        """Have at least `nbytes` wired, as far as they are recommended, until `holder` is given to `release`."""
        limit = min(nbytes, metal.working_set)
        mx.synchronize()
        if not self._holders:
            self._before = metal.set_wired_limit(limit)
            self._limit = limit
            limit = max(limit, self._before)  # a limit that the program has set is never lowered
        if limit > self._limit:
            metal.set_wired_limit(limit)
            self._limit = limit
        self._holders.add(id(holder))

    def release(self, holder: object, metal: Metal) -> None:
        """Put back what was set before the first `hold`, if `holder` is the last; nothing, if it holds nothing."""
        if id(holder) not in self._holders:
            return
        self._holders.remove(id(holder))
        if not self._holders:
            mx.synchronize()
            metal.set_wired_limit(self._before)
