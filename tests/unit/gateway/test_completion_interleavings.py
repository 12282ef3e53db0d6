"""The use case under any script of a replica and any moment of leaving."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.generation import Delta, EngineStarted, Event, Finished, FinishReason, Usage
from services.mesh import errors
from services.mesh.errors import LlmosError
from services.mesh.events import Outcome
from tests.framework.gateway_fakes import Bench, FakeReplica, Step, generation

STARTED = EngineStarted("rev-1", 7, "replica-0")


async def collect(bench: Bench) -> list[Event]:
    async with bench.call() as record, aclosing(bench.completions.stream(record, generation())) as stream:
        return [event async for event in stream]


@settings(max_examples=150, deadline=None, print_blob=True)
@given(
    script=st.lists(
        st.sampled_from(["start", "delta", "gap", "finish", "lost", "fault", "refuse", "late"]),
        max_size=7,
    ),
    cancel_after=st.integers(0, 40),
    cancel_twice=st.booleans(),
    intent_fails=st.booleans(),
)
def test_any_interleaving_leaves_one_outcome(
    script: list[str], cancel_after: int, cancel_twice: bool, intent_fails: bool
) -> None:
    """Whatever the replica does and whenever the caller leaves: one outcome, no permit kept, nothing runs."""

    async def run() -> None:
        seq = 0
        steps: list[Step] = []
        for word in script:
            seq += 1 if word == "delta" else 2 if word == "gap" else 0
            steps.append(
                {
                    "start": STARTED,
                    "delta": Delta(seq, 0, "x", (seq,)),
                    "gap": Delta(seq, 0, "x", (seq,)),
                    "finish": Finished((FinishReason.STOP,), Usage(7, seq)),
                    "lost": errors.ReplicaLost("x"),
                    "fault": errors.EngineFault("x"),
                    "refuse": errors.RequestInvalid("x"),
                    "late": errors.DeadlineExceeded("x"),
                }[word]
            )
        bench = Bench([FakeReplica(steps), FakeReplica(steps)])
        if intent_fails:
            bench.audit.start_error = errors.AuditUnavailable("full")
        task = asyncio.create_task(collect(bench))
        for _ in range(cancel_after):
            await asyncio.sleep(0)
        task.cancel()
        if cancel_twice:
            await asyncio.sleep(0)
            task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        await bench.trail.stop()
        if not bench.audit.ended:
            assert not bench.audit.started  # cancelled before it ran at all
            assert cancel_after == 0
            return
        (ended,) = bench.audit.ended
        outcome, reason = ended.outcome, ended.error_reason
        assert [event.facts.request_id for event in bench.audit.started] in ([], [ended.facts.request_id])
        if isinstance(result, LlmosError):
            assert reason == result.reason
            assert outcome is not Outcome.SUCCEEDED
        elif isinstance(result, list):
            assert outcome is Outcome.SUCCEEDED
        assert bench.admission.running == 0
        assert all(replica.running == 0 for replica in bench.replicas)
        assert all(r.running == 0 for r in bench.router._replicas)

    asyncio.run(run())
