"""Where a webhook may lead to: never to what only this gateway can reach, such as loopback, the networks of
the deployment, or the metadata service of a cloud."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from services.mesh.errors import DependencyUnavailable, PolicyDenied
from services.mesh.policy import Network

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]
"""(host, port) -> its addresses. Raises OSError where there are none."""

_NAT64 = IPv6Network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are an IPv4 address."""
_UNICAST = IPv6Network("2000::/3")


async def resolve(host: str, port: int) -> Sequence[Address]:
    """By the system's resolver."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(entry[4][0]) for entry in found]


class WebhookAddresses:
    """Chooses the address to connect to. `allowed`: networks that webhooks may lead to although they are not
    public."""

    def __init__(self, allowed: Sequence[Network] = (), lookup: Resolve = resolve) -> None:
        self._allowed = tuple(allowed)
        self._resolve = lookup

    async def choose(self, host: str, port: int) -> Address:
        """The first address of the host that may be called. The connection must go to it, and not ask for the
        name again. Raises DependencyUnavailable where the name is not found, PolicyDenied where none may be
        called."""
        try:
            found = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise DependencyUnavailable("The webhook's host is not found.") from error
        for address in found:
            if self.may_be_called(address):
                return address
        raise PolicyDenied("The webhook's address is not one that this deployment calls.")

    def may_be_called(self, address: Address) -> bool:
        """Whether it is public, or in a network that is allowed."""
        if isinstance(address, IPv6Address) and address.scope_id:
            return False
        if any(address.version == block.version and address in block for block in self._allowed):
            return True
        return all(map(_is_public, _meant(address)))


def _is_public(address: Address) -> bool:
    """Of IPv6, only what is handed out as global unicast, or leads on to IPv4: the rest may be inside."""
    is_unicast = address.version == 4 or address in _UNICAST or address in _NAT64
    return is_unicast and address.is_global and not address.is_multicast


def _meant(address: Address) -> Sequence[Address]:
    """The address, and those that it carries for a gateway on the way."""
    if isinstance(address, IPv4Address):
        return [address]
    found: list[Address] = [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        found.append(address.sixtofour)
    if address.teredo is not None:
        found.extend(address.teredo)
    if address in _NAT64:
        found.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return found
