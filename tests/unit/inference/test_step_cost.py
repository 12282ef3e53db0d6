"""What steps cost, learnt; and how much memory the pool of pages takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine.kv_memory import available_bytes, pool_pages
from services.inference.engine.step_cost import StepCost


@settings(max_examples=50, deadline=None)
@given(st.floats(0.001, 0.1), st.floats(1e-5, 0.01), st.integers(0, 2**32))
def test_a_line_is_found(base_s: float, per_token_s: float, seed: int) -> None:
    cost = StepCost()
    for step in range(300):
        tokens = 1 + (seed + step * 7919) % 97
        cost.learn(tokens, base_s + per_token_s * tokens)
    assert cost.seconds(50) == pytest.approx(base_s + per_token_s * 50, rel=0.05)
    assert cost.tokens_within(cost.seconds(50)) in (49, 50)


def test_steps_of_one_size_keep_the_slope_that_was_known() -> None:
    cost = StepCost()
    for tokens in (1, 100) * 100:
        cost.learn(tokens, 0.01 + 0.001 * tokens)
    for _ in range(2000):
        cost.learn(8, 0.02)
    assert cost.seconds(8) == pytest.approx(0.02, rel=0.01)
    assert cost.tokens_within(0.12) == pytest.approx(108, abs=3)


def test_a_slower_machine_is_noticed() -> None:
    cost = StepCost()
    for factor in (1, 3):
        for tokens in (1, 64) * 100:
            cost.learn(tokens, factor * (0.01 + 0.001 * tokens))
    assert cost.seconds(64) == pytest.approx(3 * 0.074, rel=0.1)
    assert cost.tokens_within(0.001) == 0


def test_the_pool_is_bounded_by_need_and_by_memory() -> None:
    sizes = {"max_running": 4, "context_tokens": 160}
    assert pool_pages(1000, **sizes, max_bytes=10**9) == 40
    assert pool_pages(1000, **sizes, max_bytes=7000) == 7
    assert pool_pages(1000, **sizes, max_bytes=1) == 1
    assert (
        1
        <= pool_pages(2**20, max_running=4096, context_tokens=10**6, max_bytes=0)
        < available_bytes() / 2**20
    )


@pytest.mark.parametrize(
    ("limit", "usage", "expected"),
    [("max", "5", 8_000_000 * 1024), ("1000000", "400000", 600_000), ("10", "400", 0)],
)
def test_a_cgroup_leaves_what_it_leaves(tmp_path: Path, limit: str, usage: str, expected: int) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(usage)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    assert available_bytes(tmp_path, meminfo) == expected
