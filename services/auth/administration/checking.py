"""What a resource must be beyond the rules in the protos. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from datetime import datetime
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from services.auth.credentials.assertions import registered_keys
from services.auth.grants.people import USER_PREFIX
from services.auth.store import ApiKey, Client, IdentityProvider, Resource
from services.auth.stores import shapes
from services.mesh.errors import RequestInvalid, Violation
from services.mesh.policy import EVERY_SCOPE, SCOPES, Role

MAX_CLIENT_KEYS = 8
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
_CLIENT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_PATTERN = re.compile(r"[!-~]{1,128}")


def check(resource: Resource, before: Resource | None, now: datetime) -> None:
    """Raises RequestInvalid, which names the fields. What was so before is not held against a change."""
    kind = shapes.key_of(resource)[0]
    violations = [
        Violation(f"resource.{kind.value}.{name}", description)
        for name, description in _violations(resource, before, now)
    ]
    if violations:
        raise RequestInvalid(
            f"The {shapes.NAMES[kind]} is invalid: {violations[0].field} {violations[0].description}.",
            violations=violations,
        )


def _violations(resource: Resource, before: Resource | None, now: datetime) -> list[tuple[str, str]]:
    match resource:
        case Client():
            was = before if isinstance(before, Client) else None
            return _of_client(resource, was)
        case ApiKey():
            return _of_key(resource, before if isinstance(before, ApiKey) else None, now)
        case Role():
            return _of_role(resource)
        case IdentityProvider():
            return _of_provider(resource)
        case _:
            return []


def _of_client(client: Client, before: Client | None) -> list[tuple[str, str]]:
    found = _scopes("scopes", client.scopes)
    # ids with a colon are made by llmos: its services, and people of identity providers
    is_person = client.client_id.startswith(USER_PREFIX) and client.external_subject
    if before is None and not is_person and _CLIENT_ID.fullmatch(client.client_id) is None:
        found.append(("id", "must be lower-case letters, digits and `-`"))
    if client.jwks_json and (before is None or before.jwks_json != client.jwks_json):
        why = unusable_jwks(client.jwks_json)
        if why:
            found.append(("jwks_json", why))
    return found


def _of_key(key: ApiKey, before: ApiKey | None, now: datetime) -> list[tuple[str, str]]:
    found = _scopes("scopes", key.scopes)
    found += [
        (f"models[{index}]", "must be the id of a model, or a pattern with `*`, without spaces")
        for index, pattern in enumerate(key.models)
        if _PATTERN.fullmatch(pattern) is None
    ]
    is_new_end = before is None or before.expires_at != key.expires_at
    if is_new_end and key.expires_at is not None and key.expires_at <= now:
        found.append(("expire_time", "must be in the future; to end a key now, disable or delete it"))
    return found


def _of_role(role: Role) -> list[tuple[str, str]]:
    found = _scopes("scopes", role.scopes)
    for index, rule in enumerate(role.rules):
        found += _scopes(f"rules[{index}].scopes", rule.scopes - {EVERY_SCOPE})
        found += [
            (f"rules[{index}].condition.models[{place}]", "must be without spaces")
            for place, pattern in enumerate(rule.condition.models)
            if _PATTERN.fullmatch(pattern) is None
        ]
    return found


def _of_provider(provider: IdentityProvider) -> list[tuple[str, str]]:
    try:
        url = urlsplit(provider.issuer)
        host, extra = url.hostname or "", url.query or url.fragment or url.username or url.password
    except ValueError:
        return [("issuer", "must be a URL")]
    if not host or extra:
        return [("issuer", "must be a URL without user, query and fragment")]
    if url.scheme == "https" or (url.scheme == "http" and _is_loopback(host)):
        return []
    return [("issuer", "must begin with https://; http:// is for loopback only")]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _scopes(field: str, scopes: Collection[str]) -> list[tuple[str, str]]:
    return [
        (field, f"`{scope[:64]}` is not a scope; there are {', '.join(sorted(SCOPES))}")
        for scope in sorted(scopes)
        if scope not in SCOPES
    ]


def unusable_jwks(text: str) -> str:
    """Why a JWK Set (RFC 7517) is no set of public keys to prove oneself by; empty: it is one."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "must be JSON"
    keys = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(keys, list) or not 1 <= len(keys) <= MAX_CLIENT_KEYS:
        return f"must be a JWK Set, an object whose `keys` has 1 to {MAX_CLIENT_KEYS} keys"
    for index, key in enumerate(keys):
        why = _unusable_key(key)
        if why:
            return f"keys[{index}] {why}"
    ids = [key["kid"] for key in keys if "kid" in key]
    return "must give each key a `kid` of its own" if len(set(map(str, ids))) != len(ids) else ""


def _unusable_key(key: Any) -> str:
    if not isinstance(key, dict):
        return "must be an object"
    if any(name in key for name in _PRIVATE):
        return "holds private parts: give the public key only, and make a new pair, since this one was shown"
    try:
        usable = registered_keys(json.dumps({"keys": [key]}))
    except ValueError:
        usable = {}
    return (
        "" if usable else "must be a public key for signatures: Ed25519, P-256, or RSA of 2048 bits or more"
    )
