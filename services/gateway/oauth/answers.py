"""What the OAuth2 endpoints answer: metadata, tokens, what a token is worth, and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from services.gateway import http_errors
from services.gateway.oauth.forms import ACCESS_TOKEN_TYPE, CLIENT_CREDENTIALS, OAUTH_ERROR, TOKEN_EXCHANGE
from services.gateway.oauth.ports import Granted, Introspected
from services.mesh.errors import LlmosError, MessageTooLarge, PolicyDenied, ScopeMissing, Status
from services.mesh.policy import SCOPES

Header = tuple[bytes, bytes]
JSON: Header = (b"content-type", b"application/json")
NO_STORE: tuple[Header, ...] = ((b"cache-control", b"no-store"), (b"pragma", b"no-cache"))
JWKS_HEADERS: tuple[Header, ...] = (JSON, (b"cache-control", b"public, max-age=60"))

TOKEN, JWKS, INTROSPECT, REVOKE = "/oauth2/token", "/oauth2/jwks", "/oauth2/introspect", "/oauth2/revoke"
METADATA = "/.well-known/oauth-authorization-server"
_METHODS = ["client_secret_basic", "client_secret_post", "private_key_jwt"]
_ALGORITHMS = ["ES256", "Ed25519", "EdDSA", "PS256", "RS256"]


def metadata(issuer: str, public_url: str) -> bytes:
    """RFC 8414, section 2. `issuer` exactly as in tokens; the endpoints are below `public_url`."""
    base = public_url.rstrip("/")
    document: dict[str, Any] = {
        "issuer": issuer,
        "token_endpoint": base + TOKEN,
        "jwks_uri": base + JWKS,
        "introspection_endpoint": base + INTROSPECT,
        "revocation_endpoint": base + REVOKE,
        "response_types_supported": [],
        "grant_types_supported": [CLIENT_CREDENTIALS, TOKEN_EXCHANGE],
        "scopes_supported": list(SCOPES),
    }
    for endpoint in ("token", "introspection", "revocation"):
        document[f"{endpoint}_endpoint_auth_methods_supported"] = _METHODS
        document[f"{endpoint}_endpoint_auth_signing_alg_values_supported"] = _ALGORITHMS
    return msgspec.json.encode(document)


def token(granted: Granted, *, now_s: float, exchanged: bool) -> bytes:
    """RFC 6749, section 5.1; `exchanged`: RFC 8693, section 2.2.1."""
    answer: dict[str, Any] = {
        "access_token": granted.token,
        "token_type": "Bearer",
        "expires_in": max(0, int(granted.expires_at.timestamp() - now_s)),
        "scope": " ".join(granted.scopes),
    }
    if exchanged:
        answer["issued_token_type"] = ACCESS_TOKEN_TYPE
    return msgspec.json.encode(answer)


def introspection(found: Introspected) -> bytes:
    """RFC 7662, section 2.2: of a token that is not active, exactly that."""
    facts = found.facts
    if facts is None:
        return b'{"active":false}'
    answer: dict[str, Any] = {
        "active": True,
        "iss": facts.issuer,
        "aud": facts.audience,
        "sub": facts.subject,
        "client_id": facts.client_id,
        "scope": " ".join(facts.scopes),
        "token_type": "Bearer",
        "jti": facts.token_id,
        "iat": facts.issued_at_s,
        "exp": facts.expires_at_s,
    }
    if facts.tenant_id:
        answer["tenant_id"] = facts.tenant_id
    if facts.key_id:
        answer["key_id"] = facts.key_id
    if facts.roles:
        answer["roles"] = list(facts.roles)
    return msgspec.json.encode(answer)


def error(fault: LlmosError, *, by_body: bool) -> tuple[int, bytes, list[Header]]:
    """Status, body and headers (RFC 6749, section 5.2).

    `by_body`: the client tried to prove itself in the body. Then 401 is not for it: that comes with a
    challenge for the Authorization header (RFC 9110, section 15.5.2), and libraries take it for that alone.
    """
    code = fault.metadata.get(OAUTH_ERROR) or _code(fault)
    status = 401 if code == "invalid_client" and not by_body else _status(fault)
    text = "An internal error occurred." if status == 500 else f"{fault.message} {fault.hint}".strip()
    headers = [
        JSON,
        *NO_STORE,
        *(header for header in http_errors.headers(fault) if header[0] != b"www-authenticate"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="llmos", charset="UTF-8"'))
    body = msgspec.json.encode({"error": code, "error_description": _description(text)})
    return status, body, headers


def _status(fault: LlmosError) -> int:
    if isinstance(fault, MessageTooLarge):
        return 413
    status = http_errors.status(fault)
    return 400 if status in (401, 403, 409, 422) else status


def _code(fault: LlmosError) -> str:
    if fault.status is Status.UNAUTHENTICATED:
        return "invalid_client"
    if isinstance(fault, ScopeMissing) or any(each.field == "scopes" for each in fault.violations):
        return "invalid_scope"
    if isinstance(fault, PolicyDenied):
        return "unauthorized_client"
    status = _status(fault)
    if status in (429, 503, 504):
        return "temporarily_unavailable"
    return "invalid_request" if status < 500 else "server_error"


def _description(text: str) -> str:
    """The characters that RFC 6749 allows in error_description."""
    plain: Mapping[str, str] = {'"': "'", "\\": "/"}
    return "".join(plain.get(c, c if " " <= c <= "~" else "?") for c in text)
