"""What may be granted to whom. Pure: no store, no clock. What is not named here is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from services.mesh.access_token import SERVICE_PREFIX, Audience
from services.mesh.errors import PolicyDenied, RequestInvalid, ScopeMissing, Violation

ADMIN = "admin"
SCOPES: Mapping[str, str] = {
    "generate": "generate text, and count tokens",
    "models.read": "list models",
    "audit.read": "read the audit log of one's tenant",
    ADMIN: "manage tenants, clients and keys, and read across tenants",
}
"""All scopes that exist, and what they allow."""

SERVICES = ("gateway", "auth", "inference", "logging")
_SERVICE_AUDIENCES: Mapping[str, frozenset[Audience]] = {
    "gateway": frozenset({Audience.AUTH, Audience.INFERENCE, Audience.LOGGING}),
    "auth": frozenset({Audience.LOGGING}),
    "inference": frozenset({Audience.AUTH, Audience.LOGGING}),
    "logging": frozenset({Audience.AUTH}),
}
"""Who may call whom: only the gateway calls inference; all report to logging."""


def check_scopes(scopes: Collection[str]) -> None:
    """Raises RequestInvalid, which names the scopes that do not exist."""
    unknown = sorted(set(scopes) - SCOPES.keys())
    if unknown:
        raise RequestInvalid(
            "There is no such scope.",
            hint=f"The scopes are {', '.join(sorted(SCOPES))}.",
            violations=[Violation("scopes", f"`{scope[:64]}` is not a scope") for scope in unknown],
        )


def granted(
    client_id: str, held: frozenset[str], audience: Audience, wanted: Collection[str]
) -> frozenset[str]:
    """The scopes of a token for this client and audience; `wanted` empty asks for all that it holds.

    Raises RequestInvalid, ScopeMissing and PolicyDenied.
    """
    check_scopes(wanted)
    name = client_id.removeprefix(SERVICE_PREFIX)
    if name != client_id:
        if audience not in _SERVICE_AUDIENCES.get(name, frozenset()):
            raise PolicyDenied(f"The service {name} has no business with {audience}.")
        if wanted:
            raise ScopeMissing("A service holds no scopes.", metadata={"scope": min(wanted)})
        return frozenset()
    missing = sorted(set(wanted) - held)
    if missing:
        raise ScopeMissing(f"The client lacks the scope `{missing[0]}`.", metadata={"scope": missing[0]})
    scopes = frozenset(wanted) or held
    if audience is Audience.GATEWAY:
        return scopes
    if audience is Audience.AUTH:
        if ADMIN not in scopes:
            raise ScopeMissing("A token for auth needs the scope `admin`.", metadata={"scope": ADMIN})
        return scopes
    raise PolicyDenied(f"Only services get tokens for {audience}.")
