"""The one form of access token that this platform makes and takes, checked before any cryptography.

A JWT of the RFC 9068 profile: compact JWS, header of exactly `alg`, `typ` and `kid`, signed with Ed25519
(the fully specified name of RFC 9864; the older `EdDSA` is refused). The checks here are strict on
purpose: a verifier that takes one form only has no room for confusion of algorithms, for keys or
addresses of keys inside the token, or for two readings of one JSON text. Every fault is a
`CredentialInvalid` that says what was wrong and repeats nothing of the token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_network
from typing import Any, NoReturn

from services.mesh.compact_jws import Malformed, decode, is_base64url, parse_object
from services.mesh.errors import CredentialInvalid
from services.mesh.policy import Network

ALGORITHM = "Ed25519"
TYPE = "at+jwt"
MAX_TOKEN_BYTES = 8 * 1024
MAX_HEADER_CHARS = 512
MAX_LIFETIME_S = 3600
"""No token lives longer; auth's own setting is bounded by it, and verifiers refuse more."""
MAX_SCOPES = 64
MAX_ROLES = 32
MAX_MODELS = 16
MAX_ADDRESSES = 16
SERVICE_PREFIX = "service:"
"""Begins the client id of the platform's own services; no other client's id can hold a colon."""

_SIGNATURE_CHARS = 86  # 64 bytes
_KID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9:-]{0,63}")
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCOPE = re.compile(r"[a-z][a-z._-]{0,63}")
_ROLE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MODEL = re.compile(r"[^\x00\ud800-\udfff]{1,128}")
_ADDRESS = re.compile(r"[0-9a-f:./]{1,64}")
_MAX_TIME = 2**40  # seconds; far beyond any date, and exact as a float


class Audience(StrEnum):
    """Whom a token is for: the `aud` claim."""

    GATEWAY = "llmos-gateway"
    AUTH = "llmos-auth"
    INFERENCE = "llmos-inference"
    LOGGING = "llmos-logging"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a well-formed payload says. Well-formed is not yet verified."""

    issuer: str
    audience: str
    subject: str
    client_id: str
    tenant_id: str
    """Empty for the platform's services, which belong to no tenant."""
    key_id: str
    """Empty where no API key was used."""
    scopes: frozenset[str]
    token_id: str
    issued_at: int
    """Seconds since the epoch, as are the next two."""
    not_before: int
    expires_at: int
    roles: frozenset[str] = frozenset()
    direct_scopes: frozenset[str] | None = None
    """What is granted without condition, whatever the roles say; None: all of `scopes`, as there are no
    roles."""
    models: tuple[str, ...] = ()
    """What an API key is limited to, `*` standing for any characters; empty: no such limit."""
    addresses: tuple[Network, ...] = ()
    """As `models`."""


def refuse(why: str) -> NoReturn:
    """Raises CredentialInvalid with the cause."""
    raise CredentialInvalid(f"The access token was refused: {why}.")


def is_kid(value: object) -> bool:
    return isinstance(value, str) and _KID.fullmatch(value) is not None


def parse_kid(token: str) -> str:
    """Checks a token's outer form and its header, and returns the id of the key that it names.

    Raises CredentialInvalid. Reads no more than the first `MAX_TOKEN_BYTES` characters.
    """
    if len(token) > MAX_TOKEN_BYTES:
        refuse("it is too long")
    segments = token.split(".", 3)
    if len(segments) != 3:
        refuse("it is not a compact JWS of three segments")
    header, _, signature = segments
    if len(header) > MAX_HEADER_CHARS:
        refuse("its header is too long")
    if len(signature) != _SIGNATURE_CHARS:
        refuse("its signature has the wrong length")
    if not all(is_base64url(segment) for segment in segments):
        refuse("it is not base64url")
    fields = _header(header)
    if fields.keys() != {"alg", "typ", "kid"}:
        refuse("its header holds other fields than alg, typ and kid")
    if fields["alg"] != ALGORITHM:
        refuse("its algorithm is not allowed")
    if fields["typ"] != TYPE:
        refuse("its type is not at+jwt")
    kid = fields["kid"]
    if not is_kid(kid):
        refuse("its key id is malformed")
    return str(kid)


