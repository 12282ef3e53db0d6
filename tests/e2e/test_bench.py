"""The benches on real processes, as short as they can be: they end, and say their aims."""

from __future__ import annotations

from pathlib import Path

from deploy.dev.ports import PortReservations
from tests.bench import gateway, gateway_subjects, report, rounds
from tests.bench.aims import aims
from tests.bench.batch import ratios
from tests.bench.gateway_figures import BARE
from tests.bench.progress import Progress
from tests.bench.rounds import Plan
from tests.bench.subject import Subject
from tests.bench.through_gateway import Platform
from tests.bench.through_http import PlatformOverHttp
from tests.bench.through_jobs import BatchFile, Jobs
from tests.framework.mesh import MeshHarness


async def test_a_round_through_the_platform(mesh: MeshHarness) -> None:
    """With echo, which says one token for each word of the prompt."""
    grpc, platform = Platform(mesh, "echo"), PlatformOverHttp(mesh, "echo", tenant="acorn")
    await grpc.start()
    await platform.start()
    plan = Plan(
        levels=(1, 4),
        rounds=1,
        prompt_tokens=30,
        max_tokens=8,
        count=lambda text: len(text.split()),
        seed="e2e",
    )
    found = await rounds.measure({1: [platform], 4: [platform, grpc]}, plan, print)
    assert [len(found.rates(level, "platform")) for level in (1, 4)] == [1, 1]
    batches = [found.batches[4][each.name][0] for each in (platform, grpc)]
    for batch in batches:
        assert batch.tokens == 32
        assert 0 < batch.ttft_mean_s <= batch.ttft_worst_s
        assert {"gateway", "auth", "inference", "logging", "broker", "client"} <= batch.cpu_s.keys()
    texts = [[stream.text for stream in batch.streams] for batch in batches]
    assert texts[0] == texts[1]
    cached = await rounds.prefixes(platform, plan, prefix_tokens=64, say=print)
    made = aims(found, cached, "float32")
    assert [aim.line().split()[:2] for aim in made] == [["aim", "cached_prefix_ttft_512"]]
    assert report.table(found).row_count == 3


async def test_a_round_of_jobs_and_of_a_batch_file(mesh: MeshHarness) -> None:
    subjects: list[Subject] = [Platform(mesh, "echo"), Jobs(mesh, "echo"), BatchFile(mesh, "echo")]
    await subjects[0].start()
    plan = Plan(
        levels=(6,),
        rounds=1,
        prompt_tokens=30,
        max_tokens=8,
        count=lambda text: len(text.split()),
        seed="e2e",
    )
    found = await rounds.measure({6: subjects}, plan, print)
    made = ratios(found, 6, "platform, gRPC")
    assert [each.line().split()[:2] for each in made] == [["aim", "batch_jobs"], ["aim", "batch_batch_file"]]
    texts = [[stream.text for stream in found.batches[6][each.name][0].streams] for each in subjects]
    assert texts[0] == texts[1]
    assert all(texts[2])


async def test_a_round_of_gateways(mesh: MeshHarness, reservations: PortReservations, tmp_path: Path) -> None:
    """Our own ones and the bare proxy; those of others are not installed for `make test`."""
    platform = gateway_subjects.Platform(mesh, reservations, tmp_path)
    await platform.start()
    wanted = (*gateway.OURS, BARE, gateway.MEMORY)
    size = gateway.Size(
        rounds=1,
        alone_s=0.1,
        loaded_s=0.3,
        warm_s=0.1,
        words=4,
        streamed_words=20,
        memory_requests=30,
        memory_later_s=0,
    )
    try:
        found = await gateway.measure(wanted, size, tmp_path, platform, Progress())
    finally:
        await platform.stop()
    assert list(found.rounds) == [*gateway.OURS, BARE]
    for (each,) in found.rounds.values():
        assert 0 < each.alone.p50_s <= each.alone.p99_s
        assert each.alone_behind.p50_s > 0
        assert min(each.at_16.requests_per_s, each.at_32.requests_per_s, each.streamed.tokens_per_s) > 0
    assert 30e6 < found.memory["http"].idle <= found.memory["http"].loaded * 1.1
    assert [aim.name for aim in found.aims()] == [
        "grpc_off_vs_bare",
        "grpc_off_vs_bare_per_cpu_s",
        "grpc_all_vs_bare",
        "grpc_all_vs_bare_per_cpu_s",
        "memory_mb",
        "memory_back_to_idle",
    ]
