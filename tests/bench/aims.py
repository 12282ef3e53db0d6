"""What the ratios should be, by precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.bench.figures import Aim, ratio
from tests.bench.options import BLOCKS
from tests.bench.rounds import PrefixRound, Rounds

Targets = Mapping[int, float]
"""By number of streams."""
GENERATE: Targets = {1: 1.0, 8: 1.2, 32: 1.2}
SERVE: Targets = {1: 4.0, 8: 6.0, 32: 10.0}
VLLM: Targets = {1: 2.0, 8: 2.0, 32: 2.0}
LLAMA: Mapping[str, Targets] = {"q8": {1: 1.1, 8: 3.0, 32: 4.0}, "q4": {1: 1.2, 8: 2.5, 32: 3.0}}
ALONE: Targets = {8: 0.95}
"""Over each edge."""
TTFT_MEAN, TTFT_WORST = 0.6, 0.9
"""Of vLLM's, where 8 arrive at once."""
PREFIX = 0.2
PREFIX_TOKENS = 512


def _anchors(precision: str) -> list[tuple[str, tuple[str, ...], Targets]]:
    """The name in an aim, the subjects that stand for it, and what is aimed at.

    Of several subjects only one is measured at each number of streams.
    """
    alone = ("engine_alone", ("engine alone",), ALONE)
    if precision in BLOCKS:
        ways = ("llama.cpp loop", "llama.cpp server", "llama.cpp server guessing")
        return [(f"llama_cpp_{precision}", ways, LLAMA[precision]), alone]
    return [
        ("generate", ("generate",), GENERATE),
        ("serve", ("serve", "serve batching"), SERVE),
        ("vllm", ("vllm",), VLLM),
        alone,
    ]


def aims(found: Rounds, cached: Sequence[PrefixRound], precision: str) -> list[Aim]:
    """Those that this run can speak about."""
    made: list[Aim] = []
    for name, others, targets in _anchors(precision):
        for level in found.batches:
            base = found.rates(level, "platform")
            for other in others:
                rates = found.rates(level, other)
                if base and rates and level in targets:
                    made.append(Aim(f"platform_vs_{name}_{level}", ratio(base, rates), targets[level]))
    grpc, alone = (found.rates(8, name) for name in ("platform, gRPC", "engine alone"))
    if grpc and alone:
        made.append(Aim("platform_grpc_vs_engine_alone_8", ratio(grpc, alone), ALONE[8]))
    ours, theirs = (found.batches.get(8, {}).get(name, []) for name in ("platform", "vllm"))
    if ours and theirs:
        mean = ratio([each.ttft_mean_s for each in ours], [each.ttft_mean_s for each in theirs])
        worst = ratio([each.ttft_worst_s for each in ours], [each.ttft_worst_s for each in theirs])
        made.append(Aim("ttft_8_mean_vs_vllm", mean, TTFT_MEAN, at_most=True))
        made.append(Aim("ttft_8_worst_vs_vllm", worst, TTFT_WORST, at_most=True))
    if cached:
        measured = ratio([each.cached_s for each in cached], [each.cold_s for each in cached])
        made.append(Aim(f"cached_prefix_ttft_{PREFIX_TOKENS}", measured, PREFIX, at_most=True))
    return made
