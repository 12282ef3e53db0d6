"""Tokens of a corporate provider that must be refused, whatever else is right about them (R21)."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.framework.oidc_provider import MockProvider, SigningKey, b64, rsa_key

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
DAY_S = 86_400


def forgeries(provider: MockProvider, now: datetime, foreign_url: str) -> Iterator[tuple[str, str]]:
    """(name, token). `foreign_url` is a place that nobody may be led to."""
    yield from _wrong_headers(provider, now, foreign_url)
    yield from _wrong_signatures(provider, now)
    yield from _wrong_claims(provider, now)
    yield from _wrong_forms(provider, now)


def _wrong_headers(provider: MockProvider, now: datetime, url: str) -> Iterator[tuple[str, str]]:
    key, claims = provider.key, provider.claims(now)
    for alg in ("none", "None", "", "HS256", "RS384", "rs256", "RSA1_5", "PS512", "dir", "ES256", "EdDSA"):
        yield f"alg {alg!r}", key.sign(claims, alg=alg)
    yield "alg a list", key.sign(claims, alg=["RS256"])
    for typ in ("dpop+jwt", "logout+jwt", "secevent+jwt", "jwt ", "", 1):
        yield f"typ {typ!r}", key.sign(claims, typ=typ)
    yield "jwk in the header", key.sign(claims, jwk=key.jwk())
    own = SigningKey(key.kid, rsa_key(99))
    yield "an own key in the header", own.sign(claims, jwk=own.jwk())
    yield "jku in the header", own.sign(claims, jku=f"{url}/jwks")
    yield "x5u in the header", own.sign(claims, x5u=f"{url}/cert")
    yield "x5c in the header", key.sign(claims, x5c=["MIIB"])
    yield "an issuer in the header", key.sign(claims, iss=url)
    yield "crit", key.sign(claims, crit=["exp"], exp=1)
    yield "crit b64", key.sign(claims, crit=["b64"], b64=False)
    yield "zip", key.sign(claims, zip="DEF")
    yield "cty nested", key.sign(claims, cty="JWT")
    for kid in ("nobody", f"{url}/jwks", "../../../../dev/null", "' OR 1=1 --", 1, "", "k" * 257, "key-1\n"):
        yield f"kid {str(kid)[:40]!r}", key.sign(claims, kid=kid)
    yield "no kid", key.sign(claims, kid=None)
    yield "no alg", key.sign(claims, alg=None)
    twice = f'{{"alg":"none","alg":"RS256","typ":"JWT","kid":"{key.kid}"}}'.encode()
    yield "alg twice", key.sign(claims, header=twice)
    yield "header a list", key.sign(claims, header=b'["RS256"]')
    yield "header nested deeply", key.sign(claims, header=b"[" * 700)
    yield "header of 2 KB", key.sign(claims, x5t="x" * 2048)


def _wrong_signatures(provider: MockProvider, now: datetime) -> Iterator[tuple[str, str]]:
    key, claims = provider.key, provider.claims(now)
    head, body, mark = key.sign(claims).split(".")
    yield "signed by another key", SigningKey(key.kid, rsa_key(99)).sign(claims)
    yield "signed by a small key", SigningKey(key.kid, rsa_key(99, 1024)).sign(claims)
    yield "no signature", f"{head}.{body}."
    yield "signature cut", f"{head}.{body}.{mark[:-4]}"
    yield "signature longer", f"{head}.{body}.{mark}AAAA"
    yield "signature of zeros", f"{head}.{body}.{b64(bytes(256))}"
    yield "signature changed", f"{head}.{body}.{'B' if mark[0] == 'A' else 'A'}{mark[1:]}"
    raised = b64(json.dumps(provider.claims(now, groups=["admins"])).encode())
    yield "payload changed", f"{head}.{raised}.{mark}"
    yield "signature spelt otherwise", f"{head}.{body}.{mark[:-1]}{ALPHABET[ALPHABET.index(mark[-1]) | 1]}"
    unsigned = b64(json.dumps({"alg": "none", "typ": "JWT", "kid": key.kid}).encode())
    yield "none without signature", f"{unsigned}.{body}."
    assert isinstance(key.private, rsa.RSAPrivateKey)
    public = key.private.public_key()
    secrets = {
        "PEM": public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "DER": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "JWK": json.dumps(key.jwk()).encode(),
        "nothing": b"",
    }
    for name, secret in secrets.items():
        hs_head = b64(json.dumps({"alg": "HS256", "typ": "JWT", "kid": key.kid}).encode())
        mac = hmac.new(secret, f"{hs_head}.{body}".encode(), hashlib.sha256).digest()
        yield f"HS256 with the public key ({name})", f"{hs_head}.{body}.{b64(mac)}"
        mac = hmac.new(secret, f"{head}.{body}".encode(), hashlib.sha256).digest()
        yield f"HMAC under the honest header ({name})", f"{head}.{body}.{b64(mac)}"
    curve = SigningKey(key.kid, ec.generate_private_key(ec.SECP256R1()), "ES256")
    yield "ES256 by an own key under the kid of an RSA key", curve.sign(claims)
    edwards = SigningKey(key.kid, ed25519.Ed25519PrivateKey.generate(), "EdDSA")
    yield "EdDSA by an own key under the kid of an RSA key", edwards.sign(claims)


def _wrong_claims(provider: MockProvider, now: datetime) -> Iterator[tuple[str, str]]:
    key, issued, issuer = provider.key, int(now.timestamp()), provider.issuer
    for claim in ("iss", "aud", "sub", "iat", "exp"):
        yield f"no {claim}", provider.token(now, **{claim: None})
    wrong: dict[str, list[Any]] = {
        "iss": [
            f"{issuer}/",
            issuer[:-1],
            issuer.upper(),
            f" {issuer}",
            [issuer],
            "",
            f"{issuer}@example.org",
        ],
        "aud": ["llmo", "llmos2", "LLMOS", "", "*", [], [["llmos"]], ["other"], {"llmos": 1}, ["llmos", 1]],
        "sub": ["", 1, "s" * 256, "a\x00b", "a\nb", "\ud800", ["alice"], None],
        "iat": [issued + 60, "now", True, -1, 2**63, issued - 2 * DAY_S],
        "nbf": [issued + 60, "now", False, None],
        "exp": [issued, issued - 300, issued + 2 * DAY_S, "never", True, 2**80, [issued + 60]],
        "cnf": [{"jkt": "AAAA"}, None],
        "events": [{"http://schemas.openid.net/event/backchannel-logout": {}}],
    }
    for claim, values in wrong.items():
        for value in values:
            yield f"{claim} {str(value)[:40]!r}", key.sign(provider.claims(now) | {claim: value})
    yield "expired", provider.token(now, iat=issued - 600, exp=issued - 300)
    yield "azp another", provider.token(now, aud=["llmos", "other"], azp="other")
    yield "exp NaN", key.sign(provider.claims(now) | {"exp": float("nan")})
    yield "exp infinite", key.sign(provider.claims(now) | {"exp": float("inf")})
    text = json.dumps(provider.claims(now))
    yield "groups twice", key.sign(text.replace('"groups"', '"groups": ["admins"], "groups"').encode())
    yield "aud twice", key.sign(text.replace('"aud"', '"aud": "other", "aud"').encode())
    inner = provider.claims(now, realm_access={"roles": 1})
    doubled = json.dumps(inner).replace('{"roles": 1}', '{"roles": ["a"], "roles": ["b"]}')
    yield "a name twice further in", key.sign(doubled.encode())
    yield "exp of 5000 digits", key.sign(text.replace(str(issued + 3600), "9" * 5000).encode())


def _wrong_forms(provider: MockProvider, now: datetime) -> Iterator[tuple[str, str]]:
    key = provider.key
    honest = provider.token(now)
    head, body, mark = honest.split(".")
    yield "empty", ""
    yield "dots only", ".."
    yield "many dots", "." * 8000
    yield "two segments", f"{head}.{body}"
    yield "four segments", f"{honest}.{mark}"
    yield "five segments (JWE)", f"{honest}.{mark}.{mark}"
    yield "a space before", f" {honest}"
    yield "a newline after", f"{honest}\n"
    yield "padded", f"{head}=.{body}.{mark}"
    yield "standard base64", f"{head}.{body[:-1]}+.{mark}"
    yield "not ASCII", f"{head}.{body}é.{mark}"
    yield "surrogate", f"{head}.{body}\ud800.{mark}"
    yield "null byte", f"{head}.{body}\x00.{mark}"
    yield "a JSON serialisation", json.dumps({"protected": head, "payload": body, "signature": mark})
    for name, payload in {
        "not JSON": b"hello",
        "an empty object": b"{}",
        "a list": b"[]",
        "null": b"null",
        "not UTF-8": b'{"iss":"\xff"}',
        "a token": honest.encode(),
        "nested deeply": b"[" * 9000,
        "nested deeply in objects": b'{"a":' * 1800,
    }.items():
        yield f"payload {name}", key.sign(payload)
    yield "payload of 17 KB", provider.token(now, pad="x" * 17_000)
    yield "payload of 10 MB", f"{head}.{'A' * 10 * 1024 * 1024}.{mark}"
    yield "random bytes", "".join(chr(c) for c in range(33, 127)) * 3
