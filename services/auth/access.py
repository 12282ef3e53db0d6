"""Who may call which method of this service. A method that is not named here is refused to everyone."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from services.auth.policy import ADMIN
from services.mesh.context import Caller
from services.mesh.errors import PolicyDenied
from services.mesh.tokens import Verifier, asserted_identity, bearer


class Rule(Enum):
    """What a method asks of its caller."""

    OPEN = auto()
    """Nothing: the request itself is the credential, or the answer is public."""
    SERVICE = auto()
    """A service's own token."""
    ADMINISTRATOR = auto()
    """A token for auth with the scope `admin`."""


RULES: Mapping[str, Rule] = {
    "/llmos.auth.v1.TokenService/IssueToken": Rule.OPEN,
    "/llmos.auth.v1.TokenService/GetJwks": Rule.OPEN,
    "/llmos.auth.v1.TokenService/VerifyApiKey": Rule.SERVICE,
    "/llmos.auth.v1.AdminService/CreateTenant": Rule.ADMINISTRATOR,
    "/llmos.auth.v1.AdminService/CreateClient": Rule.ADMINISTRATOR,
    "/llmos.auth.v1.AdminService/CreateApiKey": Rule.ADMINISTRATOR,
}
OPEN_METHODS = frozenset(method for method, rule in RULES.items() if rule is Rule.OPEN)


class AccessControl:
    """This service's authenticator; `verifier` is for the audience of auth."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        """Raises one of the UNAUTHENTICATED errors, PolicyDenied or ScopeMissing."""
        rule = RULES.get(method)
        if rule is Rule.OPEN:
            return Caller()
        verified = await self._verifier.verify(bearer(metadata))
        if rule is Rule.SERVICE:
            if not verified.is_service:
                raise PolicyDenied("Only services may call this method.")
            return Caller(asserted_identity(metadata, verified), verified.subject)
        if rule is Rule.ADMINISTRATOR:
            identity = verified.identity()
            identity.require(ADMIN)
            return Caller(identity)
        raise PolicyDenied("Nobody may call this method.")
