"""The form of a token that another issuer made, checked before any cryptography.

Wider than our own form (`services.mesh.access_token`), since providers differ: four algorithms instead of
one, and a few more fields in the header. Never wider than that: no key or address of a key is taken from a
token (RFC 8725, sections 3.1 and 3.10), no extension (`crit`), no encryption, no two readings of one text.
Every fault is a `CredentialInvalid` that repeats nothing of the token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from services.mesh import compact_jws
from services.mesh.errors import CredentialInvalid

MAX_TOKEN_CHARS = 16 * 1024
MAX_HEADER_CHARS = 1024
ALGORITHMS = frozenset({"RS256", "PS256", "ES256", "EdDSA", "Ed25519"})
"""All asymmetric. Which of them holds for a token is for the key to say (`signature`)."""
HEADER_FIELDS = frozenset({"alg", "typ", "kid", "x5t", "x5t#S256"})
TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt"})
"""In lower case: `typ` is a media type (RFC 7515, section 4.1.9). A token may also have none. Others, such as
`logout+jwt` and `dpop+jwt`, are no proof of who sends them."""

_KID = re.compile(r"[\x20-\x7e]{1,256}")
_ISSUER = re.compile(r"[\x21-\x7e]{8,512}")


@dataclass(frozen=True, slots=True)
class ForeignToken:
    """A token of the right form. Nothing that it says is proven."""

    issuer: str
    kid: str
    algorithm: str
    """One of `ALGORITHMS`."""
    text: str = field(repr=False)
    claims: Mapping[str, Any] = field(repr=False)
    """Of the payload; not to be believed before the signature has been verified."""


def refuse(why: str) -> NoReturn:
    """Raises CredentialInvalid with the cause."""
    raise CredentialInvalid(
        f"The identity provider's token was refused: {why}.",
        hint="Get a new token from your identity provider, for the audience that this platform is given.",
    )


def parse(text: str) -> ForeignToken:
    """Reads a compact JWS (RFC 7515, section 7.1) whose payload is a JSON object with an issuer.

    Raises CredentialInvalid.
    """
    if len(text) > MAX_TOKEN_CHARS:
        refuse("it is too long")
    segments = text.split(".", 3)
    if len(segments) != 3:
        refuse("it is not a compact JWS of three segments")
    header, payload, signature = segments
    if len(header) > MAX_HEADER_CHARS:
        refuse("its header is too long")
    fields, claims = _read(header, payload, signature)
    algorithm, kid = _check_header(fields)
    issuer = claims.get("iss")
    if not isinstance(issuer, str) or _ISSUER.fullmatch(issuer) is None:
        refuse("its claim iss is missing or malformed")
    return ForeignToken(issuer, kid, algorithm, text, claims)


def unverified_issuer(text: str) -> str:
    """Whom a token says it is from: good for choosing a provider, no more. Raises CredentialInvalid."""
    return parse(text).issuer


def _read(header: str, payload: str, signature: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the header, and the claims."""
    try:
        fields = compact_jws.parse_object(compact_jws.decode(header), "header")
        claims = compact_jws.parse_object(compact_jws.decode(payload), "payload")
        compact_jws.decode(signature)
        return fields, claims
    except compact_jws.Malformed as error:
        fault = str(error)
    # refused outside of the handler, so that no part of the token hangs on the error as its context
    refuse(fault)


def _check_header(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The algorithm and the key id."""
    if not fields.keys() <= HEADER_FIELDS:
        refuse(f"its header holds other fields than {', '.join(sorted(HEADER_FIELDS))}")
    algorithm, kid, typ = fields.get("alg"), fields.get("kid"), fields.get("typ", "JWT")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        refuse("its algorithm is not allowed")
    if not isinstance(typ, str) or typ.lower() not in TYPES:
        refuse("its type is not JWT or at+jwt")
    if not isinstance(kid, str) or _KID.fullmatch(kid) is None:
        refuse("its key id is missing or malformed")
    return algorithm, kid
