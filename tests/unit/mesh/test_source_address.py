"""Whose address a call comes from: what a forged header can and cannot do."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.mesh.addresses import parse_address
from services.mesh.source_address import NO_PROXIES, TrustedProxies

PROXIES = TrustedProxies(map(ip_network, ("10.0.0.0/8", "2001:db8:f::/48", "::ffff:192.0.2.0/120")))


@pytest.mark.parametrize(
    ("peer", "header", "found"),
    [
        # the peer is no proxy of ours: the header means nothing
        ("198.51.100.7", "203.0.113.9", "198.51.100.7"),
        ("198.51.100.7", "10.0.0.1", "198.51.100.7"),
        # it is one: what it appended counts, and nothing that stands left of it
        ("10.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "1.1.1.1, 203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "10.9.9.9, 203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "1.1.1.1, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
        ("10.0.0.1", "1.1.1.1,203.0.113.9,10.0.0.2 ,\t10.0.0.3", "203.0.113.9"),
        ("2001:db8:f::1", "2001:db8::7", "2001:db8::7"),
        ("192.0.2.5", "203.0.113.9", "203.0.113.9"),
        # all are ours: the call began at the one farthest off
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        # what is malformed ends the reading
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "unknown", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.9, nonsense, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "203.0.113.9,, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "203.0.113.9:4711", "10.0.0.1"),
        ("10.0.0.1", "1" * 10_000, "10.0.0.1"),
        # IPv4-mapped IPv6 is IPv4, on either side
        ("::ffff:10.0.0.1", "::ffff:203.0.113.9", "203.0.113.9"),
        ("::ffff:198.51.100.7", "203.0.113.9", "198.51.100.7"),
        ("2001:DB8:F:0::1", "2001:DB8:0::7", "2001:db8::7"),
        ("unix", "203.0.113.9", "unix"),
        ("", "203.0.113.9", ""),
    ],
)
def test_the_source_address(peer: str, header: str, found: str) -> None:
    assert PROXIES.source_address(peer, {"x-forwarded-for": header}) == found


def test_without_trusted_proxies_the_header_means_nothing() -> None:
    assert NO_PROXIES.source_address("10.0.0.1", {"x-forwarded-for": "203.0.113.9"}) == "10.0.0.1"
    assert PROXIES.source_address("10.0.0.1", {}) == "10.0.0.1"
    assert PROXIES.source_address("10.0.0.1", {"x-forwarded-for": b"203.0.113.9"}) == "10.0.0.1"


@settings(deadline=None)
@given(st.text(alphabet="0123456789abcdef.:, x%", max_size=60))
def test_whatever_a_caller_sends_the_proxy_appends_the_truth(forged: str) -> None:
    header = f"{forged}, 203.0.113.9" if forged else "203.0.113.9"
    assert PROXIES.source_address("10.0.0.1", {"x-forwarded-for": header}) == "203.0.113.9"


@settings(deadline=None)
@given(st.ip_addresses())
def test_an_address_has_one_normal_form(address: object) -> None:
    parsed = parse_address(str(address))
    assert parsed is not None
    assert parse_address(parsed.text) == parsed
