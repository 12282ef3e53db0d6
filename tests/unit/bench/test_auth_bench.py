"""`make bench-auth`, as short as it can be: it ends, and judges rightly. No times are held to anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.dev.environment import ROOT
from services.mesh.decision import PolicyEngine
from tests.bench import auth, report
from tests.bench.auth import (
    ACTION,
    ALL_TOKENS,
    ANY_TOKEN,
    DECISION,
    EDGE,
    EXCHANGE,
    KEY,
    LARGE,
    SMALL,
    TOKEN,
    UNCACHED,
    Size,
    judge,
)
from tests.bench.auth_subjects import AT_WORK, deployment, shapes, tenants_policy

SUBJECTS = (TOKEN, UNCACHED, KEY, EDGE, EXCHANGE, DECISION, ALL_TOKENS, ANY_TOKEN)


async def test_it_measures_all_and_says_its_aims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    monkeypatch.setattr(report, "write", lambda name, content: ROOT / "bench-results" / name)
    size = Size(rounds=1, calls=10, rules=20, tenants=3, keys=30)
    tables, aims = await auth.bench(size, tmp_path, print)
    report.show(tables, aims)
    shapes_judged = [aim.name for aim in aims if aim.name.startswith("decision_us_")]
    assert len(shapes_judged) == len(list(shapes(1))) == 7
    assert [aim.name for aim in aims if aim.name.startswith("many_")] == [
        "many_token_cached",
        "many_tokens_all_in_turn",
        "many_token_uncached",
        "many_api_key_cached",
        "many_decision",
        "many_key_exchange",
    ]
    assert [table.row_count for table in tables] == [7, len(SUBJECTS)]
    assert "aim cached_token_us" in capsys.readouterr().out


def test_the_judgement() -> None:
    us = 1e-6
    small = {name: [10 * us] * 3 for name in SUBJECTS}
    large = {name: [11 * us] * 3 for name in SUBJECTS} | {UNCACHED: [220 * us] * 3}
    aims = {
        aim.name: aim
        for aim in judge({"models": [9 * us], "labels": [11 * us]}, {SMALL: small, LARGE: large})
    }
    assert aims["cached_token_speedup"].measured.median == pytest.approx(20)
    assert aims["cached_token_us"].met
    assert aims["decision_us_models"].met
    assert not aims["decision_us_labels"].met
    assert not aims["many_token_uncached"].met
    assert aims["many_decision"].measured.median == pytest.approx(1.1)


@pytest.mark.parametrize("count", [1, 10, 300])
def test_the_shapes_have_so_many_rules_and_decide_what_they_should(count: int) -> None:
    for name, policy in shapes(count):
        document = policy.engine.document
        rules = sum(len(role.rules) for role in document.roles) + len(document.address_rules)
        assert rules in (count, count + 1), name
        decided = [policy.engine.decide(identity, ACTION, facts) for identity, facts in policy.requests]
        assert all(each.allowed for each in decided), name


def test_the_tenants_have_a_rule_each() -> None:
    policy = tenants_policy(50)
    assert isinstance(policy.engine, PolicyEngine)
    assert len({identity.tenant_id for identity, _ in policy.requests}) == AT_WORK
    assert all(policy.engine.decide(identity, ACTION, facts).allowed for identity, facts in policy.requests)


async def test_a_deployments_tokens_are_those_that_it_would_give(tmp_path: Path) -> None:
    async with deployment(tmp_path / "auth.db", tenants=2, api_keys=20) as given:
        verifier, tokens = given.verifier(), given.tokens()
        for key in given.some_keys:
            exchanged = await given.exchange.by_api_key(key)
            assert exchanged.identity is not None
            verified = (await verifier.verify(tokens[key])).identity()
            assert (verified.tenant_id, verified.client_id, verified.key_id, verified.scopes) == (
                exchanged.identity.tenant_id,
                exchanged.identity.client_id,
                exchanged.identity.key_id,
                exchanged.identity.scopes,
            )
