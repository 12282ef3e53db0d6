"""The loop over a step whose answers depend on every page: exactness, faults, deadlines, resumption."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine import frames
from services.inference.engine.port import GenerationRequest, Prompt, Sampling
from services.inference.engine.scheduler import ScheduleLimits
from services.inference.engine.step import PAGE_TOKENS
from tests.framework.loop_bench import (
    CONTEXT_TOKENS,
    LIMITS,
    MAX_OUTPUT_TOKENS,
    POISON,
    LoopBench,
    request,
)
from tests.framework.page_model import continuation

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def bench() -> LoopBench:
    return LoopBench()


def test_greedy_is_what_the_model_says(bench: LoopBench) -> None:
    """Through pages, chunks and prefix hits, against the model's rule without any engine."""
    texts = ["short", "a rather long prompt " * 12, "a rather long prompt " * 12 + "with an end", "x"]
    for job, text in enumerate(texts):
        bench.loop.submit(job, request(text, sampling=GREEDY, max_tokens=40, ignore_eos=True))
    bench.run()
    for job, text in enumerate(texts):
        prompt = bench.tokenizer.encode(Prompt(text=text))
        assert bench.tokens(job) == [continuation(prompt, 40, bench.step.says_below)]


def test_a_long_prompt_is_computed_in_chunks_beside_what_decodes(bench: LoopBench) -> None:
    bench.loop.submit(1, request("short", max_tokens=20))
    bench.turn()
    bench.loop.submit(2, request("a rather long prompt " * 20, max_tokens=2))
    for _ in range(3):
        bench.turn()
    assert len(bench.tokens(1)[0]) == 4
    assert not bench.tokens(2)
    bench.run()
    assert [len(tokens) for tokens in bench.tokens(2)] == [2]
    assert bench.step.largest_step_tokens <= LIMITS.max_prefill_tokens + LIMITS.max_running


def test_a_slow_machine_gets_small_chunks() -> None:
    limits = ScheduleLimits(max_running=4, max_prefill_tokens=256, min_prefill_tokens=8, step_target_s=0.1)
    bench = LoopBench(limits=limits)
    bench.step_s = 4.0
    bench.loop.submit(1, request("short", max_tokens=60, ignore_eos=True))
    for _ in range(20):
        bench.turn()
    bench.step.largest_step_tokens = 0
    bench.loop.submit(2, request("a rather long prompt " * 20, max_tokens=2))
    bench.turn()
    assert bench.step.largest_step_tokens == 1 + limits.min_prefill_tokens


def test_first_come_first_served(bench: LoopBench) -> None:
    for job in range(10):
        bench.loop.submit(job, request(f"job {job}"))
    bench.run()
    assert bench.started() == list(range(10))


def test_a_prefix_is_computed_once(bench: LoopBench) -> None:
    shared = "the same beginning for all of them " * 6
    bench.loop.submit(1, request(shared + "one", tenant="a", sampling=GREEDY))
    bench.run()
    bench.loop.submit(2, request(shared + "two", tenant="a", sampling=GREEDY))
    bench.loop.submit(3, request(shared + "one", tenant="b", sampling=GREEDY))
    bench.run()
    cached = {e.job: e.cached_tokens for e in bench.events if isinstance(e, frames.JobStarted)}
    prompt_tokens = len(bench.tokenizer.encode(Prompt(text=shared)))
    assert cached[1] == 0
    assert prompt_tokens - PAGE_TOKENS <= cached[2] <= prompt_tokens
    assert cached[3] == 0, "test_r20: another tenant's prefix was found"
    assert bench.tokens(3) == bench.tokens(1)
    finished = bench.end(2)
    assert isinstance(finished, frames.JobFinished)
    assert finished.cached_tokens == cached[2]
    assert bench.loop.state.prefix_hit_tokens == cached[2]


def test_r17_a_fault_ends_one_job_and_moves_no_other() -> None:
    calm = LoopBench()
    calm.loop.submit(1, request("good"))
    calm.loop.submit(3, request("fine", n=2))
    calm.run()
    stormy = LoopBench()
    stormy.loop.submit(1, request("good"))
    stormy.loop.submit(2, request(f"bad{POISON} in a prompt"))
    stormy.loop.submit(3, request("fine", n=2))
    stormy.loop.submit(4, request("very " * 20 + "bad" + POISON, n=3))
    stormy.run()
    for job in (1, 3):
        assert isinstance(stormy.end(job), frames.JobFinished)
        assert stormy.tokens(job) == calm.tokens(job)
    for job in (2, 4):
        assert stormy.failure(job).reason == "ENGINE_FAULT"
        assert "told to fail" not in stormy.failure(job).message


