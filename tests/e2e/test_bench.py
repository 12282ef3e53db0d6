"""The benches on real processes, as short as they can be: they end, and say their aims."""

from __future__ import annotations

from tests.bench import report, rounds
from tests.bench.aims import aims
from tests.bench.rounds import Plan
from tests.bench.through_gateway import Platform
from tests.framework.mesh import MeshHarness


async def test_a_round_through_the_platform(mesh: MeshHarness) -> None:
    """With echo, which says one token for each word of the prompt."""
    platform = Platform(mesh, "echo")
    await platform.start()
    plan = Plan(
        levels=(1, 4),
        rounds=1,
        prompt_tokens=30,
        max_tokens=8,
        count=lambda text: len(text.split()),
        seed="e2e",
    )
    found = await rounds.measure({1: [platform], 4: [platform]}, plan, print)
    assert [len(found.rates(level, "platform")) for level in (1, 4)] == [1, 1]
    batch = found.batches[4]["platform"][0]
    assert batch.tokens == 32
    assert 0 < batch.ttft_mean_s <= batch.ttft_worst_s
    assert {"gateway", "auth", "inference", "logging", "broker", "client"} <= batch.cpu_s.keys()
    cached = await rounds.prefixes(platform, plan, prefix_tokens=64, say=print)
    made = aims(found, cached, "float32")
    assert [aim.line().split()[:2] for aim in made] == [["aim", "cached_prefix_ttft_512"]]
    assert report.table(found).row_count == 2
