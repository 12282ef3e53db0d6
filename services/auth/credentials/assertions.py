"""`private_key_jwt`: a client proves who it is by a JWT that it has signed (RFC 7523, section 3; RFC 7521).

The client's public keys are registered with it, and a key says which algorithms it is good for: no key or
address of a key is taken from an assertion. Each assertion serves once. Every fault is a `CredentialInvalid`
that repeats nothing of the assertion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn

from services.auth.providers import signature
from services.auth.providers.foreign_token import ForeignToken
from services.auth.store import Store
from services.mesh.clock import Clock
from services.mesh.compact_jws import Malformed, decode, parse_object
from services.mesh.errors import CredentialInvalid

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
MAX_CHARS = 8192
MAX_HEADER_CHARS = 1024
MAX_LIFETIME_S = 3600
"""An assertion may be valid for so long from now, which is what libraries make; its id is remembered until
then, so it serves once all the same."""
LEEWAY_S = 5.0
MAX_AUDIENCES = 4
MAX_KEYS = 16

_ALGORITHMS = frozenset({"RS256", "PS256", "ES256", "EdDSA", "Ed25519"})
_TYPES = frozenset({"jwt", "client-authentication+jwt"})
_HEADER_FIELDS = frozenset({"alg", "typ", "kid", "x5t", "x5t#S256"})
_KID = re.compile(r"[\x20-\x7e]{1,256}")
_TOKEN_ID = re.compile(r"[\x21-\x7e]{1,256}")
_MAX_TIME_S = 2**40


@dataclass(frozen=True, slots=True)
class Assertion:
    """One of the right form, whose claims hold if only its signature does."""

    client_id: str
    token_id: str
    expires_at: datetime
    kid: str
    """Empty: it names no key."""
    algorithm: str
    text: str = field(repr=False)


def refuse(why: str) -> NoReturn:
    """Raises CredentialInvalid with the cause."""
    raise CredentialInvalid(
        f"The client's assertion was refused: {why}.",
        hint="Sign a new one for each request, with a key that is registered for the client.",
    )


def parse(text: str, *, audiences: frozenset[str], now_s: float) -> Assertion:
    """Reads an assertion and checks everything but its signature and whether it was used before.

    Raises CredentialInvalid.
    """
    if len(text) > MAX_CHARS:
        refuse("it is too long")
    segments = text.split(".", 3)
    if len(segments) != 3:
        refuse("it is not a compact JWS of three segments")
    if len(segments[0]) > MAX_HEADER_CHARS:
        refuse("its header is too long")
    try:
        header = parse_object(decode(segments[0]), "header")
        claims = parse_object(decode(segments[1]), "payload")
        decode(segments[2])
    except Malformed as error:
        refuse(str(error))
    algorithm, kid = _check_header(header)
    client_id = _text(claims, "sub")
    if _text(claims, "iss") != client_id:
        refuse("its issuer is not its subject")
    _check_audience(claims.get("aud"), audiences)
    token_id = claims.get("jti")
    if not isinstance(token_id, str) or _TOKEN_ID.fullmatch(token_id) is None:
        refuse("its claim jti is missing or malformed")
    expires_s = _check_times(claims, now_s)
    return Assertion(client_id, token_id, datetime.fromtimestamp(expires_s, UTC), kid, algorithm, text)


def key_of(jwks_json: str, assertion: Assertion) -> signature.Key | None:
    """The registered key that the assertion names, or, where it names none, the only one that fits its
    algorithm; None: there is no such key."""
    try:
        keys = registered_keys(jwks_json)
    except ValueError:
        return None
    if assertion.kid:
        return keys.get(assertion.kid, {}).get(assertion.algorithm)
    fitting = [
        by_algorithm[assertion.algorithm]
        for by_algorithm in keys.values()
        if assertion.algorithm in by_algorithm
    ]
    return fitting[0] if len(fitting) == 1 else None


def registered_keys(jwks_json: str) -> signature.Keys:
    """A client's public keys, by id, then by algorithm; a key without an id gets its place as one.

    Raises ValueError where it is no JWK Set of at most `MAX_KEYS` keys, or holds none that can be used.
    """
    try:
        document = json.loads(jwks_json)
    except RecursionError:
        raise ValueError("the JWK Set is nested too deeply") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ValueError(f"the JWK Set has no list of at most {MAX_KEYS} keys")
    named = [{"kid": str(n), **entry} for n, entry in enumerate(entries) if isinstance(entry, dict)]
    return signature.parse_jwks(json.dumps({"keys": named}).encode())


class Assertions:
    """Proves assertions. `audiences` are what one may be made for: our issuer, and our token endpoint's
    address (RFC 7523, section 3, item 3)."""

    def __init__(self, store: Store, clock: Clock, *, audiences: frozenset[str]) -> None:
        self._store = store
        self._clock = clock
        self._audiences = audiences

    async def prove(self, client_id: str, jwks_json: str, text: str) -> None:
        """Returns where the client has signed this for us and for now, and had not used it yet. `jwks_json`
        empty: there is no such client, or it has no keys.

        Raises CredentialInvalid.
        """
        now = self._clock.now()
        assertion = parse(text, audiences=self._audiences, now_s=now.timestamp())
        key = key_of(jwks_json, assertion) if assertion.client_id == client_id and jwks_json else None
        if key is None or not _is_signed(assertion, key):
            refuse("no key of this client has signed it")
        until = datetime.fromtimestamp(assertion.expires_at.timestamp() + LEEWAY_S, UTC)
        if not await self._store.use_once(f"{client_id} {assertion.token_id}", until=until, now=now):
            refuse("it was used before")


def _is_signed(assertion: Assertion, key: signature.Key) -> bool:
    token = ForeignToken(assertion.client_id, assertion.kid, assertion.algorithm, assertion.text, {})
    try:
        signature.verify(token, key)
    except CredentialInvalid:
        return False
    return True


def _check_header(header: Mapping[str, Any]) -> tuple[str, str]:
    """The algorithm and the key id."""
    if not header.keys() <= _HEADER_FIELDS:
        refuse(f"its header holds other fields than {', '.join(sorted(_HEADER_FIELDS))}")
    algorithm, typ, kid = header.get("alg"), header.get("typ", "JWT"), header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        refuse("its algorithm is not allowed")
    if not isinstance(typ, str) or typ.lower() not in _TYPES:
        refuse("its type is not JWT")
    if kid is None and "kid" not in header:
        return algorithm, ""
    if not isinstance(kid, str) or _KID.fullmatch(kid) is None:
        refuse("its key id is malformed")
    return algorithm, kid


def _check_audience(value: Any, ours: frozenset[str]) -> None:
    """Each must be us: an assertion that another server takes too could be replayed there, or here."""
    audiences = value if isinstance(value, list) else [value]
    if not 0 < len(audiences) <= MAX_AUDIENCES:
        refuse("its claim aud is missing or malformed")
    if not all(isinstance(audience, str) and audience in ours for audience in audiences):
        refuse("it is for another audience")


def _check_times(claims: Mapping[str, Any], now_s: float) -> float:
    """When it ends, in seconds since the epoch."""
    expires_s = _time(claims, "exp")
    if expires_s <= now_s - LEEWAY_S:
        refuse("it has expired")
    if expires_s > now_s + MAX_LIFETIME_S + LEEWAY_S:
        refuse(f"it is valid for more than {MAX_LIFETIME_S} seconds")
    for name in ("nbf", "iat"):
        if name in claims and _time(claims, name) > now_s + LEEWAY_S:
            refuse("it is not valid yet")
    return expires_s


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    # bool is an int in Python; some libraries write fractions (RFC 7519, section 2: NumericDate)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_TIME_S:
        refuse(f"its claim {name} is missing or malformed")
    return float(value)


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 64:
        refuse(f"its claim {name} is missing or malformed")
    return value
