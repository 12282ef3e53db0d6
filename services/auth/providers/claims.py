"""What a verified token of a provider says: whether it is for us and holds now, and who its holder is.

OpenID Connect Core 1.0, section 3.1.3.7, for ID tokens, and RFC 7519, section 4.1, for JWT access tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from services.auth.providers.foreign_token import refuse
from services.auth.store import ClaimRule, IdentityProvider
from services.mesh.errors import CredentialExpired

LEEWAY_S = 5.0
"""How far the provider's clock and ours may differ."""
MAX_LIFETIME_S = 24 * 3600
MAX_AUDIENCES = 64
MAX_NAME_CHARS = 256

_SUBJECT = re.compile(
    r"[\x20-\x7e]{1,255}"
)  # OpenID Connect Core 1.0, section 2: at most 255 ASCII characters
_MAX_TIME = 2**40  # seconds; far beyond any date, and exact as a float
_NAMES = ("name", "preferred_username", "email")


def check(claims: Mapping[str, Any], provider: IdentityProvider, now_s: float) -> str:
    """The subject, where the token is meant for us and holds at `now_s`, in seconds since the epoch.

    Raises CredentialInvalid and CredentialExpired.
    """
    if claims.get("iss") != provider.issuer:
        refuse("it is from another issuer")
    _check_audience(claims, provider.audience)
    _check_kind(claims)
    subject = claims.get("sub")
    if not isinstance(subject, str) or _SUBJECT.fullmatch(subject) is None:
        refuse("its claim sub is missing or malformed")
    _check_times(claims, now_s)
    return subject


def _check_audience(claims: Mapping[str, Any], ours: str) -> None:
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if not 0 < len(audiences) <= MAX_AUDIENCES or not all(isinstance(one, str) for one in audiences):
        refuse("its claim aud is missing or malformed")
    if ours not in audiences:
        refuse("it is for another audience")
    # several may read such a token: that it was given to us, and not just names us, only `azp` says
    if len(audiences) > 1 and claims.get("azp", ours) != ours:
        refuse("it was given to another party, as its claim azp says")


def _check_kind(claims: Mapping[str, Any]) -> None:
    """Refuses what a provider signs for other purposes with the same key (RFC 8725, section 3.12)."""
    if "events" in claims:  # RFC 8417; a logout token too
        refuse("it reports an event, and proves nobody")
    if (
        "cnf" in claims
    ):  # RFC 7800: its holder has to prove a key of its own, which an exchange cannot ask for
        refuse("it is bound to a key")


def _check_times(claims: Mapping[str, Any], now_s: float) -> None:
    issued_s, expires_s = _time(claims, "iat"), _time(claims, "exp")
    not_before_s = _time(claims, "nbf") if "nbf" in claims else issued_s
    if not 0 < expires_s - issued_s <= MAX_LIFETIME_S:
        refuse("its lifetime is not allowed")
    if max(issued_s, not_before_s) > now_s + LEEWAY_S:
        refuse("it is not valid yet")
    if expires_s + LEEWAY_S <= now_s:
        raise CredentialExpired(
            "The identity provider's token has expired.", hint="Get a new one from your identity provider."
        )


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    # bool is an int in Python; RFC 7519, section 2, allows a fraction, and NaN fails the comparison
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_TIME:
        refuse(f"its claim {name} is missing or malformed")
    return float(value)


def mapped_roles(claims: Mapping[str, Any], rules: Iterable[ClaimRule]) -> frozenset[str]:
    """The roles of the rules whose value is the claim's, or one of its values where it is a list."""
    return frozenset(rule.role_id for rule in rules if _holds(claims, rule))


def _holds(claims: Mapping[str, Any], rule: ClaimRule) -> bool:
    # an address that nobody has checked is whatever its holder has typed
    if rule.claim == "email" and claims.get("email_verified") is not True:
        return False
    said = _lookup(claims, rule.claim)
    return rule.value in said if isinstance(said, list) else said == rule.value


def _lookup(claims: Mapping[str, Any], path: str) -> Any:
    """The claim of that name, or where there is none, what the dots lead to; None where that is nothing."""
    inside: Any = claims
    while isinstance(inside, dict):
        # names may hold dots themselves, as in `https://example.com/groups`
        if path in inside:
            return inside[path]
        name, dot, path = path.partition(".")
        inside = inside.get(name) if dot else None
    return None


def display_name(claims: Mapping[str, Any], subject: str) -> str:
    """What a person would call the holder: for people to read, good for no decision."""
    for claim in _NAMES:
        value = claims.get(claim)
        if isinstance(value, str):
            printable = "".join(character for character in value if character.isprintable()).strip()
            if printable:
                return printable[:MAX_NAME_CHARS]
    return subject
