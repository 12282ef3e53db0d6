"""The response cache in the use case: what is served from it, and what reaches an engine."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import structs

from services.gateway.generation import (
    Delta,
    EngineStarted,
    Finished,
    FinishReason,
    Sampling,
    Started,
    Usage,
)
from services.mesh import errors
from services.mesh.decision import PolicyEngine
from services.mesh.errors import LlmosError
from services.mesh.events import Outcome
from services.mesh.policy import BUILT_IN_PLANS, BUILT_IN_ROLES, PolicyDocument, TenantPolicy
from tests.framework.cached import asked, bench_of, computed
from tests.framework.gateway_fakes import (
    ALICE,
    MODEL,
    NOBODY,
    Bench,
    FakeReplica,
    FixedPolicy,
    Gate,
    Step,
    answer,
    generation,
)

SAMPLED = Sampling(seed=42, seed_is_assigned=True)


async def test_an_equal_request_is_served_from_the_cache() -> None:
    bench = bench_of()
    first = await asked(bench).run()
    assert (first.status, first.metadata.get("age")) == ("miss", None)
    await bench.clock.advance(7.9)  # type: ignore[attr-defined]
    second = await asked(bench).run()
    assert computed(bench) == 1
    assert (second.status, second.metadata["age"]) == ("hit", "7")
    assert second.text == first.text == "Hello world"
    started, *deltas, finished = second.events
    assert isinstance(started, Started)
    assert started == Started(second.ended.facts.request_id, "echo-1", "rev-1", 42)
    assert [delta.seq for delta in second.deltas] == [1]
    assert len(deltas) == 1
    assert second.deltas[0].token_ids == (100, 101)
    assert finished == first.events[-1] == Finished((FinishReason.STOP,), Usage(7, 2, 3))
    assert (bench.cache.counts.hits, bench.cache.counts.misses, bench.cache.counts.bypasses) == (1, 1, 0)


async def test_a_hit_is_audited_as_one_and_settles_no_tokens() -> None:
    bench = bench_of()
    first, second = await asked(bench).run(), await asked(bench).run()
    assert not first.ended.served_from_cache
    assert first.ended.usage.completion_tokens == 2
    ended = second.ended
    assert (ended.outcome, ended.served_from_cache, ended.replica) == (Outcome.SUCCEEDED, True, "")
    assert (ended.usage.prompt_tokens, ended.usage.completion_tokens) == (0, 0)
    assert (ended.model_revision, ended.finish_reasons) == ("rev-1", (FinishReason.STOP,))
    assert ended.time_to_first_token_s is not None
    assert [event.facts.request_id for event in bench.audit.started][-1] == ended.facts.request_id


async def test_a_hit_needs_no_permit() -> None:
    bench = bench_of(max_concurrent=1)
    await asked(bench).run()
    async with bench.permit():
        assert (await asked(bench).run()).status == "hit"


@pytest.mark.parametrize("sampling", [SAMPLED, structs.replace(SAMPLED, temperature=0.7)])
async def test_what_may_come_out_otherwise_passes_the_cache_by(sampling: Sampling) -> None:
    bench = bench_of()
    for _ in range(2):
        assert (await asked(bench, sampling=sampling).run()).status == "bypass"
    assert (computed(bench), bench.cache.counts.bypasses, bench.cache.held_bytes) == (2, 2, 0)


async def test_a_greedy_request_hits_whatever_seed_was_assigned_and_names_its_own() -> None:
    bench = bench_of()
    await asked(bench, sampling=structs.replace(SAMPLED, temperature=0)).run()
    second = await asked(bench, sampling=structs.replace(SAMPLED, temperature=0, seed=43)).run()
    assert second.status == "hit"
    assert isinstance(second.events[0], Started)
    assert second.events[0].seed == 43


@pytest.mark.parametrize(
    ("said", "statuses"),
    [
        ("no-cache", ("miss", "miss", "hit")),
        ("no-store", ("bypass", "bypass", "miss")),
        ("max-age=4", ("miss", "miss", "hit")),
        ("max-age=5", ("miss", "hit", "hit")),
        ("max-age=soon", ("miss", "miss", "hit")),
        ("Max-Age = 60 , no-transform", ("miss", "hit", "hit")),
        ("no-cache, no-store", ("bypass", "bypass", "miss")),
    ],
)
async def test_the_caller_may_say_what_it_wants(said: str, statuses: tuple[str, ...]) -> None:
    bench = bench_of()
    found = [(await asked(bench, said).run()).status]
    await bench.clock.advance(5)  # type: ignore[attr-defined]
    found += [(await asked(bench, said).run()).status, (await asked(bench).run()).status]
    assert tuple(found) == statuses


async def test_only_if_cached_reaches_no_engine() -> None:
    bench = bench_of()
    for request in (asked(bench, "only-if-cached"), asked(bench, "only-if-cached", sampling=SAMPLED)):
        with pytest.raises(errors.NotCached, match="only-if-cached"):
            await request.run()
        assert request.ended.outcome is Outcome.REJECTED
    assert computed(bench) == 0
    await asked(bench).run()
    assert (await asked(bench, "only-if-cached").run()).status == "hit"
    with pytest.raises(errors.NotCached):
        await asked(bench, "only-if-cached, max-age=0, no-cache").run()


async def test_without_a_cache_nothing_is_kept_nor_said() -> None:
    bench = Bench([FakeReplica()])
    for _ in range(2):
        assert "x-llmos-cache" not in (await asked(bench).run()).metadata
    assert computed(bench) == 2
    with pytest.raises(errors.NotCached):
        await asked(bench, "only-if-cached").run()


async def test_tenants_share_nothing_and_clients_of_one_do() -> None:
    bob = structs.replace(ALICE, tenant_id="bolt", client_id="bob")
    document = PolicyDocument(
        BUILT_IN_ROLES, (), (TenantPolicy("acme"), TenantPolicy("bolt")), BUILT_IN_PLANS
    )
    bench = bench_of(policy=FixedPolicy(PolicyEngine(document)))
    await asked(bench).run()
    assert (await asked(bench, identity=bob).run()).status == "miss"
    assert (await asked(bench, identity=structs.replace(ALICE, client_id="anna")).run()).status == "hit"
    assert computed(bench) == 2


async def test_who_may_not_ask_gets_no_hit() -> None:
    bench = bench_of()
    await asked(bench).run()
    refused = asked(bench, identity=NOBODY)
    with pytest.raises(errors.ScopeMissing):
        await refused.run()
    assert not refused.metadata


async def test_an_answer_of_another_revision_or_other_numerics_is_not_served() -> None:
    started = EngineStarted("rev-1", 7, "replica-0", numerics_id="bf16")
    bench = bench_of([started, *answer("Hi")[1:]])
    await asked(bench).run()
    replica = bench.router._replicas[0]  # what a probe that finds another model there would write
    for model, status in (
        (structs.replace(MODEL, numerics_id="bf16"), "hit"),
        (structs.replace(MODEL, numerics_id="int8"), "miss"),
        (structs.replace(MODEL, revision="rev-2"), "miss"),
        (MODEL, "hit"),
    ):
        replica.models[MODEL.id] = model
        assert (await asked(bench).run()).status == status


async def test_hits_are_served_while_the_replicas_are_away() -> None:
    bench = bench_of()
    await asked(bench).run()
    bench.replicas[0].healthy = False
    bench.router.lost(bench.router._replicas[0])
    assert (await asked(bench).run()).status == "hit"
    with pytest.raises(errors.NoReplica):
        await asked(bench, "no-cache").run()


BROKEN: list[Step] = [*answer("Hel", "lo")[:-1], errors.EngineFault("broken")]


@pytest.mark.parametrize("script", [BROKEN, answer("Hel", "lo")[:-1], [errors.Overloaded("full")]])
async def test_only_whole_answers_are_kept(script: list[Step]) -> None:
    bench = bench_of(script, answer("Hello"))
    with pytest.raises(LlmosError):
        await asked(bench).run()
    second = await asked(bench).run()
    assert (second.status, second.text) == ("miss", "Hello")
    assert bench.cache._flights.held_bytes == len(bench.cache._flights) == 0


async def test_an_answer_that_was_cancelled_is_not_kept() -> None:
    gate = Gate()
    bench = bench_of([*answer("Hel")[:-1], gate, *answer("lo", first_seq=2)[1:]])
    first = asyncio.create_task(asked(bench).run())
    await gate.reached.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    gate.open.set()
    assert (await asked(bench).run()).status == "miss"


async def test_too_long_an_answer_is_not_kept() -> None:
    bench = bench_of(answer("long " * 400), max_entry_bytes=1024)
    assert [(await asked(bench).run()).status for _ in range(2)] == ["miss", "miss"]


async def test_choices_and_logprobs_come_back_as_they_were() -> None:
    bench = bench_of([
        EngineStarted("rev-1", 7, "replica-0"),
        Delta(1, 1, "b", (5, 6)),
        Delta(2, 0, "a", (7,)),
        Delta(3, 1, "B", ()),
        Finished((FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP), Usage(7, 3)),
    ])  # fmt: skip
    whole = []
    for _ in range(2):
        async with bench.call() as record:
            whole.append(await bench.completions.generate(record, generation(n=3)))
    assert whole[0].choices == whole[1].choices
    assert whole[0].usage == whole[1].usage
    assert computed(bench) == 1
