"""Who runs: any mix of arrivals, cancels, deadlines, tenants, priorities and memory comes to its end."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from services.inference.engine import frames
from services.inference.engine.port import Priority, Prompt, Sampling
from services.inference.engine.scheduler import ScheduleLimits
from services.inference.engine.step import PAGE_TOKENS
from tests.framework.loop_bench import POISON, LoopBench, request
from tests.framework.page_model import continuation

GREEDY = Sampling(temperature=0.0)
SMALLEST_POOL_PAGES = 10


@dataclass(frozen=True)
class Arrival:
    at: int
    """Turn of the loop."""
    length: int
    n: int
    max_tokens: int
    cancelled_after: int | None
    timeout_s: float | None
    tenant: str
    priority: Priority
    poisoned: bool
    alike: bool
    """Begins as others do, so that pages are shared."""

    def text(self, number: int) -> str:
        beginning = "" if self.alike else f"{number} "
        return (
            beginning + "w" * self.length + ("!" if number % 2 else "?") + (POISON if self.poisoned else "")
        )


arrivals = st.builds(
    Arrival,
    at=st.integers(0, 30),
    length=st.integers(1, 90),
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 40),
    cancelled_after=st.one_of(st.none(), st.integers(0, 25)),
    timeout_s=st.one_of(st.none(), st.floats(0.1, 20)),
    tenant=st.sampled_from("abc"),
    priority=st.sampled_from(Priority),
    poisoned=st.sampled_from((False, False, False, True)),
    alike=st.booleans(),
)


@settings(max_examples=80, deadline=None, print_blob=True)
@given(
    plan=st.lists(arrivals, min_size=1, max_size=14),
    pages=st.integers(SMALLEST_POOL_PAGES, 60),
    max_running=st.integers(1, 6),
    step_s=st.sampled_from((0.0, 0.05, 0.5)),
)
def test_any_mix_ends_once_and_loses_nothing(
    plan: list[Arrival], pages: int, max_running: int, step_s: float
) -> None:
    limits = ScheduleLimits(max_running=max_running, max_prefill_tokens=48, min_prefill_tokens=8)
    bench = LoopBench(pages=pages, limits=limits)
    bench.step_s = step_s
    for turn in range(60):
        for number, each in enumerate(plan):
            if each.at == turn:
                asked = request(
                    each.text(number),
                    n=min(each.n, max_running),
                    max_tokens=each.max_tokens,
                    sampling=GREEDY,
                    ignore_eos=True,
                    timeout_s=each.timeout_s,
                    tenant=each.tenant,
                    priority=each.priority,
                )
                bench.loop.submit(number, asked)
            if each.cancelled_after is not None and each.at + each.cancelled_after == turn:
                bench.loop.cancel(number)
        bench.turn()  # Bounds are checked there.
    # Nobody is starved: LoopBench.run gives up after many turns, and asserts that no page is held at the end.
    bench.run()
    note(f"{bench.step.steps} steps, {bench.loop.state.preemptions} preemptions")
    assert bench.step.largest_step_tokens <= limits.max_prefill_tokens + max_running
    for number, each in enumerate(plan):
        end = bench.end(number)
        prompt = bench.tokenizer.encode(Prompt(text=each.text(number)))
        match end:
            case frames.JobFinished():
                assert not each.poisoned
                answer = continuation(prompt, each.max_tokens, bench.step.says_below)
                assert bench.tokens(number) == [answer] * min(each.n, max_running)
            case frames.JobFailed(_, "ENGINE_FAULT"):
                assert each.poisoned
            case frames.JobFailed(_, "DEADLINE_EXCEEDED"):
                assert each.timeout_s is not None
            case _:
                assert isinstance(end, frames.JobCancelled)
                assert each.cancelled_after is not None


def test_a_tenant_that_floods_does_not_hold_up_another() -> None:
    bench = LoopBench(limits=ScheduleLimits(max_running=2, max_prefill_tokens=64))
    for job in range(40):
        bench.loop.submit(job, request(f"flood {job}", tenant="flood", max_tokens=4, ignore_eos=True))
    for _ in range(6):
        bench.turn()
    for job in range(100, 104):
        bench.loop.submit(job, request(f"calm {job}", tenant="calm", max_tokens=4, ignore_eos=True))
    bench.run()
    began = bench.started()
    place = [began.index(job) - began.index(100) for job in range(100, 104)]
    assert began.index(100) <= 6, "the calm tenant waited behind the flood"
    assert place[-1] <= 8, f"not every other place was the calm tenant's: {place}"


def test_idleness_is_not_saved_up() -> None:
    bench = LoopBench(limits=ScheduleLimits(max_running=1, max_prefill_tokens=64))
    for job in range(30):
        bench.loop.submit(job, request(f"present {job}", tenant="present", max_tokens=4, ignore_eos=True))
    for _ in range(60):
        bench.turn()
    begun = len(bench.started())
    for job in range(100, 130):
        bench.loop.submit(job, request(f"late {job}", tenant="late", max_tokens=4, ignore_eos=True))
    bench.run()
    late = [job >= 100 for job in bench.started()[begun : begun + 20]]
    assert 8 <= sum(late) <= 12, "the two share from now on"


def test_interactive_goes_before_batch_and_takes_its_place() -> None:
    bench = LoopBench(limits=ScheduleLimits(max_running=2, max_prefill_tokens=64))
    for job in range(3):
        asked = request(f"batch {job}", priority=Priority.BATCH, max_tokens=30, ignore_eos=True)
        bench.loop.submit(job, asked)
    for _ in range(5):
        bench.turn()
    for job in (10, 11):
        bench.loop.submit(job, request(f"now {job}", max_tokens=3, ignore_eos=True))
    bench.turn()
    assert bench.started() == [0, 1, 10, 11]
    bench.run()
    ends = [event.job for event in bench.events if isinstance(event, frames.JobFinished)]
    assert sorted(ends[:2]) == [10, 11]
    assert sorted(ends[2:]) == [0, 1, 2]
    assert bench.loop.state.preemptions == 2


@pytest.mark.parametrize("length", [1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 5 * PAGE_TOKENS])
def test_a_prompt_that_was_computed_before_costs_one_token_and_the_rest_of_a_page(length: int) -> None:
    bench = LoopBench()
    for job in range(2):
        bench.loop.submit(job, request("w" * length, max_tokens=1, sampling=GREEDY))
        bench.step.largest_step_tokens = 0
        bench.run()
    assert bench.step.largest_step_tokens == (length - 1) % PAGE_TOKENS + 1
    assert bench.tokens(0) == bench.tokens(1)
