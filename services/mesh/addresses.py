"""Network addresses, and which blocks they are in, without a scan of the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Generic, NamedTuple, TypeVar

from services.mesh.policy import Network

_V = TypeVar("_V")
_MAPPED = IPv6Network("::ffff:0:0/96")
MAX_CHARS = 64
"""Of an address with its zone; what is longer is none, and not remembered as such."""


class Address(NamedTuple):
    """An address, ready to be looked up."""

    version: int
    """4 or 6."""
    number: int
    text: str
    """In its one normal form (RFC 5952)."""


def parse_address(text: str) -> Address | None:
    """The address, or None for what is none, such as the name of a socket.

    An IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2) is the IPv4 address: a listener for both families
    sees IPv4 callers so. A zone (RFC 4007, `%eth0`) is left out.
    """
    return _parsed(text) if len(text) <= MAX_CHARS else None


@lru_cache(maxsize=8192)
def _parsed(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or IPv6Address(int(address))
    return Address(address.version, int(address), str(address))


def unmapped(network: Network) -> Network:
    """The IPv4 block, where a block holds IPv4-mapped IPv6 addresses only."""
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
        low = int(network.network_address) & 0xFFFF_FFFF
        return IPv4Network((low, network.prefixlen - 96))
    return network


class NetworkMap(Generic[_V]):
    """Values by block. A look-up costs one step for each prefix length that occurs, however many blocks there
    are."""

    def __init__(self, entries: Iterable[tuple[Network, _V]] = ()) -> None:
        found: dict[int, dict[int, dict[int, list[_V]]]] = {4: {}, 6: {}}
        for network, value in entries:
            shift = network.max_prefixlen - network.prefixlen
            blocks = found[network.version].setdefault(shift, {})
            blocks.setdefault(int(network.network_address) >> shift, []).append(value)
        self._blocks = {version: list(by_shift.items()) for version, by_shift in found.items()}
        self.empty = not any(self._blocks.values())

    def find(self, address: Address | None) -> list[list[_V]]:
        """The values of each block that holds the address, in the order in which they were given; None is in
        no block."""
        if address is None:
            return []
        number = address.number
        found = []
        for shift, blocks in self._blocks[address.version]:
            values = blocks.get(number >> shift)
            if values is not None:
                found.append(values)
        return found
