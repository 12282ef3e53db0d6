"""Randomness by counter: the number of a token is a pure function of (seed, choice, position).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over the
rows of a step. There is no generator and no state, so a token is the same alone, in a batch and after a
failover. The definition is part of the platform's contract between replicas; changing it changes
`numerics_id`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Words = npt.NDArray[np.uint64]


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """Four 32-bit words (in 64-bit arrays) from four words of counter and two of key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(
    seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits for each row.

    `seeds` are unsigned 64-bit numbers, `choices` begin at 0, `positions` count the tokens that were
    generated before. The key is the seed; the counter is (position, choice, 0).
    """
    seed = np.asarray(seeds, dtype=np.uint64)
    choice = np.asarray(choices, dtype=np.uint64)
    position = np.asarray(positions, dtype=np.uint64)
    counter = (position & _LOW, position >> _SHIFT, choice & _LOW, np.zeros_like(choice))
    high, low, _, _ = philox4x32(counter, (seed & _LOW, seed >> _SHIFT))
    bits = (high << np.uint64(21)) | (low >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53
