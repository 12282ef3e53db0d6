"""The use case: whatever ends a request, its work ends with it, and it leaves exactly one outcome."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from services.gateway.generation import (
    Delta,
    EngineStarted,
    Event,
    Finished,
    FinishReason,
    Prompt,
    Started,
    Usage,
    ValidPrompt,
)
from services.mesh import errors
from services.mesh.clock import ManualClock
from services.mesh.context import Identity
from services.mesh.errors import LlmosError
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import ALICE, Bench, FakeReplica, Gate, Step, answer, generation

TIMEOUT_S = 5


async def collect(bench: Bench, identity: Identity = ALICE, **request: object) -> list[Event]:
    async with (
        bench.call(identity) as record,
        aclosing(bench.completions.stream(record, generation(**request))) as stream,
    ):
        return [event async for event in stream]


def only_outcome(bench: Bench) -> tuple[Outcome, str]:
    assert len(bench.audit.ended) == 1
    ended = bench.audit.ended[0]
    assert [event.facts.request_id for event in bench.audit.started] in ([], [ended.facts.request_id])
    return ended.outcome, ended.error_reason


async def test_an_answer_is_streamed_and_recorded() -> None:
    bench = Bench([FakeReplica()])
    events = await collect(bench)
    assert isinstance(events[0], Started)
    assert (events[0].seed, events[0].model_revision) == (42, "rev-1")
    assert [event.text for event in events if isinstance(event, Delta)] == ["Hello", " world"]
    assert isinstance(events[-1], Finished)
    assert only_outcome(bench) == (Outcome.SUCCEEDED, "")
    ended = bench.audit.ended[0]
    assert (ended.usage.prompt_tokens, ended.usage.completion_tokens, ended.usage.cached_prompt_tokens) == (
        7,
        2,
        3,
    )
    assert ended.finish_reasons == (FinishReason.STOP,)
    assert (ended.replica, ended.model_revision, ended.facts.model) == ("replica-0", "rev-1", "echo-1")
    assert ended.time_to_first_token_s is not None
    assert bench.audit.started[0].facts == ended.facts
    assert bench.replicas[0].closed == 1
    assert bench.admission.running == 0


async def test_generate_is_the_stream_folded() -> None:
    bench = Bench([FakeReplica([
        EngineStarted("rev-1", 7, "replica-0"),
        Delta(1, 1, "b", (5, 6)),
        Delta(2, 0, "a", (7,)),
        Delta(3, 1, "B", ()),
        Finished((FinishReason.STOP, FinishReason.LENGTH), Usage(7, 3)),
    ])])  # fmt: skip
    async with bench.call() as record:
        whole = await bench.completions.generate(record, generation(n=2))
    assert [(c.text, c.token_ids, c.finish_reason) for c in whole.choices] == [
        ("a", (7,), FinishReason.STOP),
        ("bB", (5, 6), FinishReason.LENGTH),
    ]
    assert whole.usage.completion_tokens == 3


async def test_nothing_reaches_the_caller_before_the_intent_is_stored() -> None:
    working = Gate()
    working.open.set()
    bench = Bench([FakeReplica([working, *answer("a", "b")])])
    bench.audit.gate = Gate()
    task = asyncio.create_task(collect(bench))
    await asyncio.wait_for(bench.audit.gate.reached.wait(), TIMEOUT_S)
    await asyncio.wait_for(working.reached.wait(), TIMEOUT_S)  # meanwhile
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    bench.audit.gate.open.set()
    assert len(await asyncio.wait_for(task, TIMEOUT_S)) == 4


LONG = errors.ContextLengthExceeded
DELTA = Delta(1, 0, "a", (1,))
STARTED = EngineStarted("rev-1", 7, "replica-0")
FAULTS: list[tuple[str, list[Step], type[LlmosError], Outcome]] = [
    ("bad argument", [LONG("x")], LONG, Outcome.REJECTED),
    ("late refusal", [STARTED, LONG("x")], LONG, Outcome.REJECTED),
    ("engine full", [errors.Overloaded("full")], errors.Overloaded, Outcome.REJECTED),
    ("engine fault", [STARTED, DELTA, errors.EngineFault("x")], errors.EngineFault, Outcome.FAILED),
    ("lost at once", [errors.ReplicaLost("x")], errors.ReplicaLost, Outcome.FAILED),
    ("lost in the middle", [STARTED, DELTA, errors.ReplicaLost("x")], errors.ReplicaLost, Outcome.FAILED),
    ("ended early", [STARTED, Delta(1, 0, "a", (1,))], errors.ReplicaLost, Outcome.FAILED),
    ("gap", [STARTED, Delta(1, 0, "a", (1,)), Delta(3, 0, "c", (3,))], errors.DataCorrupt, Outcome.FAILED),
    ("repeat", [STARTED, DELTA, DELTA], errors.DataCorrupt, Outcome.FAILED),
    ("delta first", [DELTA], errors.DataCorrupt, Outcome.FAILED),
    ("begun twice", [STARTED, STARTED], errors.Internal, Outcome.FAILED),
    ("finished unbegun", [Finished((FinishReason.STOP,), Usage())], errors.Internal, Outcome.FAILED),
    ("strange choice", [STARTED, Delta(1, 1, "a", (1,))], errors.Internal, Outcome.FAILED),
    ("choice missing", [STARTED, Finished((), Usage())], errors.Internal, Outcome.FAILED),
    ("deadline", [STARTED, errors.DeadlineExceeded("late")], errors.DeadlineExceeded, Outcome.CANCELLED),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "error", "outcome"), [pytest.param(*row[1:], id=row[0]) for row in FAULTS]
)
async def test_each_fault_leaves_one_outcome(
    script: list[Step], error: type[LlmosError], outcome: Outcome
) -> None:
    bench = Bench([FakeReplica(script)])
    with pytest.raises(error):
        await collect(bench)
    assert only_outcome(bench) == (outcome, error.reason)
    assert bench.replicas[0].running == bench.admission.running == 0


async def test_intents_are_gathered_only_where_there_are_others() -> None:
    gate = Gate()
    bench = Bench([FakeReplica([gate, *answer("a")], answer("b"))])

    first = asyncio.create_task(collect(bench))
    await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
    await collect(bench)
    gate.open.set()
    await first
    await collect(bench)
    assert bench.audit.urgent == [True, False, True]


async def test_what_was_delivered_before_a_fault_is_counted() -> None:
    bench = Bench([FakeReplica([STARTED, Delta(1, 0, "a", (1, 2)), errors.EngineFault("x")])])
    with pytest.raises(errors.EngineFault):
        await collect(bench)
    assert bench.audit.ended[0].usage.completion_tokens == 2
    assert bench.audit.ended[0].usage.prompt_tokens == 7


@pytest.mark.parametrize(
    ("identity", "request_changes", "error"),
    [
        pytest.param(Identity("acme", "bob"), {}, errors.ScopeMissing, id="scope"),
        pytest.param(ALICE, {"model": "other"}, errors.ModelNotFound, id="model"),
    ],
)
async def test_refusals_leave_an_outcome(
    identity: Identity, request_changes: dict[str, object], error: type[LlmosError]
) -> None:
    bench = Bench([FakeReplica()])
    with pytest.raises(error):
        await collect(bench, identity, **request_changes)
    assert only_outcome(bench) == (Outcome.REJECTED, error.reason)
    assert not bench.replicas[0].requests


async def test_a_refusal_before_any_work_has_no_intent() -> None:
    bench = Bench([FakeReplica()], max_concurrent=1)
    async with bench.call() as record, bench.permit():
        record.begin()
        await record.committed()
        with pytest.raises(errors.ConcurrencyLimit) as refused:
            await collect(bench)
    assert refused.value.retry_after_s
    assert [event.facts.request_id for event in bench.audit.started] == ["req_1"]
    assert {event.facts.request_id: event.outcome for event in bench.audit.ended} == {
        "req_1": Outcome.SUCCEEDED,
        "req_2": Outcome.REJECTED,
    }


async def test_a_deadline_that_has_passed_starts_nothing() -> None:
    bench = Bench([FakeReplica()])
    with pytest.raises(errors.DeadlineExceeded):
        async with bench.call(deadline_s=bench.clock.monotonic()) as record:
            await bench.completions.generate(record, generation())
    assert only_outcome(bench) == (Outcome.CANCELLED, "DEADLINE_EXCEEDED")
    assert not bench.replicas[0].requests


@pytest.mark.parametrize("place", [0, 1, 2, 3])
async def test_cancelling_ends_the_work_and_leaves_one_outcome(place: int) -> None:
    gate = Gate()
    script = answer("a", "b")
    script.insert(place, gate)
    bench = Bench([FakeReplica(script)])
    task = asyncio.create_task(collect(bench))
    await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert only_outcome(bench) == (Outcome.CANCELLED, "CANCELLED")
    assert bench.replicas[0].closed == 1
    assert bench.admission.running == 0


async def read_until(bench: Bench, last: type) -> None:
    """A reader that leaves after an event of this kind."""
    async with bench.call() as record, aclosing(bench.completions.stream(record, generation())) as stream:
        async for event in stream:
            if isinstance(event, last):
                raise asyncio.CancelledError


async def test_a_reader_that_leaves_ends_the_work() -> None:
    bench = Bench([FakeReplica()])
    with pytest.raises(asyncio.CancelledError):
        await read_until(bench, Started)
    assert only_outcome(bench) == (Outcome.CANCELLED, "CANCELLED")
    assert bench.replicas[0].closed == 1


async def test_leaving_after_the_last_event_is_success() -> None:
    bench = Bench([FakeReplica()])
    with pytest.raises(asyncio.CancelledError):
        await read_until(bench, Finished)
    assert only_outcome(bench) == (Outcome.SUCCEEDED, "")


async def test_a_cancellation_at_the_deadline_is_the_deadline() -> None:
    gate = Gate()
    # On this clock no time passes, however busy the machine is.
    bench = Bench([FakeReplica([gate])], clock=ManualClock())

    async def run() -> None:
        async with bench.call(deadline_s=bench.clock.monotonic() + 0.01) as record:
            await bench.completions.generate(record, generation())

    task = asyncio.create_task(run())
    await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert only_outcome(bench) == (Outcome.CANCELLED, "DEADLINE_EXCEEDED")


async def test_an_outcome_survives_a_second_cancellation() -> None:
    gate = Gate()
    bench = Bench([FakeReplica([gate])])
    bench.audit.end_gate = Gate()
    task = asyncio.create_task(collect(bench))
    await asyncio.wait_for(gate.reached.wait(), TIMEOUT_S)
    task.cancel()
    await asyncio.wait_for(bench.audit.end_gate.reached.wait(), TIMEOUT_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not bench.audit.ended
    bench.audit.end_gate.open.set()
    await asyncio.wait_for(bench.trail.stop(), TIMEOUT_S)
    assert only_outcome(bench) == (Outcome.CANCELLED, "CANCELLED")


async def test_strict_audit_refuses_before_the_first_byte() -> None:
    bench = Bench([FakeReplica()])
    bench.audit.start_error = errors.AuditUnavailable("full")
    with pytest.raises(errors.AuditUnavailable):
        await collect(bench)
    assert only_outcome(bench) == (Outcome.REJECTED, "AUDIT_UNAVAILABLE")
    assert bench.replicas[0].closed == 1


async def test_an_outcome_that_cannot_be_written_fails_nobody() -> None:
    bench = Bench([FakeReplica()])
    bench.audit.end_error = errors.AuditUnavailable("full")
    assert isinstance((await collect(bench))[-1], Finished)


async def test_an_answer_without_an_intent_is_a_fault_of_ours() -> None:
    bench = Bench([FakeReplica()])
    with pytest.raises(errors.Internal):
        async with bench.call():
            pass
    assert only_outcome(bench) == (Outcome.REJECTED, "INTERNAL")


async def test_a_replica_lost_at_once_is_replaced_by_another() -> None:
    bench = Bench([FakeReplica([errors.ReplicaLost("x")]), FakeReplica()])
    events = await collect(bench)
    assert isinstance(events[-1], Finished)
    assert only_outcome(bench) == (Outcome.SUCCEEDED, "")
    assert [len(replica.requests) for replica in bench.replicas] == [1, 1]


async def test_a_replica_that_came_back_is_tried_again_and_only_once() -> None:
    bench = Bench([FakeReplica([errors.ReplicaLost("x")], answer("ok"))])
    assert isinstance((await collect(bench))[-1], Finished)
    bench = Bench([FakeReplica([errors.ReplicaLost("x")])])
    with pytest.raises(errors.ReplicaLost):
        await collect(bench)
    assert len(bench.replicas[0].requests) == 2


async def test_no_second_try_after_the_first_event() -> None:
    bench = Bench([FakeReplica([STARTED, errors.ReplicaLost("x")]), FakeReplica()])
    with pytest.raises(errors.ReplicaLost):
        await collect(bench)
    assert not bench.replicas[1].requests


async def test_a_fault_on_our_side_is_not_the_replicas() -> None:
    bench = Bench([FakeReplica([errors.DependencyUnavailable("no token")]), FakeReplica()])
    with pytest.raises(errors.DependencyUnavailable):
        await collect(bench)
    assert not bench.replicas[1].requests


async def test_count_tokens() -> None:
    bench = Bench([FakeReplica()])
    async with bench.call() as record:
        found = await bench.completions.count_tokens(record, ValidPrompt("echo-1", Prompt(text="hi")))
    assert found.prompt_tokens == 7
    assert only_outcome(bench) == (Outcome.SUCCEEDED, "")


async def test_r11_two_permits_and_a_hundred_waves_of_ten() -> None:
    for _wave in range(100):
        gate = Gate()
        replica = FakeReplica([gate, *answer("a")])
        bench = Bench([replica], max_concurrent=2)
        tasks = [asyncio.create_task(collect(bench)) for _ in range(10)]
        refused, _ = await asyncio.wait(tasks, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        while len(refused) < 8:
            done, _ = await asyncio.wait(
                set(tasks) - refused, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            assert done
            refused |= done
        assert all(isinstance(task.exception(), errors.ConcurrencyLimit) for task in refused)
        for _ in range(2):
            await asyncio.wait_for(gate.arrivals.acquire(), TIMEOUT_S)
        gate.open.set()
        await asyncio.wait(set(tasks) - refused, timeout=TIMEOUT_S)
        assert replica.most_running == 2
        assert len(bench.audit.ended) == 10
        assert len(bench.audit.started) == 2
        assert bench.admission.running == 0
