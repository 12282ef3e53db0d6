"""Fairness between tenants: what each is served, and that nobody is forgotten."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.admission.claim import Claim
from services.gateway.admission.fair_queue import FairQueue

QUANTUM = 100


@dataclass
class Entry:
    claim: Claim


def entry(tenant: str, tokens: int = 10) -> Entry:
    return Entry(Claim("m", tenant, tenant, tokens, 1, float("inf")))


def served(queue: FairQueue[Entry]) -> list[str]:
    return [queue.pop().claim.tenant_id for _ in range(len(queue))]


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue: FairQueue[Entry] = FairQueue(QUANTUM)
    entries = [entry("a", tokens) for tokens in (500, 1, 90, 10_000, 3)]
    for each in entries:
        queue.push(each)
    assert [queue.pop() for _ in entries] == entries
    assert queue.head() is None
    assert len(queue) == 0


def test_a_newcomer_waits_for_one_turn_of_a_flood() -> None:
    queue: FairQueue[Entry] = FairQueue(QUANTUM)
    for _ in range(100):
        queue.push(entry("flood", 50))
    assert queue.pop().claim.tenant_id == "flood"
    assert queue.ahead_of("quiet") == 1
    queue.push(entry("quiet", 50))
    assert queue.ahead_of("quiet") == 3
    assert served(queue)[:3] == ["flood", "quiet", "flood"]


def test_the_head_stays_while_others_come() -> None:
    queue: FairQueue[Entry] = FairQueue(QUANTUM)
    large = entry("a", 10 * QUANTUM)
    queue.push(large)
    assert queue.head() is large
    queue.push(entry("b", 1))
    assert queue.head() is large


def test_who_leaves_from_the_middle_costs_nobody_anything() -> None:
    queue: FairQueue[Entry] = FairQueue(QUANTUM)
    first, second, third = (entry("a") for _ in range(3))
    for each in (first, second, third):
        queue.push(each)
    queue.remove(second)
    assert (queue.length_of("a"), len(queue)) == (2, 2)
    assert [queue.pop(), queue.pop()] == [first, third]


def test_the_longest_line_gives_way() -> None:
    queue: FairQueue[Entry] = FairQueue(QUANTUM)
    assert queue.newest_of_longest(0) is None
    entries = [entry(tenant) for tenant in ("a", "b", "a", "b", "a")]
    for each in entries:
        queue.push(each)
    assert queue.newest_of_longest(2) is entries[-1]
    assert queue.newest_of_longest(3) is None


@settings(max_examples=200, deadline=None, print_blob=True)
@given(
    costs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 7 * QUANTUM)), min_size=3, max_size=80)
)
def test_who_waits_all_the_time_gets_the_same_work(costs: list[tuple[str, int]]) -> None:
    """Two tenants that have waited since the beginning are apart by a quantum and a request at most."""
    queue: FairQueue[Entry] = FairQueue(QUANTUM)
    left: Counter[str] = Counter()
    for tenant, tokens in costs:
        queue.push(entry(tenant, tokens))
        left[tenant] += 1
    work: Counter[str] = Counter()
    largest = max(tokens for _, tokens in costs)
    while len(queue):
        given_to = queue.pop().claim
        work[given_to.tenant_id] += given_to.tokens
        left[given_to.tenant_id] -= 1
        waiting = [tenant for tenant, count in left.items() if count]
        for one in waiting:
            for other in waiting:
                assert work[one] - work[other] <= QUANTUM + largest
    assert sum(work.values()) == sum(tokens for _, tokens in costs)
