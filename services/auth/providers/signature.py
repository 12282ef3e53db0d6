"""The keys of a provider, and verifying with them.

A key says which algorithms it is good for, never a token: an RSA key cannot be used as the secret of an
HMAC, nor one curve's key for another (RFC 8725, section 3.1).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from services.auth.providers.foreign_token import ForeignToken, refuse

Key = RSAKey | ECKey | OKPKey
Keys = Mapping[str, Mapping[str, Key]]
"""By key id, then by algorithm."""

MAX_KEYS = 100
MIN_RSA_BITS = 2048  # RFC 7518, section 3.3
MAX_RSA_BITS = 8192
MAX_RSA_EXPONENT_BITS = 32
"""Both bound what one verification costs."""

_KINDS: Mapping[tuple[str, str | None], tuple[type[Key], tuple[str, ...], tuple[str, ...]]] = {
    ("RSA", None): (RSAKey, ("RS256", "PS256"), ("n", "e")),
    ("EC", "P-256"): (ECKey, ("ES256",), ("crv", "x", "y")),
    ("OKP", "Ed25519"): (OKPKey, ("EdDSA", "Ed25519"), ("crv", "x")),
}
"""(kty, crv): the class, its algorithms, and the public members (RFC 7518, section 6; RFC 8037)."""


def parse_jwks(data: bytes) -> Keys:
    """The usable keys of a JWK Set (RFC 7517, section 5).

    Keys of other kinds, for other uses and broken ones are passed over: a provider may publish what we do not
    know. Of two with one id and algorithm the first counts. Raises ValueError where it is no JWK Set, has
    more than `MAX_KEYS` keys, or none that can be used.
    """
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("the JWK Set is nested too deeply") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ValueError(f"the JWK Set has no list of at most {MAX_KEYS} keys")
    keys: dict[str, dict[str, Key]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str):
            continue
        for algorithm, key in _import(entry).items():
            keys.setdefault(entry["kid"], {}).setdefault(algorithm, key)
    if not keys:
        raise ValueError("the JWK Set holds no key that can be used")
    return keys


def _import(entry: Mapping[str, Any]) -> Mapping[str, Key]:
    """The key for each algorithm that it is good for; nothing where it is of no use."""
    kty, crv = entry.get("kty"), entry.get("crv")
    if not isinstance(kty, str) or not (crv is None or isinstance(crv, str)):
        return {}
    kind = _KINDS.get((kty, crv))
    if kind is None or entry.get("use", "sig") != "sig":
        return {}
    cls, algorithms, members = kind
    if "alg" in entry:
        algorithms = tuple(name for name in algorithms if name == entry["alg"])
    if not all(isinstance(entry.get(name), str) for name in members):
        return {}
    try:
        # only what a public key needs: a private part, sent by mistake, goes no further
        key: Key = cls.import_key({"kty": kty} | {name: entry[name] for name in members})
        public = key.public_key  # reads the numbers: before that, only their names were looked at
        if isinstance(public, RSAPublicKey) and not _is_fit(public):
            return {}
    except (JoseError, ValueError, TypeError):
        return {}
    return dict.fromkeys(algorithms, key)


def _is_fit(key: RSAPublicKey) -> bool:
    exponent_bits = key.public_numbers().e.bit_length()
    return MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS and exponent_bits <= MAX_RSA_EXPONENT_BITS


def verify(token: ForeignToken, key: Key) -> None:
    """Raises CredentialInvalid unless `key`, which is good for the token's algorithm, has signed it."""
    registry = jws.JWSRegistry(algorithms=[token.algorithm], strict_check_header=False)
    registry.max_header_length = len(token.text)  # `foreign_token` has bounded it, less tightly
    verified = False
    # refused outside of the handler, so that no part of the token hangs on the error as its context
    with contextlib.suppress(JoseError, ValueError, TypeError, RecursionError):
        jws.deserialize_compact(token.text, key, registry=registry)
        verified = True
    if not verified:
        refuse("its signature does not verify")
