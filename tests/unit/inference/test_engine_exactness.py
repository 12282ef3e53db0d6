"""The whole engine on a model of each family: what transformers says, in every schedule; and cut anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from services.inference.engine import frames
from services.inference.engine.model.loader import load_weights
from services.inference.engine.model.torch_step import TorchStep
from services.inference.engine.native.parts import Weights
from services.inference.engine.native.step import NativeStep
from services.inference.engine.port import Sampling
from services.inference.engine.scheduler import ScheduleLimits
from services.inference.engine.step import Step
from services.inference.models import BLOCK_FORMATS
from tests.framework.blocks import quantised
from tests.framework.loop_bench import EOS, LoopBase, request
from tests.framework.models import FAMILY_MODELS, make_family_model
from tests.framework.native import native_library

PROMPTS = 40
MAX_TOKENS = 12
VOCAB_TOKENS = 300
SEED = 20
PAGES = 22
"""Fewer than six sequences need at their end: some are preempted."""
LIMITS = ScheduleLimits(max_running=6, max_prefill_tokens=24, min_prefill_tokens=8, lookup_tokens=6)
GREEDY = Sampling(temperature=0.0)
SEEDED = Sampling(seed=5, temperature=1.0, top_p=0.95, top_k=40, repetition_penalty=1.1)
NATIVE_SIZES = {"smollm3": {"hidden_size": 64}, "qwen3": {"head_dim": 32}}
"""The native step takes heads of a multiple of 16; smollm3 has hidden_size / heads."""
IN_BLOCKS = {"hidden_size": 64, "intermediate_size": 96}
"""Blocks need rows of a multiple of 32."""
ON_TORCH = ("llama", "gemma3_text")
"""The other families run on torch in test_torch_step, sequence by sequence."""


@cache
def prompts() -> list[list[int]]:
    """Of 1 to 100 tokens; some share a beginning."""
    print(f"seed {SEED}")
    random = Random(SEED)
    shared = [random.randrange(3, VOCAB_TOKENS) for _ in range(40)]
    found = []
    for number in range(PROMPTS):
        own = [random.randrange(3, VOCAB_TOKENS) for _ in range(random.randint(1, 60))]
        found.append(shared + own if number % 4 == 0 else own)
    return found


def generate(folder: Path) -> list[list[int]]:
    """transformers' greedy answers; prompts are padded on the left, which its masks make good."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    longest = max(map(len, prompts()))
    ids = torch.tensor([[EOS] * (longest - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts()])
    settings = {"do_sample": False, "max_new_tokens": MAX_TOKENS, "pad_token_id": EOS}
    output = model.generate(ids, attention_mask=mask, **settings)
    return [_until_eos(row) for row in output[:, longest:].tolist()]


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def native(folder: Path, weights: str = "float32", threads: int = 2) -> Step:
    """`weights`: their dtype, or the format of blocks that they are quantised to."""
    loaded: Weights
    if weights in BLOCK_FORMATS:
        loaded = quantised(load_weights(folder, "float32"), lambda name: weights)
    else:
        loaded = load_weights(folder, weights)
    return NativeStep(loaded, native_library(), pages=PAGES, threads=threads)


def torch_step(folder: Path, weights: str = "float32", threads: int = 0) -> Step:
    return TorchStep(load_weights(folder, weights), pages=PAGES)


STEPS: dict[str, Callable[..., Step]] = {"native": native, "torch": torch_step}


def text(prompt: list[int]) -> str:
    return " ".join(map(str, prompt))


def run(bench: LoopBase, requests: dict[int, Any], random: Random) -> None:
    """All of them, joining at random; now and then one that goes before its end."""
    waiting = list(requests)
    random.shuffle(waiting)
    while waiting:
        for number in [waiting.pop() for _ in range(min(len(waiting), random.randint(0, 3)))]:
            bench.loop.submit(number, requests[number])
            stray = 1000 + number
            bench.loop.submit(stray, replace(requests[number], sampling=SEEDED))
        bench.turn()
        bench.turn()
        bench.loop.cancel(1000 + random.randrange(PROMPTS))
    bench.run()


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_greedy_equals_generate_in_every_schedule(family: str, tmp_path: Path) -> None:
    """40 prompts, in joins, leaves, preemption, chunked prefill and prefix hits."""
    sizes = NATIVE_SIZES.get(family, {})
    folder = make_family_model(tmp_path / family, family, vocab_tokens=VOCAB_TOKENS, **sizes)
    expected = generate(folder)
    for name, make in STEPS.items():
        if name == "torch" and family not in ON_TORCH:
            continue
        bench = LoopBase(make(folder), limits=LIMITS)
        asked = {
            number: request(text(prompt), sampling=GREEDY, max_tokens=MAX_TOKENS)
            for number, prompt in enumerate(prompts())
        }
        run(bench, asked, Random(SEED))
        answers = [bench.tokens(number)[0] for number in asked]
        assert answers == expected, f"{name} differs"
        state = bench.loop.state
        assert state.preemptions > 0
        assert state.prefix_hit_tokens > 0


@pytest.mark.parametrize(
    ("step", "weights", "count"),
    [
        *[("native", weights, PROMPTS) for weights in ("float32", "bfloat16", "Q8_0", "Q4_1")],
        ("torch", "float32", 4),
    ],
)
def test_r05_prompts_cut_at_every_token_and_replayed(
    step: str, weights: str, count: int, tmp_path: Path
) -> None:
    """Greedy and seeded: what another replica goes on with is what the lost one would have said.

    40 prompts on what serves, and the replica has another number of threads; a few on the slower oracle.
    """
    folder = make_family_model(tmp_path / "model", "llama", vocab_tokens=VOCAB_TOKENS, **IN_BLOCKS)
    model, other = (STEPS[step](folder, weights, threads) for threads in (2, 1))
    if not model.exact_replay:
        pytest.skip(f"{model.numerics} does not promise an exact replay on this machine")
    asked = {
        number: request(
            text(prompts()[number // 2]), sampling=SEEDED if number % 2 else GREEDY, max_tokens=MAX_TOKENS
        )
        for number in range(2 * count)
    }
    whole = LoopBase(model, limits=LIMITS, keep_prefixes=False)
    run(whole, asked, Random(SEED))
    replica = LoopBase(other, limits=LIMITS, keep_prefixes=False)
    cuts = {}
    for number, each in asked.items():
        tokens = whole.tokens(number)[0]
        for cut in range(1, len(tokens)):
            job = number * 100 + cut + 10_000
            cuts[job] = tokens[cut:]
            replica.loop.submit(job, replace(each, delivered=(tuple(tokens[:cut]),)))
    replica.run()
    assert len(cuts) > count * MAX_TOKENS / 2
    for job, rest in cuts.items():
        assert replica.tokens(job) == [rest]
        assert isinstance(replica.end(job), frames.JobFinished)


@pytest.mark.parametrize("step", STEPS)
def test_r20_hostile_neighbours_move_nothing(step: str, tmp_path: Path) -> None:
    """Outlier activations, other lengths, joins and leaves beside a request: the same tokens as alone."""
    folder = make_family_model(tmp_path / "model", "llama", vocab_tokens=VOCAB_TOKENS)
    _plant_outliers(folder, tokens=range(3, 10), factor=1e4)
    model = STEPS[step](folder)
    if not model.exact_replay:
        pytest.skip(f"{model.numerics} does not promise an exact replay on this machine")
    random = Random(SEED)
    victim = request(text(prompts()[1]), sampling=SEEDED, max_tokens=40, tenant="victim", ignore_eos=True)
    alone = LoopBase(model, limits=LIMITS, keep_prefixes=False)
    alone.loop.submit(1, victim)
    alone.run()
    among = LoopBase(model, limits=LIMITS)
    among.loop.submit(1, victim)
    for number in range(100, 140):
        hostile = [random.randrange(3, 10) for _ in range(random.randint(1, 70))]
        among.loop.submit(number, request(text(hostile), sampling=SEEDED, max_tokens=20, tenant="hostile"))
        among.turn()
        if number % 3 == 0:
            among.loop.cancel(number - 1)
    # The hostile tenant sends the victim's prompt: nothing of it is found.
    among.loop.submit(200, replace(victim, tenant="hostile"))
    among.run()
    assert among.tokens(1) == alone.tokens(1)
    (started,) = [e for e in among.of(200) if isinstance(e, frames.JobStarted)]
    assert started.cached_tokens == 0
    assert among.tokens(200) == alone.tokens(1)


def _plant_outliers(folder: Path, *, tokens: range, factor: float) -> None:
    """Makes the embeddings of some tokens very large."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[name][tokens.start : tokens.stop] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
