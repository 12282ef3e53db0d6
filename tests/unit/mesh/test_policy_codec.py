"""Policy from messages: what is refused, by the name of its field."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_network

import pytest

from services.mesh.errors import RequestInvalid
from services.mesh.policy import (
    AddressRule,
    Condition,
    Effect,
    Role,
    Rule,
    TimeWindow,
)
from services.mesh.policy_codec import (
    address_rule_message,
    address_rule_of,
    network_of,
    role_message,
    role_of,
)

ALLOW, DENY = Effect.ALLOW, Effect.DENY


def rule(rule_id: str, effect: Effect, *times: TimeWindow) -> Rule:
    return Rule(rule_id, effect, frozenset({"generate"}), Condition(times=times))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0.1/8", "has bits set beyond its prefix; the block is `10.0.0.0/8`"),
        ("2001:db8::1/32", "has bits set beyond its prefix; the block is `2001:db8::/32`"),
        ("::ffff:10.0.0.1/104", "has bits set beyond its prefix; the block is `10.0.0.0/8`"),
        *((text, "must be a CIDR block") for text in ("x", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "010.0.0.1")),
        *((text, "must be a CIDR block") for text in ("fe80::1%eth0", "10.0.0.0/", "10.0.0.0/8/8", "", "10")),
    ],
)
def test_bad_blocks_are_refused_with_the_field(text: str, said: str) -> None:
    message = address_rule_message(AddressRule("a", DENY, ip_network("10.0.0.0/8")))
    message.cidr = text
    with pytest.raises(RequestInvalid) as raised:
        address_rule_of(message, "resource.address_rule")
    (violation,) = raised.value.violations
    assert violation.field == "resource.address_rule.cidr"
    assert said in violation.description


def test_good_blocks_are_in_their_normal_form() -> None:
    for text, network in (
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("::1", "::1/128"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::/0", "::/0"),
    ):
        assert str(network_of(text, "f")) == network


BAD: Mapping[str, tuple[dict[str, object], str]] = {
    "zone": ({"time_zone": "Europe/Nowhere"}, "time_zone"),
    "a path": ({"time_zone": "../../etc/passwd"}, "time_zone"),
    "a folder": ({"time_zone": "Europe"}, "time_zone"),
    "no start": ({"start": ""}, "start"),
    "no time": ({"start": "25:00"}, "start"),
    "end of day": ({"start": "24:00"}, "start"),
    "the same": ({"end": "09:00"}, "end"),
    "a day": ({"days": [8]}, "days"),
    "twice": ({"days": [1, 1]}, "days"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_windows_are_refused_with_the_field(name: str) -> None:
    changes, field = BAD[name]
    window = TimeWindow((), 540, 600)
    message = role_message(Role("r", rules=(rule("a", ALLOW), rule("b", DENY, window))))
    target = message.rules[1].condition.times[0]
    for key, value in changes.items():
        if isinstance(value, list):
            getattr(target, key).extend(value)
        else:
            setattr(target, key, value)
    with pytest.raises(RequestInvalid) as raised:
        role_of(message)
    assert raised.value.violations[0].field == f"role.rules[1].condition.times[0].{field}"


def test_rules_of_one_role_have_different_ids() -> None:
    with pytest.raises(RequestInvalid) as raised:
        role_of(role_message(Role("r", rules=(rule("a", ALLOW), rule("a", DENY)))))
    assert raised.value.violations[0].field == "role.rules[1].id"
