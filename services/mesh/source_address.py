"""Whose address a call comes from, honest about proxies.

Anybody can send `x-forwarded-for`; what a proxy of ours has appended to it is at its right end. So the header
counts only where the peer is a proxy that the deployment trusts, and is read from the right: past the trusted
proxies, up to the first address that none of them has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.mesh.addresses import NetworkMap, parse_address, unmapped
from services.mesh.policy import Network

FORWARDED_FOR = "x-forwarded-for"


class TrustedProxies:
    """The proxies whose word counts."""

    def __init__(self, networks: Iterable[Network] = ()) -> None:
        self._networks = NetworkMap((unmapped(network), True) for network in networks)

    def source_address(self, peer: str, metadata: Mapping[str, str | bytes]) -> str:
        """The caller's address in its normal form (RFC 5952; IPv4-mapped IPv6 is IPv4), or `peer` as it is
        where that is no address.

        `peer` is the other end of the connection, without port; `metadata` has all lines of a header joined
        by commas. What is malformed ends the reading at the last good address.
        """
        found = parse_address(peer)
        if found is None:
            return peer
        header = metadata.get(FORWARDED_FOR)
        if isinstance(header, str) and not self._networks.empty:
            for entry in reversed(header.split(",")):
                if not self._networks.find(found):
                    break
                before = parse_address(entry.strip())
                if before is None:
                    break
                found = before
        return found.text


NO_PROXIES = TrustedProxies()
