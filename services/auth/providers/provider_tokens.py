"""Proves who holds a token of a corporate identity provider, and with which roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.auth.providers import claims, foreign_token, signature
from services.auth.providers.discovery import Directory
from services.auth.providers.fetching import Fetcher
from services.auth.providers.foreign_token import refuse
from services.auth.store import IdentityProvider, Kind, Store
from services.mesh.clock import Clock
from services.mesh.errors import PolicyDenied
from services.mesh.policy import BUILT_IN_ROLES

MAX_ROLES = 32
"""As many as an identity can have."""

_BUILT_IN = frozenset(role.role_id for role in BUILT_IN_ROLES)


@dataclass(frozen=True, slots=True)
class ProvenPerson:
    """Someone that a provider vouches for."""

    provider: IdentityProvider
    subject: str
    """Unique and never given to another within the provider: 1 to 255 printable ASCII characters."""
    roles: frozenset[str]
    """At least one; they exist, or did a moment ago."""
    display_name: str
    """For people to read; at most 256 characters."""


class ProviderTokens:
    """Verifies tokens of the providers in the store; a component. `own_issuer` is ours: its tokens are
    never taken here, whatever an administrator has configured."""

    def __init__(self, store: Store, clock: Clock, fetcher: Fetcher, *, own_issuer: str) -> None:
        self._store = store
        self._clock = clock
        self._own_issuer = own_issuer
        self._directory = Directory(fetcher, clock)

    async def start(self) -> None:
        """Nothing: keys are fetched when a token needs them, and a provider that is away stops no start."""

    async def stop(self) -> None:
        await self._directory.close()

    async def verify(self, token: str) -> ProvenPerson:
        """Who holds the token (RFC 8693: the subject token).

        Raises CredentialInvalid, also for an issuer that is not configured or is disabled, without asking
        anybody; CredentialExpired; PolicyDenied where none of its claims gives a role; DependencyUnavailable
        where the provider's keys cannot be had, and what the store raises.
        """
        foreign = foreign_token.parse(token)
        provider = None
        if foreign.issuer != self._own_issuer:
            provider = await self._store.find_provider(foreign.issuer)
        if provider is None or provider.disabled:
            refuse("its issuer is not one that this platform trusts")
        key = await self._directory.key(provider.issuer, foreign.kid, foreign.algorithm)
        if key is None:
            refuse("its key is not known, or not for its algorithm")
        signature.verify(foreign, key)
        subject = claims.check(foreign.claims, provider, self._clock.now().timestamp())
        wanted = provider.default_roles | claims.mapped_roles(foreign.claims, provider.claim_rules)
        roles = await self._existing(wanted)
        if not roles:
            raise PolicyDenied(
                "Your identity provider says who you are, and nothing that gives you a role here.",
                hint="Ask your administrator for a group that has a role.",
            )
        # never some of them: a role that is left out might be one that denies
        if len(roles) > MAX_ROLES:
            raise PolicyDenied(
                f"Your groups give you more than {MAX_ROLES} roles.",
                hint="Ask your administrator for fewer, larger roles.",
            )
        return ProvenPerson(provider, subject, roles, claims.display_name(foreign.claims, subject))

    async def _existing(self, role_ids: Iterable[str]) -> frozenset[str]:
        return frozenset([role_id for role_id in role_ids if await self._exists(role_id)])

    async def _exists(self, role_id: str) -> bool:
        return role_id in _BUILT_IN or await self._store.get(Kind.ROLE, role_id) is not None