def test_cancelling_frees_the_pages_before_the_next_step(bench: LoopBench) -> None:
    bench.loop.submit(1, request("one", n=3, max_tokens=50, ignore_eos=True))
    bench.loop.submit(2, request("two", n=2, max_tokens=50, ignore_eos=True))
    for _ in range(3):
        bench.turn()
    assert (bench.loop.running, bench.loop.waiting) == (4, 1)
    bench.loop.cancel(1)
    assert (bench.loop.running, bench.loop.waiting) == (1, 1)
    bench.turn()
    assert (bench.loop.running, bench.loop.waiting) == (2, 0)
    bench.loop.cancel(2)
    assert bench.loop.state.kv_pages_used == 0
    bench.loop.cancel(2)
    bench.loop.cancel(99)
    bench.run()
    assert isinstance(bench.end(1), frames.JobCancelled)
    assert isinstance(bench.end(2), frames.JobCancelled)


def test_r12_a_job_whose_deadline_passed_is_not_started(bench: LoopBench) -> None:
    bench.loop.submit(1, request("one", n=4, max_tokens=50, ignore_eos=True))
    bench.turn()
    bench.turn()
    bench.loop.submit(2, request("two", timeout_s=5.0))
    bench.turn()
    bench.now_s = 5.0
    bench.turn()
    assert bench.failure(2).reason == "DEADLINE_EXCEEDED"
    assert bench.started() == [1]
    assert bench.loop.running == 4


def test_r12_a_job_that_cannot_meet_its_deadline_is_not_started(bench: LoopBench) -> None:
    bench.step_s = 2.0
    bench.loop.submit(1, request("a rather long prompt " * 20))
    bench.run()
    bench.loop.submit(2, request("quite another prompt " * 20, timeout_s=0.5))
    bench.run()
    assert bench.failure(2).reason == "DEADLINE_EXCEEDED"
    assert bench.started() == [1]


def test_a_running_job_ends_at_its_deadline(bench: LoopBench) -> None:
    bench.loop.submit(1, request("one", n=2, timeout_s=5.0, max_tokens=50))
    bench.turn()
    bench.now_s = 5.0
    bench.turn()
    assert bench.failure(1).reason == "DEADLINE_EXCEEDED"
    assert bench.loop.idle
    assert bench.loop.state.kv_pages_used == 0


@pytest.mark.parametrize(
    ("fields", "reason", "field_name"),
    [
        ({"n": LIMITS.max_running + 1}, "REQUEST_INVALID", "spec.n"),
        ({"max_tokens": MAX_OUTPUT_TOKENS + 1}, "REQUEST_INVALID", "spec.max_tokens"),
        ({"stop_token_ids": (257,)}, "REQUEST_INVALID", "spec.stop_token_ids"),
        ({"sampling": Sampling(logit_bias=((257, 1.0),))}, "REQUEST_INVALID", "spec.sampling.logit_bias"),
        ({"delivered": ((257,),)}, "REQUEST_INVALID", "delivered"),
        ({"delivered": ((2, 5),)}, "REQUEST_INVALID", "delivered"),
        ({"prompt": Prompt(text="w" * CONTEXT_TOKENS)}, "CONTEXT_LENGTH_EXCEEDED", None),
    ],
)
def test_r16_a_bad_request_never_reaches_the_model(
    bench: LoopBench, fields: dict[str, object], reason: str, field_name: str | None
) -> None:
    bench.loop.submit(1, replace(request("text"), **fields))  # type: ignore[arg-type]
    bench.run()
    failure = bench.failure(1)
    assert failure.reason == reason
    assert [name for name, _ in failure.violations] == ([field_name] if field_name else [])
    assert bench.step.steps == 0


def test_max_tokens_is_what_is_left_where_nothing_is_said(bench: LoopBench) -> None:
    prompt = "w" * (CONTEXT_TOKENS - 20)
    bench.loop.submit(1, request(prompt, max_tokens=None, ignore_eos=True))
    bench.loop.submit(2, request("short", max_tokens=None, ignore_eos=True))
    bench.run()
    left = CONTEXT_TOKENS - len(bench.tokenizer.encode(Prompt(text=prompt)))
    assert len(bench.tokens(1)[0]) == left
    assert len(bench.tokens(2)[0]) == MAX_OUTPUT_TOKENS


