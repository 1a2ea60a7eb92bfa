"""Which rows of a scheduler begin with what was computed for others, and what becomes of their caches at the end."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.engine.loaded import Loaded
from runner.engine.prefix_tree import alike
from runner.engine.prefixes import Prefixes
from runner.engine.rows import Row

WORTH = 32
"""Tokens of a prompt that another row is about to read, from which on it is waited for: about what a pass costs."""


@dataclass(frozen=True)
class Disk:
    """A directory to keep prefixes in, and the bytes of all its files at most."""

    directory: Path
    limit: int


class Sharing:
    """The kept prefixes of one model, as its scheduler uses them. A part of the thread that owns the device."""

    def __init__(self, loaded: Loaded, budget: int, disk: Disk | None = None) -> None:
        """Keep `budget` bytes of prefixes in memory at most; 0: none.

        Raises:
            UsageError: the directory cannot be used.
        """
        self._loaded = loaded
        files = None
        if disk is not None:
            from runner.engine.prefix_files import PrefixFiles, fingerprint  # and NumPy, which not every answer needs

            files = PrefixFiles(disk.directory, disk.limit, fingerprint(loaded), loaded.new_caches())
        self.prefixes = Prefixes(loaded.new_caches, budget, files)

    def clear(self) -> None:
        """Let go of all in memory that no request uses."""
        self.prefixes.clear()

    def begin(self, row: Row) -> None:
        """Give a row caches, which hold as much of its ids as there is."""
        key = self._key(row)
        if key is None:
            row.begin(self._loaded.new_caches())
            return
        # Who wants the scores of a prompt has to read all of it.
        row.kept = self.prefixes.take(row.ids, key, row.order.turns, reuse=row.order.scores is None)
        row.begin(row.kept.caches)
        if not row.picked and not row.mailbox.read:
            row.mailbox.reused = row.kept.reused

    def stop(self, row: Row) -> int | None:
        """The next position at which the reading of a row should pause for `mark`."""
        places = () if row.kept is None else row.kept.places
        return min((place for place in places if place > row.offset), default=None)

    def mark(self, row: Row) -> None:
        """After a pass that read a piece of a row's prompt."""
        if row.kept is not None and row.offset in row.kept.places:
            self.prefixes.mark(row.kept)

    def leave(self, row: Row, *, sound: bool = True) -> None:
        """Keep what the caches of a row hold, before it lets go of them; not `sound`: after a pass that failed."""
        kept, row.kept = row.kept, None
        if kept is None:
            return
        if sound:
            self.prefixes.give(kept, row.ids)
        else:
            self.prefixes.drop(kept)

    def offered(self, row: Row) -> int:
        """Bytes that a row which begins would take from the kept prefixes, instead of making them anew."""
        key = self._key(row)
        return 0 if key is None or row.order.scores is not None else self.prefixes.offered(row.ids, key)

    def awaits(self, row: Row, live: Sequence[Row]) -> bool:
        """Whether a row should begin later: another one is reading what it begins with, too."""
        key = self._key(row)
        if key is None or row.order.scores is not None or not self.prefixes.budget:
            return False
        for other in live:
            if other.kept is None or other.order.scores is not None or not other.reading or self._key(other) != key:
                continue
            common = min(alike(row.ids, other.ids, 0), len(row.ids) - 1, len(other.ids) - 1)
            if other.offset < common and common - self.prefixes.reusable(row.ids, key) >= WORTH:
                other.kept.pause(common)
                return True
        return False

    def _key(self, row: Row) -> Hashable | None:
        """What else than its ids a row's rows depend on; None: nobody else can use them."""
        config = self._loaded.config
        border = config.rope_border
        if config.rope_depends_on_length and border is None:
            return None
        # LongRoPE's keys have frequencies of their own in prompts that are longer.
        return tuple(sorted(row.order.weights.items())), border is not None and row.prompt > border