def parse_claims(payload: bytes) -> Claims:
    """Reads a payload whose signature has been verified. Raises CredentialInvalid."""
    fields = _object(payload, "payload")
    subject = _text(fields, "sub", _NAME)
    client_id = _text(fields, "client_id", _NAME)
    if subject != client_id:  # RFC 9068, section 5: with client credentials the subject is the client
        refuse("its subject is not its client")
    is_service = subject.startswith(SERVICE_PREFIX)
    tenant_id = "" if is_service and "tenant_id" not in fields else _text(fields, "tenant_id", _NAME)
    key_id = _text(fields, "key_id", _KEY_ID) if "key_id" in fields else ""
    issued_at = _time(fields, "iat")
    scopes = _scopes(fields.get("scope", ""), "scope")
    roles, direct_scopes = _roles(fields, scopes)
    return Claims(
        issuer=_text(fields, "iss"),
        audience=_text(fields, "aud"),
        subject=subject,
        client_id=client_id,
        tenant_id=tenant_id,
        key_id=key_id,
        scopes=scopes,
        token_id=_text(fields, "jti"),
        issued_at=issued_at,
        not_before=_time(fields, "nbf") if "nbf" in fields else issued_at,
        expires_at=_time(fields, "exp"),
        roles=roles,
        direct_scopes=direct_scopes,
        models=_list(fields, "models", _MODEL, MAX_MODELS),
        addresses=_addresses(fields),
    )


def _header(segment: str) -> dict[str, Any]:
    try:
        data = decode(segment)
    except Malformed as error:
        refuse(str(error))
    return _object(data, "header")


def _object(data: bytes, part: str) -> dict[str, Any]:
    try:
        return parse_object(data, part)
    except Malformed as error:
        refuse(str(error))


def _text(fields: dict[str, Any], name: str, form: re.Pattern[str] | None = None) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        refuse(f"its claim {name} is missing or malformed")
    if form is not None and form.fullmatch(value) is None:
        refuse(f"its claim {name} is malformed")
    return str(value)


def _time(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    # bool is an int in Python; a float could be NaN, and none of ours has a fraction
    if type(value) is not int or not 0 <= value < _MAX_TIME:
        refuse(f"its claim {name} is missing or malformed")
    return int(value)


def _scopes(value: object, name: str) -> frozenset[str]:
    if not isinstance(value, str):
        refuse(f"its claim {name} is malformed")
    if not value:
        return frozenset()
    scopes = value.split(" ", MAX_SCOPES)
    if len(scopes) > MAX_SCOPES or any(_SCOPE.fullmatch(scope) is None for scope in scopes):
        refuse(f"its claim {name} is malformed")
    return frozenset(scopes)


def _roles(fields: dict[str, Any], scopes: frozenset[str]) -> tuple[frozenset[str], frozenset[str] | None]:
    """The roles, and the scopes that do not depend on them. Neither claim is taken without the other: were
    `direct_scope` lost, all that only a role's rules allow would be allowed without condition."""
    if ("roles" in fields) != ("direct_scope" in fields):
        refuse("its claims roles and direct_scope do not come together")
    if "roles" not in fields:
        return frozenset(), None
    direct_scopes = _scopes(fields["direct_scope"], "direct_scope")
    if not direct_scopes <= scopes:
        refuse("its claim direct_scope exceeds scope")
    return frozenset(_list(fields, "roles", _ROLE, MAX_ROLES)), direct_scopes


def _list(fields: dict[str, Any], name: str, form: re.Pattern[str], limit: int) -> tuple[str, ...]:
    """A sorted array of different texts; one that would be empty is left out instead."""
    if name not in fields:
        return ()
    values = fields[name]
    if not isinstance(values, list) or not 0 < len(values) <= limit:
        refuse(f"its claim {name} is malformed")
    if not all(isinstance(value, str) and form.fullmatch(value) for value in values):
        refuse(f"its claim {name} is malformed")
    if values != sorted(set(values)):
        refuse(f"its claim {name} is not sorted, or names something twice")
    return tuple(values)


def _addresses(fields: dict[str, Any]) -> tuple[Network, ...]:
    texts = _list(fields, "addresses", _ADDRESS, MAX_ADDRESSES)
    networks: list[Network] = []
    for text in texts:
        try:
            network = ip_network(text)
        except ValueError:
            refuse("its claim addresses is malformed")
        if str(network) != text:
            refuse("its claim addresses is not in canonical form")
        networks.append(network)
    return tuple(networks)
