"""Who may call which method of this service. A method that is not named here is refused to everyone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto

from msgspec import structs

from services.auth.administration.callers import administrator
from services.auth.store import Store
from services.mesh.actions import ACTIONS, OPEN_METHODS
from services.mesh.clock import Clock
from services.mesh.context import Caller, Identity
from services.mesh.decision import Facts, PolicyEngine
from services.mesh.errors import PolicyDenied, ScopeMissing
from services.mesh.tokens import GATEWAY, VerifiedToken, Verifier, asserted_identity, bearer

__all__ = ["OPEN_METHODS", "RULES", "AccessControl", "Rule"]

_TOKENS = "/llmos.auth.v1.TokenService/"
_ADMIN = "/llmos.auth.v1.AdminService/"


class Rule(Enum):
    """What a method asks of its caller."""

    OPEN = auto()
    """Nothing: the request itself is the credential, or the answer is public."""
    SERVICE = auto()
    """A service's own token."""
    GATEWAY = auto()
    """The gateway's own token."""
    ADMINISTRATOR = auto()
    """A token for auth of an administrator, or the gateway's own, with the administrator whom it asserts."""


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(sorted(OPEN_METHODS), Rule.OPEN),
    **{_TOKENS + method: Rule.SERVICE for method in ("VerifyApiKey", "WatchRevocations", "WatchPolicy")},
    # Whoever may call it acts as anybody: only the gateway has seen their credentials.
    _TOKENS + "RenewIdentity": Rule.GATEWAY,
    **{method: Rule.ADMINISTRATOR for method in ACTIONS if method.startswith(_ADMIN)},
}


class AccessControl:
    """This service's authenticator; `verifier` is for the audience of auth."""

    def __init__(
        self,
        verifier: Verifier,
        store: Store,
        clock: Clock,
        revoked: Callable[[Identity], None] | None = None,
    ) -> None:
        """`revoked` is asked for each asserted identity, and raises CredentialRevoked; None: none ever is."""
        self._verifier = verifier
        self._revoked = revoked
        self._store = store
        self._clock = clock

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        """Raises one of the UNAUTHENTICATED errors, PolicyDenied or ScopeMissing."""
        rule = RULES.get(method)
        if rule is Rule.OPEN:
            return Caller()
        verified = await self._verifier.verify(bearer(metadata))
        if rule in (Rule.SERVICE, Rule.GATEWAY):
            if not verified.is_service:
                raise PolicyDenied("Only services may call this method.")
            if rule is Rule.GATEWAY and verified.subject != GATEWAY:
                raise PolicyDenied("Only the gateway may call this method.")
            return Caller(asserted_identity(metadata, verified), verified.subject)
        if rule is Rule.ADMINISTRATOR:
            if verified.is_service:
                return await self._through_gateway(metadata, verified)
            identity = await self._allowed(verified.identity(), method, source_address)
            await self._require_administrator(identity)
            return Caller(identity)
        raise PolicyDenied("Nobody may call this method.")

    async def _through_gateway(self, metadata: Mapping[str, str | bytes], verified: VerifiedToken) -> Caller:
        identity = asserted_identity(metadata, verified)
        if identity is None:
            raise PolicyDenied("A service administers nothing on its own account.")
        if self._revoked is not None:
            self._revoked(identity)
        await self._require_administrator(identity)
        return Caller(identity, verified.subject)

    async def _require_administrator(self, identity: Identity) -> None:
        """By what the store says now: whoever was demoted is out at once, whatever its token still says."""
        await administrator(self._store, identity, self._clock.now(), with_projects=False)

    async def _allowed(self, identity: Identity, method: str, source_address: str) -> Identity:
        """Whoever comes without the gateway, which has decided for all others, with the scopes that policy
        allows now. A proxy in between is not believed what it says of addresses."""
        version, document = await self._store.policy()
        facts = Facts(at=self._clock.now(), address=source_address)
        engine = PolicyEngine(document, version)
        decision = engine.decide(identity, ACTIONS[method], facts)
        if decision.missing_scope:
            raise ScopeMissing(decision.explanation, metadata={"scope": decision.missing_scope})
        if not decision.allowed:
            raise PolicyDenied(decision.explanation)
        return structs.replace(identity, scopes=engine.allowed_scopes(identity, facts))
