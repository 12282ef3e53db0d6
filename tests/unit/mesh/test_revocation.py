"""The list of what is revoked: it refuses what a plain reading of the revocations refuses, and is bounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.mesh.clock import ManualClock
from services.mesh.errors import CredentialRevoked
from services.mesh.policy import RevocationKind
from services.mesh.revocation import Revocation, RevocationList

START = datetime(2030, 1, 1, tzinfo=UTC)
START_S = int(START.timestamp())
LIFE_S = 310.0


def revocation(
    kind: RevocationKind,
    subject_id: str,
    *,
    after_s: float = 0.0,
    version: int = 1,
    cut_streams: bool = False,
) -> Revocation:
    at = START + timedelta(seconds=after_s)
    return Revocation(version, kind, subject_id, at, at + timedelta(seconds=LIFE_S), cut_streams)


def refused(list_: RevocationList, **ids: str | int) -> bool:
    token = {"token_id": "t", "key_id": "k", "client_id": "c", "tenant_id": "acme", "issued_at_s": START_S}
    try:
        list_.check(**(token | ids))  # type: ignore[arg-type]
    except CredentialRevoked:
        return True
    return False


def test_r23_a_token_is_refused_by_its_id_alone() -> None:
    list_ = RevocationList(ManualClock(START))
    list_.apply(True, 1, [revocation(RevocationKind.TOKEN, "t")])
    assert refused(list_)
    assert refused(list_, issued_at_s=START_S + 1)
    assert not refused(list_, token_id="other")


@pytest.mark.parametrize(
    ("kind", "subject_id", "field_"),
    [
        (RevocationKind.API_KEY, "k", "key_id"),
        (RevocationKind.CLIENT, "c", "client_id"),
        (RevocationKind.TENANT, "acme", "tenant_id"),
    ],
)
def test_r23_a_moment_parts_old_tokens_from_new_ones(
    kind: RevocationKind, subject_id: str, field_: str
) -> None:
    list_ = RevocationList(ManualClock(START))
    list_.apply(True, 1, [revocation(kind, subject_id, after_s=7.9)])
    assert refused(list_, issued_at_s=START_S + 7)
    assert not refused(list_, issued_at_s=START_S + 8)
    assert refused(list_, issued_at_s=0)
    assert not refused(list_, **{field_: "other"})
    assert not refused(list_, **{field_: ""})


async def test_r23_what_has_expired_is_forgotten() -> None:
    clock = ManualClock(START)
    list_ = RevocationList(clock)
    list_.apply(True, 1, [revocation(RevocationKind.CLIENT, "c")])
    await clock.advance(LIFE_S - 0.5)
    assert refused(list_, issued_at_s=0)
    await clock.advance(0.5)
    assert not refused(list_, issued_at_s=0)
    list_.apply(False, 1, [])
    assert len(list_) == 0


def test_r23_a_snapshot_replaces_and_an_answer_adds() -> None:
    list_ = RevocationList(ManualClock(START))
    assert not list_.complete
    list_.apply(True, 1, [revocation(RevocationKind.TOKEN, "t")])
    list_.apply(False, 2, [revocation(RevocationKind.API_KEY, "k", version=2)])
    assert list_.complete
    assert refused(list_, key_id="")
    assert refused(list_, token_id="")
    list_.apply(True, 2, [revocation(RevocationKind.API_KEY, "k", version=2)])
    assert not refused(list_, key_id="")
    assert refused(list_)


def test_r23_a_snapshot_in_parts_is_in_force_when_it_is_whole() -> None:
    list_ = RevocationList(ManualClock(START))
    heard: list[str] = []
    list_.on_revoked(lambda each: heard.append(each.subject_id))
    list_.apply(True, 1, [revocation(RevocationKind.TOKEN, "old")])
    assert not list_.apply(True, 3, [revocation(RevocationKind.TOKEN, "a", version=2)])
    assert refused(list_, token_id="old")
    assert not refused(list_, token_id="a")
    assert heard == ["old"]
    assert list_.apply(False, 3, [revocation(RevocationKind.TOKEN, "b", version=3)])
    assert not refused(list_, token_id="old")
    assert refused(list_, token_id="a")
    assert refused(list_, token_id="b")
    assert heard == ["old", "a", "b"]


def test_r23_a_part_of_a_snapshot_that_broke_off_leaves_nothing() -> None:
    list_ = RevocationList(ManualClock(START))
    assert not list_.apply(True, 9, [revocation(RevocationKind.TOKEN, "a")])
    assert not list_.complete
    list_.apply(True, 9, [revocation(RevocationKind.TOKEN, "b", version=9)])
    assert not refused(list_, token_id="a")
    assert refused(list_, token_id="b")


def test_r23_each_revocation_is_told_once_and_again_where_it_cuts() -> None:
    list_ = RevocationList(ManualClock(START))
    heard: list[int] = []
    list_.on_revoked(lambda each: heard.append(each.version))
    first = revocation(RevocationKind.CLIENT, "c")
    list_.apply(True, 1, [first])
    list_.apply(True, 1, [first])
    assert heard == [1]
    # in the same second: it refuses nothing more, but ends what runs
    list_.apply(False, 2, [revocation(RevocationKind.CLIENT, "c", version=2, cut_streams=True)])
    assert heard == [1, 2]


def test_the_list_is_bounded_and_forgets_what_ends_first() -> None:
    list_ = RevocationList(ManualClock(START), max_entries=10)
    many = [revocation(RevocationKind.TOKEN, f"t{n}", after_s=n, version=n + 1) for n in range(30)]
    list_.apply(True, 30, many)
    assert len(list_) == 10
    assert [n for n in range(30) if refused(list_, token_id=f"t{n}")] == list(range(20, 30))


def test_revoking_one_client_over_and_over_takes_no_more_memory() -> None:
    list_ = RevocationList(ManualClock(START))
    list_.apply(True, 0, [])
    for n in range(2_000):
        list_.apply(False, n, [revocation(RevocationKind.CLIENT, "c", after_s=n, version=n)])
    assert len(list_) == 1
    assert len(list_._table._ends) < 100


@dataclass
class _Naive:
    known: list[Revocation] = field(default_factory=list)

    def refused(self, now: datetime, **token: str | int) -> bool:
        return any(each.expires_at > now and each.refuses(**token) for each in self.known)  # type: ignore[arg-type]


_ids = st.sampled_from(["a", "b", "c", ""])
_revocations = st.builds(
    lambda kind, subject_id, after_s: revocation(kind, subject_id, after_s=after_s),
    st.sampled_from(list(RevocationKind)),
    st.sampled_from(["a", "b", "c"]),
    st.floats(0, 30).map(lambda value: round(value, 3)),
)


@settings(deadline=None)
@given(
    answers=st.lists(st.tuples(st.booleans(), st.lists(_revocations, max_size=5)), max_size=8),
    now_s=st.integers(30, 400),
    token=st.fixed_dictionaries(
        {
            "token_id": _ids,
            "key_id": _ids,
            "client_id": _ids,
            "tenant_id": _ids,
            "issued_at_s": st.one_of(st.just(0), st.integers(START_S - 5, START_S + 35)),
        }
    ),
)
async def test_r23_it_refuses_what_a_plain_reading_refuses(
    answers: list[tuple[bool, list[Revocation]]], now_s: int, token: dict[str, str | int]
) -> None:
    clock = ManualClock(START)
    list_, naive = RevocationList(clock), _Naive()
    for snapshot, revocations in answers:
        list_.apply(snapshot, 1, revocations)
        naive.known = [] if snapshot else naive.known
        naive.known += revocations
    await clock.advance(now_s)
    # what was issued after now cannot be: a later revocation is not asked about it
    assert refused(list_, **token) == naive.refused(clock.now(), **token)
