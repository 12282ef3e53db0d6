"""What may be granted to whom. Pure: no store, no clock. What is not named here is refused.

A token's scopes are a ceiling: what its bearer could do at all, under whatever conditions. Whether a request
is allowed is decided where it is made, by `services.mesh.decision`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from services.mesh.access_token import SERVICE_PREFIX, Audience
from services.mesh.errors import PolicyDenied, RequestInvalid, ScopeMissing, Violation
from services.mesh.policy import ADMIN, EVERY_SCOPE, SCOPES, TENANT_ADMIN, Effect, Role

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


def reachable(direct: frozenset[str], roles: Iterable[Role]) -> frozenset[str]:
    """The scopes that a client could use: its own, and those that its roles allow, if only sometimes."""
    found = set(direct)
    for role in roles:
        found |= role.scopes
        for rule in role.rules:
            if rule.effect is Effect.ALLOW:
                found |= SCOPES.keys() if EVERY_SCOPE in rule.scopes else rule.scopes
    return frozenset(found & SCOPES.keys())


def granted(
    client_id: str, held: frozenset[str], audience: Audience, wanted: Collection[str]
) -> frozenset[str]:
    """The scopes of a token for this client and audience; `held` are those that it can reach, and `wanted`
    empty asks for all of them.

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
        if not scopes & {ADMIN, TENANT_ADMIN}:
            raise ScopeMissing(
                f"A token for auth needs the scope `{ADMIN}` or `{TENANT_ADMIN}`.", metadata={"scope": ADMIN}
            )
        return scopes
    raise PolicyDenied(f"Only services get tokens for {audience}.")
