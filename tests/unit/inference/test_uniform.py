"""Randomness by counter: the published generator, the same number in every batch, uniform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.uniform import philox4x32, uniforms

seeds = st.integers(0, 2**64 - 1)


# Random123's own vectors (kat_vectors, philox4x32 with 10 rounds).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_is_philox(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox4x32(
        [np.array([word], dtype=np.uint64) for word in counter],
        [np.array([word], dtype=np.uint64) for word in key],
    )
    assert tuple(int(word[0]) for word in words) == expected


def test_the_numbers_are_these() -> None:
    """Replicas of two versions must agree; another definition needs another numerics_id."""
    found = uniforms([0, 1, 2**64 - 1, 5], [0, 0, 3, 1], [0, 7, 2**40, 0])
    assert found.tolist() == [
        0.3990464708489645,
        0.48069244564219105,
        0.031276435920603696,
        0.3874756219628346,
    ]


@given(st.lists(st.tuples(seeds, st.integers(0, 7), st.integers(0, 2**40)), min_size=1, max_size=8))
def test_a_rows_number_does_not_depend_on_its_neighbours(rows: list[tuple[int, int, int]]) -> None:
    together = uniforms(*map(list, zip(*rows, strict=True)))
    alone = [float(uniforms([seed], [choice], [position])[0]) for seed, choice, position in rows]
    assert together.tolist() == alone
    assert all(0 <= number < 1 for number in alone)


def test_the_numbers_are_uniform() -> None:
    count = 20_000
    found = uniforms([9] * count, [0] * count, range(count))
    assert abs(found.mean() - 0.5) < 0.01
    assert np.bincount((found * 10).astype(int), minlength=10).min() > 0.9 * count / 10
