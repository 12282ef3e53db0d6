"""Weights in quantised blocks: bit by bit what the dequantised weights give, under every schedule."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine.model.blocks import block_sizes, blocks_of, dequantise, quantise
from services.inference.engine.native.build import NativeUnavailable
from services.inference.engine.native.step import NativeStep
from services.inference.engine.step import StepRow
from services.inference.models import BLOCK_FORMATS, ModelUnusable
from tests.framework.blocks import dequantised, in_blocks, quantised
from tests.framework.native import Features, Sizes, native_library, random_tokens, random_weights
from tests.framework.step_driver import StepDriver

LENGTHS = (1, 5, 16, 17, 33, 70)
INSTRUCTION_SETS = ("avx512", "avx2", "portable")


def make(weights, **changes):
    return NativeStep(weights, native_library(), **({"pages": 40, "threads": 1} | changes))


def check(sizes, formats, *, seed=0, lengths=LENGTHS, **changes):
    """As the dequantised weights alone; mixed, cut and on two threads exactly as alone."""
    kinds = cycle(formats)
    weights = quantised(random_weights(sizes, seed=seed), lambda name: next(kinds))
    random = Random(seed)
    sequences = [random_tokens(random, sizes.vocab, length) for length in lengths]
    expected = StepDriver(make(dequantised(weights), **changes)).logits(sequences)
    found = StepDriver(make(weights, **changes, keys_and_values=torch.float32)).logits(sequences)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    alone = StepDriver(make(weights, **changes)).logits(sequences)
    mixed = StepDriver(make(weights, **(changes | {"threads": 2, "max_rows": 24})), random)
    for one, other in zip(alone, mixed.logits(sequences), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_r20_blocks_compute_what_their_numbers_do(kind, instruction_set):
    if instruction_set not in native_library().instruction_sets():
        pytest.skip(f"this machine has no {instruction_set}")
    sizes = Sizes(hidden=256, group=2, kv_heads=4, head_dim=32, ffn=512, vocab=133)
    check(sizes, [kind], instruction_set=instruction_set)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    hidden=st.sampled_from([32, 96, 256, 320]),
    group=st.integers(1, 4),
    ffn=st.sampled_from([32, 160, 288]),
    vocab=st.integers(2, 100),
    tied=st.booleans(),
    formats=st.lists(st.sampled_from(["Q8_0", "Q4_0", "Q4_1", "float32"]), min_size=1, max_size=7),
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_r20_formats_mix_within_a_model(hidden, group, ffn, vocab, tied, formats, seed, lengths):
    sizes = Sizes(
        hidden=hidden,
        group=group,
        kv_heads=2,
        head_dim=16,
        ffn=ffn,
        vocab=vocab,
        features=Features(tied=tied),
    )
    check(sizes, formats, seed=seed, lengths=lengths)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 7, 12, 13, 32])
def test_r20_any_number_of_neighbours_changes_nothing(rows):
    sizes = Sizes(hidden=96, ffn=64, head_dim=32)
    step = make(quantised(random_weights(sizes), lambda name: "Q4_1"), pages=rows, threads=2)

    def row(index):
        return StepRow([index + 1], 0, [index], 1)

    together = step.run([row(index) for index in range(rows)]).copy()
    for index in range(rows):
        np.testing.assert_array_equal(step.run([row(index)])[0], together[index])


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_FORMATS if kind != "Q4_K"])
def test_what_is_quantised_is_near(kind):
    matrix = random_weights(Sizes(hidden=256, ffn=100)).layers[0].gate_up
    error = (dequantise(quantise(matrix, kind)) - matrix).pow(2).mean().sqrt() / matrix.pow(2).mean().sqrt()
    assert error < (0.01 if kind == "Q8_0" else 0.12)


def test_blocks_that_make_no_sense_are_refused():
    data = quantise(torch.ones(4, 64), "Q8_0").data
    assert blocks_of(data, "Q8_0").shape == (4, 64)
    for content, name, said in (
        (data, "Q6_K", "Q6_K"),
        (data[:, :-1], "Q8_0", "no rows"),
        (data.to(torch.int32), "Q8_0", "no rows"),
    ):
        with pytest.raises(ModelUnusable, match=said):
            blocks_of(content, name)
    spoiled = data.clone()
    spoiled[2, :2] = torch.tensor([torch.inf], dtype=torch.float16).view(torch.uint8)
    with pytest.raises(ModelUnusable, match="not a number"):
        blocks_of(spoiled, "Q8_0")


def test_a_matrix_of_another_size_reaches_no_kernel():
    weights = quantised(random_weights(Sizes(hidden=64, ffn=64, head_dim=64)), lambda name: "Q4_0")
    wrong = replace(weights.layers[0], down=(in_blocks(torch.zeros(64, 96), "Q4_0"),))
    with pytest.raises(NativeUnavailable, match="down"):
        make(replace(weights, layers=(wrong, weights.layers[1])))


def test_numerics_name_the_formats():
    kinds = {"embedding": "Q8_0", "value": "Q4_1"}
    sizes = Sizes(hidden=64, ffn=64, head_dim=64)
    weights = quantised(random_weights(sizes), lambda name: kinds.get(name, "Q4_0"))
    best = native_library().instruction_sets()[0]
    assert make(weights).numerics == f"native-2/Q4_0+Q4_1+Q8_0/{best}"
    assert block_sizes("Q4_K") == (256, 144)
