"""The torch step: transformers' numbers, and the same bits however sequences are put together."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine.model.attention import attend_fused
from services.inference.engine.model.loader import load_weights
from services.inference.engine.model.torch_step import TorchStep, page_bytes
from services.inference.engine.step import PAGE_TOKENS, Logits, StepRow
from tests.framework.models import FAMILY_MODELS, FAMILY_VOCAB_TOKENS
from tests.framework.step_driver import StepDriver

PAGES = 48
EOS = 2
MAX_TOKENS = 12
BF16_TOLERANCE = 0.08
"""Of the mean difference between our bf16 logits and transformers', in standard deviations of the logits."""


def random_prompts(seed: int, *lengths: int) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(3, FAMILY_VOCAB_TOKENS) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts(1, 1, 17, 40, 70, 130)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def steps(family_models: dict[str, Path]) -> dict[str, TorchStep]:
    return {
        name: TorchStep(load_weights(path, "float32"), pages=PAGES) for name, path in family_models.items()
    }


def theirs(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def their_logits(model: Any, prompts: list[list[int]]) -> list[Logits]:
    with torch.inference_mode():
        return [model(torch.tensor([tokens])).logits[0].float().numpy() for tokens in prompts]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_float32_is_what_transformers_computes(
    family_models: dict[str, Path], steps: dict[str, TorchStep], name: str
) -> None:
    model, step = theirs(family_models[name], torch.float32), steps[name]
    for own, other in zip(StepDriver(step).logits(PROMPTS), their_logits(model, PROMPTS), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-3)
    expected = [
        model.generate(torch.tensor([tokens]), do_sample=False, max_new_tokens=MAX_TOKENS, pad_token_id=0)
        for tokens in PROMPTS
    ]
    continuations = [out[0, len(tokens) :].tolist() for out, tokens in zip(expected, PROMPTS, strict=True)]
    assert StepDriver(step, Random(2)).greedy(PROMPTS, MAX_TOKENS, eos=EOS) == continuations


@pytest.mark.parametrize("name", ["llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_bfloat16_is_close_to_what_transformers_computes(family_models: dict[str, Path], name: str) -> None:
    prompts = PROMPTS[:4]
    step = TorchStep(load_weights(family_models[name], "bfloat16"), pages=PAGES)
    assert "bfloat16" in step.numerics
    reference = np.concatenate(their_logits(theirs(family_models[name], torch.bfloat16), prompts))
    own = np.concatenate(StepDriver(step).logits(prompts))
    exact = np.concatenate(their_logits(theirs(family_models[name], torch.float32), prompts))
    assert np.abs(own - reference).mean() < BF16_TOLERANCE * exact.std()
    # Both round; ours must not be the worse one.
    assert np.abs(own - exact).mean() < 1.2 * np.abs(reference - exact).mean()


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gemma2", "gemma3_text"])
@settings(max_examples=4, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_r20_a_sequence_is_the_same_alone_and_among_any_others(
    steps: dict[str, TorchStep], name: str, seed: int
) -> None:
    random = Random(seed)
    step = steps[name]
    assert step.exact_replay, step.numerics
    prompts = random_prompts(seed, *(random.randint(1, 90) for _ in range(7)))
    alone = StepDriver(step).logits(prompts)
    mixed = StepDriver(step, random).logits(prompts)
    for index, (one, other) in enumerate(zip(alone, mixed, strict=True)):
        assert np.array_equal(one, other), f"seed {seed}, sequence {index}"


def test_bfloat16_is_exact_too_where_it_says_so(family_models: dict[str, Path]) -> None:
    step = TorchStep(load_weights(family_models["qwen3"], "bfloat16"), pages=PAGES)
    prompts = random_prompts(4, 30, 66, 5)
    alone, mixed = StepDriver(step).logits(prompts), StepDriver(step, Random(4)).logits(prompts)
    same = all(np.array_equal(one, other) for one, other in zip(alone, mixed, strict=True))
    assert same or not step.exact_replay


def test_two_threads_compute_what_one_does(
    family_models: dict[str, Path], steps: dict[str, TorchStep]
) -> None:
    prompts = random_prompts(5, 70, 9)
    alone = StepDriver(steps["gemma2"]).logits(prompts)
    torch.set_num_threads(2)
    step = TorchStep(load_weights(family_models["gemma2"], "float32"), pages=PAGES)
    assert step.numerics == steps["gemma2"].numerics
    assert step.exact_replay
    for one, other in zip(alone, StepDriver(step, Random(5)).logits(prompts), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_others_left_in_a_page_reaches_nobody(steps: dict[str, TorchStep], name: str) -> None:
    """The pool is filled with NaN: one that is read, even under a mask, spoils a sum."""
    step = steps[name]
    expected = StepDriver(step).logits(PROMPTS[2:4])
    with torch.inference_mode():
        step._pool[:, :, :PAGES] = float("nan")
        step._pool[:, :, PAGES + 1] = float("nan")
    for one, other in zip(expected, StepDriver(step, Random(6)).logits(PROMPTS[2:4]), strict=True):
        assert np.array_equal(one, other)


def test_an_outlier_stays_in_its_row(family_models: dict[str, Path]) -> None:
    weights = load_weights(family_models["llama"], "float32")
    step = TorchStep(weights, pages=PAGES)
    quiet = [StepRow((7, 8, 9), 0, [0], 3)]
    expected = step.run(quiet).copy()
    weights.embedding[500] = float("nan")
    weights.embedding[501] = float("inf")
    weights.embedding[502] = 1e30
    hostile = [StepRow((500, 501), 0, [1], 2), *quiet, StepRow((502,) * 20, 0, [2, 3], 1)]
    assert np.array_equal(step.run(hostile)[2:5], expected)
    assert np.array_equal(step.run([StepRow((7, 8, 9), 0, [1], 3)]), expected), "the page was theirs"


def test_a_row_that_does_not_fit_is_refused_before_anything_is_written(steps: dict[str, TorchStep]) -> None:
    step = steps["qwen3"]
    good = StepRow((3, 4, 5), 0, [0], 1)
    step.run([good])
    before = step._pool.clone()
    bad_rows = [
        StepRow((FAMILY_VOCAB_TOKENS,), 3, [0], 1),
        StepRow((-1,), 3, [0], 1),
        StepRow((), 3, [0], 0),
        StepRow((1,), -1, [0], 1),
        StepRow((1,), PAGE_TOKENS, [0], 1),
        StepRow((1,), 3, [PAGES], 1),
        StepRow((1,), 3, [-1], 1),
        StepRow((1,), 3, [0], 2),
        StepRow((1,), step.context_tokens, [0] * 64, 1),
    ]
    for bad in bad_rows:
        with pytest.raises(ValueError, match=r"\w"):
            step.run([StepRow((9, 9, 9), 0, [0], 1), bad])
    assert torch.equal(torch.nan_to_num(step._pool), torch.nan_to_num(before))


def test_logits_come_for_what_was_asked_in_the_order_of_the_rows(steps: dict[str, TorchStep]) -> None:
    step = steps["llama"]
    first, second, third = random_prompts(8, 5, 17, 40)
    full = StepDriver(step).logits([first, second, third])
    out = step.run(
        [StepRow(first, 0, [0], 2), StepRow(second, 0, [1, 2], 0), StepRow(third, 0, [3, 4, 5], 5)]
    )
    assert out.dtype == np.float32
    assert np.array_equal(out, np.concatenate([full[0][-2:], full[2][-5:]]))
    assert step.run([StepRow(second, 0, [1, 2], 0)]).shape == (0, FAMILY_VOCAB_TOKENS)
    assert step.run([]).shape == (0, FAMILY_VOCAB_TOKENS)


def test_a_pool_is_as_large_as_its_pages(steps: dict[str, TorchStep]) -> None:
    step = steps["qwen3"]
    assert page_bytes(step.shape, torch.float32) * (PAGES + 2) == step._pool.nbytes
    assert page_bytes(step.shape, torch.bfloat16) * 2 == page_bytes(step.shape, torch.float32)


def test_a_pool_of_one_page_works(family_models: dict[str, Path], steps: dict[str, TorchStep]) -> None:
    step = TorchStep(load_weights(family_models["mistral"], "float32"), pages=1)
    assert step.exact_replay
    expected = StepDriver(steps["mistral"]).logits(PROMPTS[:1])
    assert np.array_equal(StepDriver(step).logits(PROMPTS[:1])[0], expected[0])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text"])
def test_a_plan_of_fixed_shapes_computes_the_same(steps: dict[str, TorchStep], name: str) -> None:
    """What a GPU captures as a graph; here it is computed as it is."""
    step = steps[name]
    ends = (3, 25, 70, 131, 90)
    prompts = random_prompts(9, *ends)
    pages = [list(range(index * 9, index * 9 + 9)) for index in range(len(ends))]
    step.run([StepRow(tokens, 0, own, 0) for tokens, own in zip(prompts, pages, strict=True)])

    def rows(several: range) -> list[StepRow]:
        return [StepRow((7 + index,), ends[index], pages[index], 1) for index in several]

    keys = set()
    for several in (range(5), range(1, 4), range(2, 5)):
        plan = step._planner.plan(rows(several), static=True)
        keys.add(plan.key())
        with torch.inference_mode():
            found = step._forward(plan.to(torch.device("cpu")))[: plan.logit_count].numpy()
        assert np.array_equal(found, step.run(rows(several)))
    assert len(keys) == 2, "three rows are padded to four in both, and the longest has as many blocks"


@pytest.mark.parametrize("floats", [1 << 12, 1 << 15])
def test_how_much_attends_at_once_changes_nothing(
    steps: dict[str, TorchStep], monkeypatch: pytest.MonkeyPatch, floats: int
) -> None:
    step = steps["qwen2-sliding"]
    expected = StepDriver(step).logits(PROMPTS)
    monkeypatch.setattr("services.inference.engine.model.plan._GROUP_FLOATS", floats)
    for one, other in zip(expected, StepDriver(step, Random(11)).logits(PROMPTS), strict=True):
        assert np.array_equal(one, other)


def test_torchs_own_attention_sums_the_same(
    steps: dict[str, TorchStep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU uses."""
    step = steps["qwen2-sliding"]
    expected = StepDriver(step).logits(PROMPTS)
    monkeypatch.setattr(step, "_attend", attend_fused)
    for one, other in zip(expected, StepDriver(step, Random(10)).logits(PROMPTS), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
