"""The native step: against the definition in float64, and against itself under every schedule."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine.native.build import NativeUnavailable
from services.inference.engine.native.step import NativeStep, page_bytes, usable_cores
from services.inference.engine.step import PAGE_TOKENS, StepRow
from tests.framework.native import (
    Features,
    Sizes,
    expected_logits,
    native_library,
    random_tokens,
    random_weights,
    with_features,
)
from tests.framework.step_driver import StepDriver

EVERYTHING = Features(
    bias=True,
    head_norms=True,
    post_norms=True,
    tied=False,
    activation="gelu_tanh",
    embedding_scale=3.0,
    attention_softcap=5.0,
    logit_softcap=10.0,
    windows=(0, 20, 7),
    ropes=(0, 1, -1),
)
ONE_BY_ONE = [
    {"bias": True},
    {"head_norms": True},
    {"post_norms": True},
    {"tied": False},
    {"activation": "gelu_tanh"},
    {"embedding_scale": 7.0},
    {"attention_softcap": 2.0},
    {"logit_softcap": 3.0},
    {"windows": (9, 0)},
    {"windows": (16, 1)},
    {"ropes": (1, -1)},
]
DTYPES = [torch.float32, torch.bfloat16]
# Of logits of about 5. What is left in bfloat16 are keys and values that lie between two of its numbers.
TOLERANCE = {torch.float32: 6e-5, torch.bfloat16: 2e-2}
LENGTHS = (1, 5, 16, 17, 33, 70)


def make(weights, **changes):
    return NativeStep(weights, native_library(), **({"pages": 40, "threads": 1} | changes))


def instruction_sets():
    return native_library().instruction_sets()


def check(sizes, dtype, *, seed=0, lengths=LENGTHS, **changes):
    """Alone as the definition has it; mixed, cut and on two threads exactly as alone."""
    random = Random(seed)
    weights = random_weights(sizes, seed=seed, dtype=dtype)
    sequences = [random_tokens(random, sizes.vocab, length) for length in lengths]
    alone = StepDriver(make(weights, **changes)).logits(sequences)
    for tokens, logits in zip(sequences, alone, strict=True):
        np.testing.assert_allclose(logits, expected_logits(weights, tokens), atol=TOLERANCE[dtype], rtol=0)
    mixed = StepDriver(make(weights, **(changes | {"threads": 2, "max_rows": 24})), random)
    for one, other in zip(alone, mixed.logits(sequences), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", ONE_BY_ONE, ids=str)
def test_each_feature_computes_what_it_should(features, dtype):
    check(with_features(Sizes(), **features), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "portable"])
def test_r20_each_instruction_set_is_exact_under_every_schedule(instruction_set, dtype):
    if instruction_set not in instruction_sets():
        pytest.skip(f"this machine has no {instruction_set}")
    sizes = Sizes(hidden=100, group=8, kv_heads=2, head_dim=32, ffn=77, vocab=133, features=EVERYTHING)
    check(sizes, dtype, instruction_set=instruction_set)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.builds(
        Sizes,
        hidden=st.integers(1, 150),
        group=st.integers(1, 8),
        kv_heads=st.integers(1, 3),
        head_dim=st.sampled_from([16, 32, 48, 64, 80, 128, 256]),
        ffn=st.integers(1, 150),
        vocab=st.integers(2, 200),
        features=st.sampled_from([Features(), EVERYTHING]),
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_odd_shapes(sizes, dtype, seed, lengths):
    check(sizes, dtype, seed=seed, lengths=lengths)


@pytest.mark.parametrize("rows", [*range(1, 15), 32, 50])
def test_r20_any_number_of_neighbours_changes_nothing(rows):
    weights = random_weights(Sizes(hidden=70, ffn=90))
    random = Random(rows)
    prompts = [random_tokens(random, 50, random.randint(1, 30)) for _ in range(rows)]
    step = make(weights, pages=3 * rows, threads=2)

    def row(index, tokens, position):
        return StepRow(tokens, position, range(3 * index, 3 * index + 3), 1)

    step.run([row(index, tokens, 0) for index, tokens in enumerate(prompts)])
    together = step.run([row(index, [7], len(tokens)) for index, tokens in enumerate(prompts)]).copy()
    for index, tokens in enumerate(prompts):
        np.testing.assert_array_equal(step.run([row(index, [7], len(tokens))])[0], together[index])


def test_r20_a_neighbour_that_overflows_spoils_nothing():
    """What is not a number stays in its own sequence, also where its pages are given on."""
    weights = random_weights(Sizes())
    hostile = random_weights(Sizes())
    hostile.embedding[13] = torch.inf
    tokens, pages = [1, 2, 3, 4, 5], [2]
    alone = make(weights).run([StepRow(tokens, 0, pages, 5)]).copy()
    step = make(hostile)
    spoiled = step.run([StepRow([13] * 30, 0, [2, 3], 1)])
    assert np.isnan(spoiled).any()
    beside = step.run([StepRow(tokens, 0, pages, 5), StepRow([13] * 20, 0, [4, 5], 1)])
    finite = np.isfinite(alone) & np.isfinite(beside[:5])
    np.testing.assert_array_equal(alone[finite], beside[:5][finite])
    assert finite[:, [token for token in range(50) if token != 13]].all()


def test_which_logits_are_wanted():
    weights = random_weights(Sizes())
    step = make(weights, max_rows=4)
    all_of_them = step.run([StepRow(range(10), 0, [3], 10)]).copy()
    some = step.run([StepRow(range(10), 0, [3], 3), StepRow(range(9), 0, [4], 0), StepRow([9], 9, [3], 1)])
    np.testing.assert_array_equal(some, all_of_them[[7, 8, 9, 9]])
    assert step.run([StepRow([1], 0, [0], 0)]).shape == (0, 50)
    assert step.run([]).shape == (0, 50)


def test_a_shared_page_is_read_by_both():
    weights = random_weights(Sizes())
    step = make(weights)
    prefix, ends = list(range(16)), ([1, 2, 3], [4])
    alone = StepDriver(make(weights)).logits([prefix + end for end in ends])
    step.run([StepRow(prefix, 0, [9], 0)])
    both = step.run([StepRow(ends[0], 16, [9, 1], 1), StepRow(ends[1], 16, [9, 2], 1)])
    np.testing.assert_array_equal(both, [alone[0][-1], alone[1][-1]])


@pytest.mark.parametrize(
    "row",
    [
        StepRow([50], 0, [0], 1),
        StepRow([-1], 0, [0], 1),
        StepRow([1], 0, [40], 1),
        StepRow([1], 0, [-1], 1),
        StepRow([1], 16, [0], 1),
        StepRow([1], 256, list(range(20)), 1),
        StepRow([1], -1, [0], 1),
        StepRow([1], 0, [0], 2),
        StepRow([], 0, [0], 0),
    ],
)
def test_r16_a_bad_index_reaches_no_kernel(row):
    step = make(random_weights(Sizes()))
    fine = StepRow([1, 2], 0, [5], 1)
    before = step.run([fine]).copy()
    with pytest.raises(ValueError, match=r"\d"):
        step.run([StepRow([9], 0, [5], 1), row])
    np.testing.assert_array_equal(step.run([StepRow([2], 1, [5], 1)]), before)


def test_pages_cost_nothing_until_they_are_written():
    weights = random_weights(Sizes())
    size = page_bytes(weights.shape, torch.float32)
    assert size == 2 * 2 * 16 * PAGE_TOKENS * 4
    step = make(weights, pages=2**36 // size)  # 64 GiB
    last = step.pages - 1
    assert np.isfinite(step.run([StepRow([1], 0, [last], 1)])).all()


def test_numerics_name_what_computes():
    float32, bfloat16 = (random_weights(Sizes(), dtype=dtype) for dtype in DTYPES)
    names = {
        make(weights, instruction_set=name).numerics
        for weights in (float32, bfloat16)
        for name in instruction_sets()
    }
    assert len(names) == 2 * len(instruction_sets())
    assert make(float32).numerics == f"native-2/float32/{instruction_sets()[0]}"


def test_what_is_not_supported_is_said():
    weights = random_weights(Sizes())
    with pytest.raises(NativeUnavailable, match="heads of 16"):
        make(replace(weights, shape=replace(weights.shape, head_dim=24)))
    with pytest.raises(NativeUnavailable, match="float16"):
        make(replace(weights, head=weights.head.half()))
    with pytest.raises(NativeUnavailable, match="down"):
        make(replace(weights, layers=(replace(weights.layers[0], down=weights.head), weights.layers[1])))
    with pytest.raises(NativeUnavailable, match="cannot run mmx"):
        make(weights, instruction_set="mmx")


def test_a_closed_step_says_so():
    step = make(random_weights(Sizes()))
    step.close()
    with pytest.raises(ValueError, match="closed"):
        step.run([StepRow([1], 0, [0], 1)])


def test_cores_follow_the_quota(tmp_path):
    quota = tmp_path / "cpu.max"
    everything = usable_cores(quota)
    assert everything >= 1
    quota.write_text("max 100000\n")
    assert usable_cores(quota) == everything
    quota.write_text("50000 100000\n")
    assert usable_cores(quota) == 1
