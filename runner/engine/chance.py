"""The random number of a draw: a function of the seed, which of several answers it is, and the token's position.

So neither other requests nor how a prompt was cut, an answer paused, or tokens guessed ahead can change a draw.
"""

from __future__ import annotations

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Four words of 32 bits that look random, for a counter of four and a key of two; all inputs give other outputs.
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (second >> 32) ^ b ^ k, second & _WORD, (first >> 32) ^ d ^ m, first & _WORD
        k, m = (k + _STEPS[0]) & _WORD, (m + _STEPS[1]) & _WORD
    return a, b, c, d


def chance(seed: int, choice: int, position: int) -> float:
    """A number from 0 up to but not including 1, of 53 random bits.

    Args:
        seed: below 2^64.
        choice: which of several answers to one prompt it is for, from 0 on.
        position: of the token that is drawn, in prompt and answer together.
    """
    words = philox((position & _WORD, position >> 32, choice & _WORD, choice >> 32), (seed & _WORD, seed >> 32))
    return float((words[0] >> 5 << 26) + (words[1] >> 6)) / 2**53
