"""What the spool promises of jobs: on disk or refused, and the place of an audit event is never theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.mesh import event_codec, job_codec
from services.mesh.audit_protocol import START, HeldEpoch, Place
from services.mesh.broker import Topic
from services.mesh.errors import AuditUnavailable, MessageTooLarge
from services.mesh.jobs import JobEvent, RetryRequested, Sealed
from services.mesh.spool import Spool
from tests.contract.test_spool_limits import disk_full
from tests.framework.audit_path import ended, make_spool, running, serve, started
from tests.framework.job_events import job


async def job_events(spool: Spool) -> list[tuple[Place, Topic, JobEvent]]:
    held = await spool.read_after(START, 1000, 1 << 30)
    return [
        (
            event.place,
            event.topic,
            job_codec.read(event_codec.complete(event.body, spool.producer, event.place, 1, None)).event,
        )
        for event in held
        if event.topic is not Topic.AUDIT
    ]


async def test_jobs_have_places_among_the_audit_events(tmp_path: Path) -> None:
    retry = RetryRequested(job("job_2"), "req_2", "REPLICA_LOST", 1)
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "a")
        await spool.append_job(job("job_1"))
        await spool.append_started(started("b"))
        await spool.append_job(retry)
    # What a process has acknowledged is there for the next.
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        assert await job_events(spool) == [
            (Place(1, 3), Topic.JOBS, job("job_1")),
            (Place(1, 5), Topic.RETRY, retry),
        ]
        assert spool.report().held == (HeldEpoch(1, 1, 5), HeldEpoch(2, 1, 1))
        await spool.trim({1: 3})
        assert [place for place, _, _ in await job_events(spool)] == [Place(1, 5)]


@pytest.mark.parametrize("mode", ["strict", "permissive"])
async def test_r29_a_job_is_refused_where_the_spool_is_full_and_leaves_room_for_audit_events(
    mode: str, tmp_path: Path
) -> None:
    spool = make_spool(tmp_path / "spool", mode=mode, max_events=100)
    async with running(spool):
        for number in range(75):
            await spool.append_job(job(f"job_{number}"))
        with pytest.raises(AuditUnavailable, match="job"):
            await spool.append_job(job("one more"))
        for number in range(12):
            await spool.append_started(started(f"r{number}"))
        with pytest.raises(AuditUnavailable):
            await spool.append_job(job("late"))
        for number in range(12):
            await spool.append_ended(ended(f"r{number}"))
        assert spool.turned_away == 0, "a job's submitter is told; the gap is for what nobody hears of"
        await spool.trim({1: 80})
        await spool.append_job(job("again"))


@pytest.mark.parametrize("mode", ["strict", "permissive"])
async def test_r29_a_full_disk_refuses_jobs(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "spool"
    spool = make_spool(path, mode=mode)
    async with running(spool):
        await spool.append_job(job("before"))
        with disk_full(path), pytest.raises(AuditUnavailable):
            await spool.append_job(job("during", request=Sealed("k", b"x" * 900_000)))
        await spool.append_job(job("after"))
        assert [event.job_id for _, _, event in await job_events(spool)] == ["before", "after"]  # type: ignore[union-attr]
        assert spool.ledger.events == 2


async def test_a_spool_that_is_stopped_takes_no_job(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        pass
    with pytest.raises(AuditUnavailable):
        await spool.append_job(job())


async def test_a_job_may_be_as_large_as_kafka_takes_and_is_read_alone(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        for number in range(3):
            large = job(f"job_{number}", request=Sealed("k", b"x" * (job_codec.MAX_EVENT_BYTES - 500)))
            await spool.append_job(large)
            assert len(await spool.read_after(Place(1, number), 100, 1000)) == 1
        with pytest.raises(MessageTooLarge):
            await spool.append_job(job(request=Sealed("k", b"x" * job_codec.MAX_EVENT_BYTES)))