def test_choices_differ_by_their_number_alone(bench: LoopBench) -> None:
    bench.loop.submit(1, request("tell me", n=4, max_tokens=12, ignore_eos=True))
    bench.run()
    tokens = bench.tokens(1)
    assert len({tuple(each) for each in tokens}) == 4
    alone = LoopBench()
    alone.loop.submit(1, request("tell me", n=2, max_tokens=12, ignore_eos=True))
    alone.run()
    assert alone.tokens(1) == tokens[:2]


def test_preemption_is_not_seen_in_the_answer() -> None:
    plan = [request(f"prompt {n} " * 4, n=2, max_tokens=60, ignore_eos=True) for n in range(4)]
    roomy, tight = LoopBench(), LoopBench(pages=12)
    for bench in (roomy, tight):
        for job, each in enumerate(plan):
            bench.loop.submit(job, each)
        bench.run()
    assert roomy.loop.state.preemptions == 0
    assert tight.loop.state.preemptions > 0
    for job in range(len(plan)):
        assert tight.tokens(job) == roomy.tokens(job)


resumptions = st.tuples(
    st.sampled_from(("greedy", "seeded", "penalised")),
    st.integers(1, 2),  # choices
    st.lists(st.integers(0, 40), min_size=2, max_size=2),  # where each choice is cut
    st.sampled_from(((), ("e",), ("ing", "th"))),
)
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": Sampling(seed=11, temperature=1.5),
    "penalised": Sampling(
        seed=3, temperature=1.2, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4
    ),
}


@settings(max_examples=60, deadline=None)
@given(resumptions)
def test_r05_what_was_delivered_is_gone_on_from(plan: tuple[str, int, list[int], tuple[str, ...]]) -> None:
    kind, n, cuts, stop = plan
    whole = LoopBench()
    asked = request("tell me something", n=n, max_tokens=40, sampling=SAMPLINGS[kind], stop=stop)
    whole.loop.submit(1, asked)
    whole.run()
    # What the reader had when the replica was lost: all deltas of the first tokens of each choice.
    deltas = [e for e in whole.of(1) if isinstance(e, frames.JobDelta)]
    had = [[d for d in deltas if d.choice == index][:cut] for index, cut in zip(range(n), cuts, strict=False)]
    delivered = tuple(tuple(token for d in each for token in d.token_ids) for each in had)
    resumed = LoopBench()
    resumed.loop.submit(1, replace(asked, delivered=delivered))
    resumed.run()
    assert resumed.end(1) == whole.end(1)
    for index in range(n):
        rest = [e for e in resumed.of(1) if isinstance(e, frames.JobDelta) and e.choice == index]
        tokens = [token for d in (*had[index], *rest) for token in d.token_ids]
        assert tokens == whole.tokens(1)[index]
        assert "".join(d.text for d in (*had[index], *rest)) == whole.text(1, index)


jobs = st.lists(
    st.tuples(
        st.integers(0, 12),  # submitted before this turn
        st.integers(1, 60),  # length of the prompt
        st.integers(1, 3),  # choices
        st.integers(1, 40),  # max_tokens
        st.one_of(st.none(), st.integers(0, 20)),  # cancelled so many turns later
        st.booleans(),  # poisoned
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(jobs, st.sampled_from((12, 128)))
def test_r20_neighbours_joins_leaves_and_preemption_move_nothing(
    plan: list[tuple[int, int, int, int, int | None, bool]], pages: int
) -> None:
    def asked(number: int) -> GenerationRequest:
        _, length, n, most, _, poisoned = plan[number]
        text = f"{number} " + "w" * length + "." + (POISON if poisoned else "")
        return request(text, n=n, max_tokens=most, ignore_eos=True)

    bench = LoopBench(pages=pages)
    for turn in range(34):
        for number, (at, _, _, _, cancelled, _) in enumerate(plan):
            if at == turn:
                bench.loop.submit(number, asked(number))
            if cancelled is not None and at + cancelled == turn:
                bench.loop.cancel(number)
        bench.turn()
    bench.run()
    for number, (_, _, n, most, cancelled, poisoned) in enumerate(plan):
        end = bench.end(number)
        alone = LoopBench()
        alone.loop.submit(number, asked(number))
        alone.run()
        if isinstance(end, frames.JobFinished):
            assert not poisoned
            assert bench.tokens(number) == alone.tokens(number)
            assert [len(tokens) for tokens in bench.tokens(number)] == [most] * n
        elif isinstance(end, frames.JobFailed):
            assert poisoned
        else:
            assert cancelled is not None
            for cut, full in zip(bench.tokens(number), alone.tokens(number), strict=False):
                assert full[: len(cut)] == cut
