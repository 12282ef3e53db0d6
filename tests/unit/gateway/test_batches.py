"""Batches from their file to their files, over a schedule in memory."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta

import pytest

from services.gateway.batches import runner as runners
from services.gateway.batches.batches import Batch, Status
from services.gateway.batches.ports import BatchWork
from services.gateway.jobs.ports import Postponed
from services.mesh.context import Identity
from services.mesh.errors import Conflict, LlmosError, NotFound, RequestInvalid
from services.mesh.jobs import JobKind
from tests.framework.batches import FAILS, WINDOW_S, BatchBench, line
from tests.framework.schedules import report_one

OTHER = Identity("other", "bob", "key_2", frozenset({"generate"}))


def of(batch: Batch) -> tuple[int, int, int]:
    return batch.outcome.total, batch.outcome.completed, batch.outcome.failed


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_a_batch_is_answered_line_by_line(endpoint: str) -> None:
    bench = BatchBench()
    texts = [f"text {number}" for number in range(7)]
    given = b"".join(line(text, text, endpoint) for text in texts)
    batch = await bench.create(given, endpoint=endpoint, metadata={"team": "blue"})
    assert (batch.status, batch.work.metadata) == (Status.VALIDATING, {"team": "blue"})
    ended = await bench.finish(batch.batch_id)
    assert (ended.status, of(ended), ended.outcome.error_file_id) == (Status.COMPLETED, (7, 7, 0), "")
    assert (ended.outcome.usage.prompt_tokens, ended.outcome.usage.completion_tokens) == (21, 14)
    found = await bench.lines_of(ended.outcome.output_file_id)
    assert [each["custom_id"] for each in found] == texts
    for text, each in zip(texts, found, strict=True):
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert text.upper() in str(each["response"]["body"])
    assert len({each["id"] for each in found}) == 7
    times = (ended.create_time, ended.outcome.in_progress_time, ended.outcome.finalizing_time, ended.end_time)
    assert list(times) == sorted(times)  # type: ignore[type-var]


async def test_each_line_that_fails_has_its_reason() -> None:
    bench = BatchBench()
    batch = await bench.create(
        line("a", "one"),
        line("b", FAILS),
        line("c", max_tokens=10**6),
        line("d", stream=True),
        line("e", nonsense=1),
        line("f", "two"),
    )
    ended = await bench.finish(batch.batch_id)
    assert (ended.status, of(ended)) == (Status.COMPLETED, (6, 2, 4))
    good = await bench.lines_of(ended.outcome.output_file_id)
    assert [each["custom_id"] for each in good] == ["a", "f"]
    bad = await bench.lines_of(ended.outcome.error_file_id)
    told = {each["custom_id"]: each["response"] for each in bad}
    assert list(told) == ["b", "c", "d", "e"]
    assert told["b"]["status_code"] == 500
    assert told["b"]["body"]["error"]["code"] == "engine_fault"
    for custom_id, param in (("c", "max_tokens"), ("d", "stream"), ("e", "nonsense")):
        assert told[custom_id]["status_code"] == 400
        assert told[custom_id]["body"]["error"]["param"] == param
    assert len(bench.ran) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"", (0, "empty_file")),
        (b"\n \n", (0, "empty_file")),
        (b"{nonsense\n", (1, "invalid_json_line")),
        (line("a") + b"\n" + b"[]\n", (3, "invalid_json_line")),
        (line("a") + line("b").replace(b'"method":"POST",', b""), (2, "missing_required_parameter")),
        (line("a").replace(b"POST", b"GET"), (1, "invalid_method")),
        (line("a", endpoint="/v1/completions"), (1, "invalid_url")),
        (line("a") + line("a", "other"), (2, "duplicate_custom_id")),
        (line(""), (1, "invalid_custom_id")),
        (b"".join(line(str(number)) for number in range(12)), (11, "too_many_requests")),
    ],
)
async def test_an_input_that_is_wrong_runs_nothing(given: bytes, expected: tuple[int, str]) -> None:
    bench = BatchBench(max_lines=10)
    ended = await bench.finish((await bench.create(given)).batch_id)
    assert ended.status is Status.FAILED
    (error,) = ended.outcome.input_errors
    assert (error.line, error.code) == expected
    assert (bench.ran, ended.outcome.output_file_id) == ([], "")


async def test_a_file_that_is_gone_or_another_tenants() -> None:
    bench = BatchBench()
    batch = await bench.create(line("a"))
    await bench.files.delete("acme", batch.work.input_file_id)
    ended = await bench.finish(batch.batch_id)
    assert [error.code for error in ended.outcome.input_errors] == ["file_not_found"]
    file = await bench.upload(line("a"))
    with bench.request(OTHER) as record, pytest.raises(RequestInvalid, match="names no file"):
        await bench.batches.create(record, BatchWork(file.file_id, "/v1/completions", 1, b""))  # type: ignore[arg-type]
    for batch_id in (batch.batch_id, "batch_none", "job_1"):
        with bench.request(OTHER), pytest.raises(NotFound):
            await bench.batches.get(batch_id)


async def test_r38_a_worker_that_dies_at_any_point_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call to the world a step is broken off at: each line runs once, and the files are the same."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    monkeypatch.setattr(runners, "SLICE_LINES", 5)
    for _ in range(25):
        bench = BatchBench()
        given = [line(f"{number}", FAILS if number % 7 == 3 else f"t{number}") for number in range(23)]
        batch = await bench.create(*given, line("wrong", n=-1))
        for _ in range(400):
            if (await bench.get(batch.batch_id)).end_time is not None:
                break
            for claim in await bench.claim():
                if claim.scheduled.job.kind is JobKind.BATCH and chance.random() < 0.6:
                    step = asyncio.ensure_future(bench.new_runner().run(claim))
                    for _ in range(chance.randrange(400)):
                        if step.done():
                            break
                        await asyncio.sleep(0)
                    step.cancel()
                    await asyncio.gather(step, return_exceptions=True)
                    continue  # its report is lost with it, and its lease ends
                report = await bench.run(claim)
                await report_one(bench.schedule, claim.scheduled.job.job_id, claim.fence, "req_x", report)
            await bench.clock.advance(20.0)
            await bench.schedule.sweep()
        ended = await bench.get(batch.batch_id)
        if ended.status is Status.FAILED:
            # Its worker was lost more often than it may be.
            assert "lost" in ended.error
            continue
        assert (ended.status, of(ended)) == (Status.COMPLETED, (24, 20, 4))
        assert sorted(bench.ran) == sorted(set(bench.ran))
        good = await bench.lines_of(ended.outcome.output_file_id)
        bad = await bench.lines_of(ended.outcome.error_file_id)
        assert [each["custom_id"] for each in good] == [str(n) for n in range(23) if n % 7 != 3]
        assert [each["custom_id"] for each in bad] == ["3", "10", "17", "wrong"]


async def test_cancelled_in_the_middle_it_gives_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "SLICE_LINES", 3)
    bench = BatchBench()
    batch = await bench.create(*[line(f"{number}", f"t{number}") for number in range(9)])
    (own,) = await bench.claim()
    await report_one(bench.schedule, batch.batch_id, own.fence, "", await bench.run(own))
    for claim in (await bench.claim())[:4]:
        await report_one(
            bench.schedule, claim.scheduled.job.job_id, claim.fence, "req_x", await bench.run(claim)
        )
    cancelling = await bench.cancel(batch.batch_id)
    assert cancelling.status is Status.CANCELLING
    await bench.clock.advance(61)
    ended = await bench.finish(batch.batch_id)
    assert ended.status is Status.CANCELLED
    assert (ended.outcome.total, ended.outcome.completed) == (9, len(bench.ran))
    good = await bench.lines_of(ended.outcome.output_file_id)
    bad = await bench.lines_of(ended.outcome.error_file_id)
    assert {each["error"]["code"] for each in bad} == {"batch_cancelled"}
    assert len(good) + len(bad) == 9
    assert (await bench.cancel(batch.batch_id)).status is Status.CANCELLED


async def test_cancelled_before_it_began_and_after_it_ended() -> None:
    bench = BatchBench()
    batch = await bench.create(line("a"))
    await bench.cancel(batch.batch_id)
    ended = await bench.finish(batch.batch_id)
    assert (ended.status, of(ended), bench.ran) == (Status.CANCELLED, (0, 0, 0), [])
    batch = await bench.create(line("a"))
    await bench.finish(batch.batch_id)
    with pytest.raises(Conflict):
        await bench.cancel(batch.batch_id)


async def test_when_its_window_is_over_the_rest_has_expired() -> None:
    bench = BatchBench()
    batch = await bench.create(line("a"), line("b"), line("c"))
    (own,) = await bench.claim()
    await report_one(bench.schedule, batch.batch_id, own.fence, "", await bench.run(own))
    (first, *_) = await bench.claim((JobKind.REQUEST,))
    await report_one(bench.schedule, first.scheduled.job.job_id, first.fence, "req_x", await bench.run(first))
    await bench.clock.advance(WINDOW_S)
    await bench.schedule.sweep()
    ended = await bench.finish(batch.batch_id)
    assert (ended.status, of(ended)) == (Status.EXPIRED, (3, 1, 2))
    bad = await bench.lines_of(ended.outcome.error_file_id)
    assert {each["error"]["code"] for each in bad} == {"batch_expired"}
    assert ended.expire_time == batch.create_time + timedelta(seconds=WINDOW_S)


async def test_it_waits_for_room_and_for_what_is_away() -> None:
    bench = BatchBench(max_jobs=2)
    batch = await bench.create(line("a"))
    bench.spool.full = True
    await bench.step()
    assert (await bench.get(batch.batch_id)).status is Status.IN_PROGRESS
    bench.spool.full, bench.blobs.lost = False, True
    await bench.clock.advance(10)
    (own,) = await bench.claim()
    report = await bench.run(own)
    assert isinstance(report, Postponed)
    bench.blobs.lost = False
    await report_one(bench.schedule, batch.batch_id, own.fence, "", report)
    assert (await bench.finish(batch.batch_id)).status is Status.COMPLETED


async def test_they_are_listed_newest_first() -> None:
    bench = BatchBench()
    made = []
    for number in range(5):
        made.append((await bench.create(line(str(number)))).batch_id)
        await bench.clock.advance(1)
    await bench.cancel(made[1])
    with bench.request():
        found, more = await bench.batches.list(limit=3)
        assert ([each.batch_id for each in found], more) == (made[:-4:-1], True)
        found, more = await bench.batches.list(limit=3, after=found[-1].batch_id)
        assert ([each.batch_id for each in found], more) == (made[1::-1], False)
        assert await bench.batches.list(limit=3, after="batch_none") == ([], False)


async def test_what_is_not_right_is_no_batch() -> None:
    bench = BatchBench()
    with pytest.raises(LlmosError), bench.request() as record:
        await bench.batches.create(record, BatchWork("file-none", "/v1/completions", 1, b""))  # type: ignore[arg-type]
