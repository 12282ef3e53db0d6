"""The torch step on a GPU, wherever there is one."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from services.inference.engine.model.cuda_step import CudaStep
from services.inference.engine.model.loader import load_weights
from services.inference.engine.model.torch_step import TorchStep
from services.inference.engine.step import StepRow
from tests.framework.models import FAMILY_MODELS, FAMILY_VOCAB_TOKENS
from tests.framework.step_driver import StepDriver

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the CUDA step was not tried"),
]

PAGES = 64
EOS = 2


def random_prompts(seed: int, *lengths: int) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(3, FAMILY_VOCAB_TOKENS) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts(1, 1, 17, 40, 70, 130)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_float32_is_what_transformers_and_the_oracle_compute(
    family_models: dict[str, Path], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    weights = load_weights(family_models[name], "float32")
    step = CudaStep(weights, pages=PAGES)
    oracle = TorchStep(weights, pages=PAGES)
    for own, other in zip(
        StepDriver(step, Random(1)).logits(PROMPTS), StepDriver(oracle).logits(PROMPTS), strict=True
    ):
        np.testing.assert_allclose(own, other, atol=5e-3)
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(family_models[name], dtype=torch.float32).cuda()
    expected = []
    for tokens in PROMPTS:
        ids = torch.tensor([tokens], device="cuda")
        out = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
        expected.append(out[0, len(tokens) :].tolist())
    assert StepDriver(step).greedy(PROMPTS, 24, eos=EOS) == expected
    assert StepDriver(step, Random(2)).greedy(PROMPTS, 24, eos=EOS) == expected
    assert step._graphs, "decode steps were captured"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_is_close_to_float32(family_models: dict[str, Path], name: str) -> None:
    step = CudaStep(load_weights(family_models[name], "bfloat16"), pages=PAGES)
    exact = TorchStep(load_weights(family_models[name], "float32"), pages=PAGES)
    own = np.concatenate(StepDriver(step, Random(3)).logits(PROMPTS))
    reference = np.concatenate(StepDriver(exact).logits(PROMPTS))
    assert np.abs(own - reference).mean() < 0.25 * reference.std()
    assert "bfloat16" in step.numerics
    assert "graphs" in step.numerics


def test_a_captured_step_computes_what_a_launched_one_does(
    family_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CudaStep(load_weights(family_models["qwen2-sliding"], "float32"), pages=PAGES)
    captured = StepDriver(step, Random(4)).greedy(PROMPTS, 30)
    count = len(step._graphs)
    assert count
    StepDriver(step, Random(4)).greedy(PROMPTS, 30)
    assert len(step._graphs) == count, "the same steps need no new graphs"
    monkeypatch.setattr("services.inference.engine.model.cuda_step._GRAPH_NUMBERS", 0)
    assert StepDriver(step, Random(4)).greedy(PROMPTS, 30) == captured


def test_the_pool_is_sized_by_what_is_free(family_models: dict[str, Path]) -> None:
    weights = load_weights(family_models["llama"], "bfloat16")
    small = CudaStep.sized(weights, max_pages=40, max_step_tokens=64, max_rows=8)
    assert small.pages == 40
    expected = StepDriver(TorchStep(weights, pages=40)).logits(PROMPTS[:2])
    for own, other in zip(StepDriver(small).logits(PROMPTS[:2]), expected, strict=True):
        assert np.abs(own - other).mean() < 0.25 * other.std()
    free, _ = torch.cuda.mem_get_info()
    del small
    large = CudaStep.sized(weights, max_pages=1 << 60, max_step_tokens=64, max_rows=8)
    assert large._pool.nbytes < free
    assert torch.cuda.mem_get_info()[0] > 0


def test_nan_of_others_reaches_nobody(family_models: dict[str, Path]) -> None:
    step = CudaStep(load_weights(family_models["llama"], "float32"), pages=PAGES)
    expected = step.run([StepRow(PROMPTS[1], 0, [0, 1], 1)]).copy()
    with torch.inference_mode():
        step._pool[:, :, :PAGES] = float("nan")
    assert np.allclose(step.run([StepRow(PROMPTS[1], 0, [4, 9], 1)]), expected, atol=1e-4)
    decoded = step.run([StepRow((5,), len(PROMPTS[1]), [4, 9], 1)])
    assert np.isfinite(decoded).all()
