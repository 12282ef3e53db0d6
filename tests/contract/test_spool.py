"""What the spool promises: committed is kept, nothing is unbounded, one outcome for each request."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from llmos.events.v1 import events_pb2

from services.mesh import event_codec
from services.mesh.audit_protocol import START, HeldEpoch, Place
from services.mesh.clock import ManualClock
from services.mesh.errors import StateConflict
from services.mesh.event_codec import IntentRead, OutcomeRead
from services.mesh.events import EngineChange, EngineChanged, Outcome
from services.mesh.spool_frames import MAGIC
from tests.framework.audit_path import ended, make_spool, running, serve, started
from tests.framework.spool_story import events, story
from tests.framework.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]


async def test_events_have_places_without_a_gap_and_outcomes_their_own_id(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "a")
        await spool.append_ended(ended("refused", Outcome.REJECTED))
        await spool.append_other(EngineChanged(EngineChange.LOADED, "echo"))
        assert story(await events(spool)) == [
            (Place(1, 1), "a started"),
            (Place(1, 2), "a SUCCEEDED"),
            (Place(1, 3), "refused REJECTED"),
            (Place(1, 4), "engine"),
        ]
        held = await spool.read_after(START, 10, 1 << 20)
        values = [
            events_pb2.EventEnvelope.FromString(
                event_codec.complete(each.body, spool.producer, each.place, 1, each.outcome_of)
            )
            for each in held
        ]
        assert [each.id for each in values] == [
            f"{spool.producer}/1/1",
            "outcome/a",
            "outcome/refused",
            f"{spool.producer}/1/4",
        ]
        assert {each.producer for each in values} == {spool.producer}


async def test_a_name_is_made_once_and_each_life_is_an_epoch(tmp_path: Path) -> None:
    names = []
    for life in (1, 2, 3):
        spool = make_spool(tmp_path / "spool")
        async with running(spool):
            assert spool.ledger.epoch == life
            names.append(spool.producer)
            await serve(spool, f"r{life}")
    assert len(set(names)) == 1
    other = make_spool(tmp_path / "lost-and-new")
    async with running(other):
        assert other.producer not in names
        assert other.producer.startswith("gateway-0-")


async def test_what_a_dead_process_left_open_is_closed_as_aborted(tmp_path: Path) -> None:
    first = make_spool(tmp_path / "spool")
    async with running(first):
        await serve(first, "done")
        for request_id in ("left", "too"):
            await first.append_started(started(request_id))
    second = make_spool(tmp_path / "spool")
    async with running(second):
        assert story(await events(second))[-2:] == [
            (Place(2, 1), "left ABORTED"),
            (Place(2, 2), "too ABORTED"),
        ]
        aborted = events_pb2.RequestEnded.FromString((await events(second))[-1].record.body)
        assert aborted.facts.identity.tenant_id == "tenant-a"
        report = second.report()
        assert report.held == (HeldEpoch(1, 1, 4), HeldEpoch(2, 1, 2))
        assert report.settled_before == Place(2, 3)
    third = make_spool(tmp_path / "spool")
    async with running(third):
        assert len(await events(third)) == 6, "closed once"


async def test_a_second_intent_or_outcome_is_refused(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await spool.append_started(started("a"))
        with pytest.raises(StateConflict):
            await spool.append_started(started("a"))
        results = await asyncio.gather(
            *(spool.append_ended(ended("a")) for _ in range(3)), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in results) == [
            "NoneType",
            "StateConflict",
            "StateConflict",
        ]
        with pytest.raises(StateConflict):
            await spool.append_ended(ended("a", Outcome.FAILED))
        assert [what for _, what in story(await events(spool))] == ["a started", "a SUCCEEDED"]
        assert spool.ledger.events == 2


async def test_an_intent_that_is_not_urgent_waits_until_somebody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.mesh.spool.SPACING_S", 3600.0)
    spool = make_spool(tmp_path / "spool", mode="strict")
    async with running(spool):
        await spool.append_started(started("first"))
        waiting = [spool.append_started(started(name), urgent=False) for name in "ab"]
        spool.hurry("first")  # is on disk
        spool.hurry("unknown")
        assert not waiting[0].done()
        spool.hurry("b")
        await asyncio.gather(*waiting)
        assert [what for _, what in story(await events(spool))] == ["first started", "a started", "b started"]


async def test_trimming_keeps_what_is_above(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        await serve(spool, "a", "b")
        assert await spool.trim({1: 3}) == 3
        assert story(await events(spool)) == [(Place(1, 4), "b SUCCEEDED")]
        assert spool.report().held == (HeldEpoch(1, 4, 4),)
        await spool.begin_epoch(5)
        await serve(spool, "c")
        assert spool.report().held == (HeldEpoch(1, 4, 4), HeldEpoch(5, 1, 2))
        assert await spool.trim({1: 4, 5: 2}) == 3
        assert (spool.ledger.events, spool.ledger.bytes) == (0, 0)
        assert spool.report().settled_before == Place(5, 3)
    again = make_spool(tmp_path / "spool")
    async with running(again):
        assert again.ledger.epoch == 6


async def test_a_second_process_is_refused_with_a_sentence(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        other = make_spool(tmp_path / "spool")
        with pytest.raises(OSError, match="in use by another process"):
            await other.start()
        await other.stop()


@pytest.mark.parametrize("content", [b"not a spool" * 100, b"", MAGIC, MAGIC + b"\xff" * 4096, b"llmosSP9"])
async def test_a_damaged_file_is_refused_with_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spool"
    path.mkdir()
    (path / "000000000001.log").write_bytes(content)
    spool = make_spool(path)
    with pytest.raises(OSError, match=r"spool cannot be used.*move it away"):
        await spool.start()
    await spool.stop()
    assert (path / "000000000001.log").read_bytes() == content


async def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("mine")
    spool = make_spool(tmp_path / "spool")
    with pytest.raises(OSError, match="cannot be used"):
        await spool.start()
    await spool.stop()


async def test_r25_anonymous_refusals_are_counted_not_kept(tmp_path: Path) -> None:
    clock = ManualClock()
    spool = make_spool(tmp_path / "spool", clock, anonymous_interval_s=60.0, max_anonymous=100)
    async with running(spool):
        for number in range(100_000):
            spool.count_anonymous(f"2001:db8::{number % 5000:x}", "CREDENTIAL_MISSING")
        assert spool.ledger.events == 0
        await clock.advance(61)
        await eventually(lambda: spool.ledger.held_events == 101)
        records = [events_pb2.AuditRecorded.FromString(each.record.body) for each in await events(spool)]
        counts = {each.anonymous_rejected.source_address: each.anonymous_rejected.count for each in records}
        assert sum(counts.values()) == 100_000
        assert counts["other"] == 100_000 - 100 * 20


async def test_counts_of_anonymous_refusals_are_written_at_a_stop(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        spool.count_anonymous("192.0.2.1", "CREDENTIAL_INVALID")
    again = make_spool(tmp_path / "spool")
    async with running(again):
        assert [what for _, what in story(await events(again))] == ["anonymous_rejected"]


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.framework.audit_path import ended, make_spool, started

async def main() -> None:
    spool = make_spool(Path(sys.argv[1]), mode=sys.argv[2])
    await spool.start()

    async def work(worker: int) -> None:
        number = 0
        while True:
            request_id = f"{spool.ledger.epoch}-{worker}-{number}"
            await spool.append_started(started(request_id))
            print("S", request_id, flush=True)
            if number % 3:
                await spool.append_ended(ended(request_id))
                print("E", request_id, flush=True)
            number += 1

    await asyncio.gather(*(work(worker) for worker in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("mode", ["permissive", "strict"])
async def test_r30_what_was_acknowledged_survives_sigkill(tmp_path: Path, mode: str) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = tmp_path / "spool"
    begun: set[str] = set()
    done: set[str] = set()
    for _ in range(4):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path), mode, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos' / 'gen'}"},
        )  # fmt: skip
        assert process.stdout is not None
        lines = [await process.stdout.readline() for _ in range(rng.randrange(5, 400))]
        process.send_signal(signal.SIGKILL)
        rest = await process.stdout.read()
        await process.wait()
        # The last line may be torn.
        for line in (b"".join(lines) + rest).split(b"\n")[:-1]:
            kind, _, request_id = line.decode().partition(" ")
            (begun if kind == "S" else done).add(request_id)
    spool = make_spool(path)
    async with running(spool):
        found = await events(spool)
        places = [event.place for event in found]
        assert places == sorted(places)
        for epoch in range(1, 6):
            sequences = [place.sequence for place in places if place.epoch == epoch]
            assert sequences == list(range(1, len(sequences) + 1))
        intents = {event.record.request_id for event in found if isinstance(event.record, IntentRead)}
        results = [event.record for event in found if isinstance(event.record, OutcomeRead)]
        outcomes = {record.request_id: Outcome(record.outcome) for record in results}
        assert len(outcomes) == len(results), "one outcome for each"
        assert intents == set(outcomes), "none is open"
        assert begun <= intents
        assert all(outcomes[request_id] is Outcome.SUCCEEDED for request_id in done)


async def test_a_caller_that_is_cancelled_leaves_the_intent_to_its_outcome(tmp_path: Path) -> None:
    spool = make_spool(tmp_path / "spool")
    async with running(spool):
        task = asyncio.ensure_future(spool.append_started(started("a")))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await spool.append_ended(ended("a", Outcome.CANCELLED))
        assert [what for _, what in story(await events(spool))] == ["a started", "a CANCELLED"]
        assert not spool.ledger.open
