"""Words about wrong keys and values of `config.json`: shortened values, and the key that was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence

MOST = 30
"""Items that one sentence lists. Names come from strangers' files: what is said of them does not grow with the file."""

MOST_UNKNOWN = 1000
"""Unknown keys of an object: each is compared with all that are known, and files with remarks of several programs have
some dozens."""


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The items in one sentence: of very many the first few, and how many more there are."""
    more = [f"{len(items) - MOST} more"] if len(items) > MOST else []
    return separator.join([*items[:MOST], *more])


def short(value: object) -> str:
    """`repr(value)`, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def misspelt(name: str, keys: Collection[str]) -> str | None:
    """The key that `name` is a slip of the finger away from; None if there is none.

    One letter too many, too few, changed or swapped with the next, and any difference in case, `_` or `-`. Short names
    are too near to others to tell.
    """
    plain = _plain(name)
    return next((key for key in sorted(keys) if len(key) > 5 and _one_step(plain, _plain(key))), None)


def _plain(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")


def _one_step(one: str, other: str) -> bool:
    """Whether at most one insertion, deletion, change or swap of neighbours leads from `one` to `other`."""
    if len(one) > len(other):
        one, other = other, one
    if len(other) - len(one) > 1:
        return False
    # Past the common start, what is left must be equal once the step is made.
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    if len(one) < len(other):
        return one[at:] == other[at + 1 :]
    swapped = one[at : at + 2] == other[at : at + 2][::-1] and one[at + 2 :] == other[at + 2 :]
    return one[at + 1 :] == other[at + 1 :] or swapped
