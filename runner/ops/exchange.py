"""What the processes of one run send each other: `mx.distributed`, in the few forms that a shared model needs.

Each process is a rank, from 0. In a pipeline a rank sends to the next one, and the last one to rank 0: a ring, and the
`ring` backend can send to neighbours only. MLX's `nccl` cannot send at all (0.32.4), only add and gather: there, what a
rank has is added to zeros of all others, who all take part in every such step, one after another.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

CODES = (mx.float32, mx.bfloat16, mx.float16)
"""Dtypes that hidden states may have, by the number that is sent for them."""


class Exchange:
    """One process's end of what ranks send each other.

    What is asked of it is asked by all ranks in the same order: each send waits for its receiver, and a sum for all.

    Attributes:
        rank: which of the processes this is.
        size: how many there are.
        sent: bytes that this process has sent, by what it was asked; those of a ring's inner steps included.
        apart: whether ranks talk on the CPU, as a ring's do, and compute on an NVIDIA GPU. What was begun on one of the
            two must then be there before it is used on the other, but for what one evaluation holds, within which MLX
            waits itself. Of what another evaluation has begun, the CPU would read what the GPU has not written yet; and
            the GPU would wait by a kernel that spins, and for whose end calls of CUDA wait (to free memory, to load a
            kernel) on the very thread that has to say that the CPU is done: for ever (MLX 0.32.4).
    """

    def __init__(self, rank: int, size: int, backend: str = "any", *, sends: bool = True) -> None:
        """`backend` and `sends` as in `runner.ranks.settings.Settings`."""
        self.rank = rank
        self.size = size
        self._backend = backend
        self._sends = sends
        self._group: Any = None
        self.apart = False
        self.reset()

    def reset(self) -> None:
        """Begin with another model: nothing of it has been sent yet."""
        self.sent = 0
        self._arriving: mx.Dtype | None = None  # of what the rank before sends, once that has been told
        self._told = False  # whether the next rank knows the dtype of what it is sent
        self._steps: dict[int, mx.Dtype] = {}  # what each rank passes on, where all take part

    def open(self) -> None:
        """Connect to the other ranks, as the environment says that `mx.launch` has made.

        Raises:
            RuntimeError: from MLX: a rank could not be reached, or there is no such environment.
        """
        if self._group is not None:
            return
        group = mx.distributed.init(strict=True, backend=self._backend)
        assert (group.rank(), group.size()) == (self.rank, self.size)
        self._group = group
        self.apart = self._sends and mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)

    def there(self, x: mx.array) -> mx.array:
        """`x`, waited for where it must not cross before (`apart`); its computation has begun on all ranks."""
        if self.apart:
            mx.eval(x)
        return x

    def agreed(self, here: bool) -> bool:
        """Whether it is so on all ranks."""
        count = mx.distributed.all_sum(mx.array([int(here)]), group=self._group)
        mx.eval(count)  # as in `arriving`
        return count.item() == self.size

    def word(self, content: bytes) -> bytes:
        """Rank 0's `content`, everywhere; of the other ranks' only the length counts."""
        own = mx.array(list(content if self.rank == 0 else bytes(len(content))), mx.int32)
        found = mx.distributed.all_sum(own, group=self._group)
        mx.eval(found)  # as in `arriving`
        return bytes(cast(list[int], found.tolist()))

    def onward(self, x: mx.array) -> mx.array:
        """Send `x` to the next rank, from now on; returns an array that is there when it has left."""
        after = (self.rank + 1) % self.size
        if not self._sends:
            leaving = self._step(self.rank, x)
            for giver in range(self.rank + 1, self.size if self.rank else 0):
                self._step(giver, x)
            return leaving
        if not self._told:
            self._told = True
            mx.async_eval(mx.distributed.send(mx.array([CODES.index(x.dtype)]), after, group=self._group))
        self.sent += x.nbytes
        leaving = mx.distributed.send(x, after, group=self._group)
        # Begun before anything is received: a receive that came first in the stream would wait for its own cause.
        mx.async_eval(leaving)
        return leaving

    def arriving(self, like: mx.array) -> mx.array:
        """What the rank before sends, of the shape of `like`; its dtype is what that one says before its first."""
        before = (self.rank - 1) % self.size
        if not self._sends:
            for giver in range(0 if self.rank else 1, before):
                self._step(giver, like)
            return self._step(before, like)
        if self._arriving is None:
            code = mx.distributed.recv((1,), mx.int32, before, group=self._group)
            mx.eval(code)  # which lets this process's other threads run while it waits, as `item` does not
            index = code.item()
            assert isinstance(index, int)
            self._arriving = CODES[index]
        return mx.distributed.recv(like.shape, self._arriving, before, group=self._group)

    def _step(self, giver: int, x: mx.array) -> mx.array:
        """The step of a pipeline in which rank `giver` passes on its `x`, of which for others only the shape counts.

        Returns what it has passed on. All ranks take part in all steps, from rank 0's on.
        """
        if giver not in self._steps:
            code = mx.array([CODES.index(x.dtype) if giver == self.rank else 0])
            code = mx.distributed.all_sum(code, group=self._group)
            mx.eval(code)  # as in `arriving`
            index = code.item()
            assert isinstance(index, int)
            self._steps[giver] = CODES[index]
        dtype = self._steps[giver]
        # Added as integers, every bit stays: as floats, a negative zero would not.
        own = (x if giver == self.rank else mx.zeros(x.shape, dtype)).view(mx.uint8)
        found = self.total(own)
        mx.async_eval(found)  # begun in this order on all ranks, also where nobody looks at it
        return found.view(dtype)

    def from_first(self, x: mx.array) -> mx.array:
        """`x` of rank 0, everywhere; of the other ranks, only its shape and dtype count."""
        found = self.total(self.there(x if self.rank == 0 else mx.zeros_like(x)))
        mx.async_eval(found)  # begun now: a later receive may be waited for before this result is needed
        return self.there(found)

    def total(self, x: mx.array) -> mx.array:
        """The sum of all ranks' `x`, the same bits for each of them."""
        self.sent += ring_bytes(x.nbytes, self.size)
        return mx.distributed.all_sum(x, group=self._group)

    def gathered(self, x: mx.array) -> mx.array:
        """All ranks' `x` `[..., n]`, in their order, along the last axis: `[..., size * n]`."""
        self.sent += x.nbytes * (self.size - 1)
        first = mx.moveaxis(x, -1, 0)
        return mx.moveaxis(mx.distributed.all_gather(mx.contiguous(first), group=self._group), 0, -1)


def ring_bytes(nbytes: int, size: int) -> int:
    """Bytes that each rank of a ring sends for a sum of `nbytes`: `size - 1` parts to add up, and as many of the sum.

    Source: bandwidth optimal all-reduce algorithms, Patarasuk and Yuan 2009 (doi:10.1016/j.jpdc.2008.09.002).
    """
    return 2 * (size - 1) * -(-nbytes // size)
