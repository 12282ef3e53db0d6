"""The audit protocol as a state machine, under seeded crashes, reorderings, wipes and partitions (R27)."""

from __future__ import annotations

import random

import pytest

from services.mesh.audit_protocol import Place, PublishPlan, SequenceTracker, SilenceWatch
from tests.framework import audit_model
from tests.framework.audit_model import ModelWorld, Spool
from tests.framework.audit_trace import play

RUNS = 500


def seeds(count: int) -> range:
    first = random.SystemRandom().randrange(10**9)
    print(f"seeds from {first}, {count} of them")
    return range(first, first + count)


async def test_r27_each_request_has_exactly_one_outcome_after_healing() -> None:
    assert await play(ModelWorld, seeds(RUNS)) == RUNS


async def test_r27_long_lives() -> None:
    assert await play(ModelWorld, seeds(40), steps=600) == 40


async def test_r27_a_wiped_store_ends_without_open_requests_and_is_right_from_then_on() -> None:
    assert await play(ModelWorld, seeds(200), with_store_wipes=True, steps=120) == 200


async def test_r27_power_loss_takes_the_last_commits_and_leaves_nothing_open() -> None:
    runs = await play(lambda: ModelWorld(keeps_history=True), seeds(200), with_power_loss=True, steps=120)
    assert runs == 200


async def test_r27_seeds_that_once_mattered() -> None:
    """Fixed seeds, so that a run of this test is the same everywhere."""
    assert await play(ModelWorld, range(200)) == 200
    assert await play(ModelWorld, range(100), with_store_wipes=True, steps=150) == 100


def _never_again(self: PublishPlan, oldest_held: Place | None, now_s: float) -> bool:
    return False


def _trim_published(held: object, watermarks: object, highest: Place) -> dict[int, int]:
    return {epoch: 10**9 if epoch < highest.epoch else highest.sequence for epoch, _, _ in held}  # type: ignore[attr-defined]


def _holes_do_not_matter(self: SequenceTracker, sequence: int) -> bool:
    self.watermark = max(self.watermark, sequence)
    return True


def _do_not_close(self: Spool) -> None:
    self.begin_epoch(self.epoch + 1)


def _same_epoch(self: Spool) -> None:
    self.epoch = max(self.epoch, 1)
    for request_id in list(self.open):
        self.append(audit_model.Event(request_id, audit_model.ABORTED))
    self.last = 0


def _as_if_heard_from_the_start(self: SilenceWatch, until_s: float) -> None:
    self._listening_since_s = 0.0
    self._read_until_s = until_s


def _settle_at_once(report: object, watermarks: object) -> Place:
    return report.settled_before  # type: ignore[attr-defined, no-any-return]


FAULTS = {
    "the relay never publishes again": (PublishPlan, "confirmed", _never_again),
    "the spool forgets what is only published": (audit_model, "trim_limits", _trim_published),
    "a watermark passes over holes": (SequenceTracker, "add", _holes_do_not_matter),
    "a store that lost its data waits for what is gone": (SequenceTracker, "raise_floor", lambda *_: None),
    "a new life does not close what was open": (Spool, "begin_life", _do_not_close),
    "a new life counts on under the old epoch": (Spool, "begin_life", _same_epoch),
    "nobody is ever fenced": (SilenceWatch, "silent", lambda *_: []),
    "time without hearing counts as silence": (SilenceWatch, "read_all", _as_if_heard_from_the_start),
    "intents are settled before their outcomes arrived": (audit_model, "may_settle", _settle_at_once),
    "intents are never settled": (audit_model, "may_settle", lambda *_: None),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_model_finds_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, broken = FAULTS[fault]
    monkeypatch.setattr(where, name, broken)

    async def all_kinds() -> None:
        await play(ModelWorld, range(400), steps=120)
        await play(ModelWorld, range(400), with_store_wipes=True, steps=250)

    with pytest.raises(AssertionError, match="seed"):
        await all_kinds()
