"""Access tokens for tests: honest ones, and the forgeries that every verifier must refuse (R21)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc.jwk import OKPKey

ISSUER = "https://auth.llmos.internal"
AUDIENCE = "llmos-gateway"
KID = "key-1"
ROLES = {"roles": ["auditor", "user"], "direct_scope": "generate"}
"""The claims of a client that has roles."""


class Keys:
    """Keys that are there from the start."""

    def __init__(self, keys: Mapping[str, OKPKey]) -> None:
        self.keys = dict(keys)
        self.asked = 0

    async def key(self, kid: str) -> OKPKey | None:
        self.asked += 1
        return self.keys.get(kid)

    def knows(self, kid: str) -> bool:
        return kid in self.keys


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(
    key: OKPKey,
    claims: dict[str, Any] | bytes,
    header: dict[str, Any] | bytes | None = None,
    **fields: Any,
) -> str:
    """A token over any header and payload, however wrong, truly signed. `fields` change the header."""
    if header is None:
        header = {"alg": "Ed25519", "typ": "at+jwt", "kid": KID} | fields
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    text = f"{b64(head)}.{b64(body)}"
    private = key.private_key
    assert private is not None
    return f"{text}.{b64(private.sign(text.encode()))}"  # type: ignore[union-attr]


def honest_claims(now: datetime, **changes: Any) -> dict[str, Any]:
    """A caller's claims, valid for five minutes; a change of None leaves the claim out."""
    issued = int(now.timestamp())
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "app",
        "client_id": "app",
        "tenant_id": "default",
        "scope": "generate models.read",
        "jti": "0123456789abcdef",
        "iat": issued,
        "exp": issued + 300,
    } | changes
    return {name: value for name, value in claims.items() if value is not None}


def jwks_of(keys: dict[str, OKPKey]) -> str:
    more = {"use": "sig", "alg": "Ed25519"}
    entries = [{**key.as_dict(private=False), "kid": kid, **more} for kid, key in keys.items()]
    return json.dumps({"keys": entries})


def forgeries(key: OKPKey, now: datetime) -> Iterator[tuple[str, str]]:
    """(name, token): each is refused, whatever else is right about it. `key` is the true signing key."""
    yield from _wrong_headers(key, now)
    yield from _wrong_signatures(key, now)
    yield from _wrong_claims(key, now)
    yield from _wrong_forms(key, now)


def _wrong_headers(key: OKPKey, now: datetime) -> Iterator[tuple[str, str]]:
    claims = honest_claims(now)
    public = key.as_dict(private=False)
    for alg in ("none", "None", "NONE", "", "HS256", "RS256", "ES256", "Ed448", "EdDSA", "ed25519", "dir"):
        yield f"alg {alg!r}", signed(key, claims, alg=alg)
    yield "alg null", signed(key, claims, alg=None)
    yield "alg a list", signed(key, claims, alg=["Ed25519"])
    for typ in ("JWT", "at+jwt ", "AT+JWT", "application/at+jwt", "jwt", "id_token", ""):
        yield f"typ {typ!r}", signed(key, claims, typ=typ)
    yield "jwk in the header", signed(key, claims, jwk=public)
    yield "jku in the header", signed(key, claims, jku="https://attacker.example/jwks")
    yield "x5u in the header", signed(key, claims, x5u="https://attacker.example/cert")
    yield "x5c in the header", signed(key, claims, x5c=["MIIB"])
    yield "x5t in the header", signed(key, claims, x5t="AAAA")
    yield "unknown crit", signed(key, claims, crit=["exp"], exp=1)
    yield "crit b64", signed(key, claims, crit=["b64"], b64=False)
    yield "crit empty", signed(key, claims, crit=[])
    yield "zip", signed(key, claims, zip="DEF")
    yield "cty nested", signed(key, claims, cty="JWT")
    yield "kid unknown", signed(key, claims, kid="nobody")
    yield "kid a path", signed(key, claims, kid="../../../../dev/null")
    yield "kid SQL", signed(key, claims, kid="' OR 1=1 --")
    yield "kid a number", signed(key, claims, kid=1)
    yield "kid an object", signed(key, claims, kid={"a": 1})
    yield "kid long", signed(key, claims, kid="k" * 65)
    yield "kid with a newline", signed(key, claims, kid=f"{KID}\n")
    yield "no kid", signed(key, claims, header={"alg": "Ed25519", "typ": "at+jwt"})
    yield "no typ", signed(key, claims, header={"alg": "Ed25519", "kid": KID})
    yield "no alg", signed(key, claims, header={"typ": "at+jwt", "kid": KID})
    twice = f'{{"alg":"none","alg":"Ed25519","typ":"at+jwt","kid":"{KID}"}}'.encode()
    yield "alg twice", signed(key, claims, header=twice)
    yield "header a list", signed(key, claims, header=b'["Ed25519"]')
    yield "header not JSON", signed(key, claims, header=b"{alg: Ed25519}")
    yield "header not UTF-8", signed(key, claims, header=b'{"alg":"\xff"}')
    yield "header nested deeply", signed(key, claims, header=b"[" * 5000)
    yield "header of 1 MB", signed(key, claims, pad="x" * 1024 * 1024)


def _wrong_signatures(key: OKPKey, now: datetime) -> Iterator[tuple[str, str]]:
    honest = signed(key, honest_claims(now))
    head, body, signature = honest.split(".")
    other = OKPKey.generate_key("Ed25519")
    yield "signed by another key", signed(other, honest_claims(now))
    yield "no signature", f"{head}.{body}."
    yield "signature cut", f"{head}.{body}.{signature[:-2]}"
    yield "signature longer", f"{head}.{body}.{signature}AA"
    yield "signature of zeros", f"{head}.{body}.{b64(bytes(64))}"
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    yield "signature changed", f"{head}.{body}.{flipped}"
    raised = b64(json.dumps(honest_claims(now, scope="admin")).encode())
    yield "payload changed", f"{head}.{raised}.{signature}"
    # the same 64 bytes in another spelling: the unused bits of the last character
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet[alphabet.index(signature[-1]) | 1]
    yield "signature spelt otherwise", f"{head}.{body}.{signature[:-1]}{last}"
    yield (
        "none without signature",
        f"{b64(json.dumps({'alg': 'none', 'typ': 'at+jwt', 'kid': KID}).encode())}.{body}.",
    )
    public = key.public_key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    pem = key.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for name, secret in (("raw", public), ("PEM", pem), ("empty", b"")):
        hs_head = b64(json.dumps({"alg": "HS256", "typ": "at+jwt", "kid": KID}).encode())
        mac = hmac.new(secret, f"{hs_head}.{body}".encode(), hashlib.sha256).digest()
        yield f"HS256 with the public key ({name})", f"{hs_head}.{body}.{b64(mac)}"
        same = hmac.new(secret, f"{head}.{body}".encode(), hashlib.sha512).digest()
        yield f"HMAC under the honest header ({name})", f"{head}.{body}.{b64(same)}"
    rsa_key = rsa.generate_private_key(65537, 2048)
    rs_head = b64(json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": KID}).encode())
    by_rsa = rsa_key.sign(f"{rs_head}.{body}".encode(), padding.PKCS1v15(), hashes.SHA256())
    yield "RS256 by an own key", f"{rs_head}.{body}.{b64(by_rsa)}"
    ec_key = ec.generate_private_key(ec.SECP256R1())
    es_head = b64(json.dumps({"alg": "ES256", "typ": "at+jwt", "kid": KID}).encode())
    by_ec = ec_key.sign(f"{es_head}.{body}".encode(), ec.ECDSA(hashes.SHA256()))
    yield "ES256 by an own key", f"{es_head}.{body}.{b64(by_ec)}"


def _wrong_claims(key: OKPKey, now: datetime) -> Iterator[tuple[str, str]]:
    issued = int(now.timestamp())
    for claim in ("iss", "aud", "sub", "client_id", "tenant_id", "jti", "iat", "exp"):
        yield f"no {claim}", signed(key, honest_claims(now, **{claim: None}))
    wrong: dict[str, list[Any]] = {
        "iss": [
            f"{ISSUER}.attacker.example",
            ISSUER[:-1],
            f"{ISSUER}/",
            ISSUER.upper(),
            f" {ISSUER}",
            [ISSUER],
            "",
        ],
        "aud": ["llmos-auth", "llmos-gatewa", "llmos-gateway2", [AUDIENCE], [], "*", ""],
        "sub": ["someone-else", "", 1, "APP", "app\x00"],
        "client_id": ["someone-else", ["app"], "a" * 65],
        "tenant_id": ["", "Default", "default\n", "' OR '1'='1", "\ud800", {"a": 1}],
        "key_id": ["", "a b", 1, "k" * 65],
        "scope": [
            "admin  generate",
            ["admin"],
            "Admin",
            "generate\tadmin",
            " ".join(f"s{'x' * n}" for n in range(65)),
        ],
        "jti": [1, "", "j" * 257],
        "iat": [issued + 60, "now", True, float(issued), -1, 2**63],
        "nbf": [issued + 60, "now", False],
        "exp": [issued, issued - 1, issued + 86_400, issued - 300, "never", True, 2**80],
    }
    for claim, values in wrong.items():
        for value in values:
            yield f"{claim} {str(value)[:40]!r}", signed(key, honest_claims(now, **{claim: value}))
    yield from _wrong_lists(key, now)
    yield "expired", signed(key, honest_claims(now, iat=issued - 600, exp=issued - 300))
    claims = honest_claims(now)
    claims["exp"] = float("nan")
    yield "exp NaN", signed(key, claims)
    yield "exp infinite", signed(key, honest_claims(now, exp=float("inf")))
    text = json.dumps(honest_claims(now))
    yield "scope twice", signed(key, text.replace('"scope"', '"scope": "admin", "scope"').encode())
    yield "exp of 5000 digits", signed(key, text.replace(str(issued + 300), "9" * 5000).encode())


def _wrong_lists(key: OKPKey, now: datetime) -> Iterator[tuple[str, str]]:
    wrong: dict[str, list[Any]] = {
        "roles": [
            [],
            "user",
            {"user": 1},
            [1],
            [["user"]],
            ["user", "auditor"],
            ["user", "user"],
            ["User"],
            ["user "],
            ["service:gateway"],
            [""],
            ["r" * 64],
            sorted(f"r{n}" for n in range(33)),
        ],
        "direct_scope": [
            ["generate"],
            1,
            "generate  models.read",
            "Generate",
            "admin",
            "generate admin",
            "*",
        ],
        "models": [
            [],
            "llama",
            [1],
            [""],
            ["b", "a"],
            ["a", "a"],
            ["m" * 129],
            ["a\x00"],
            ["\ud800"],
            sorted(f"m{n}" for n in range(17)),
        ],
        "addresses": [
            [],
            "10.0.0.0/8",
            [1],
            ["10.0.0.1/8"],
            ["10.0.0.1"],
            ["0x0a.0.0.0/8"],
            ["2001:DB8::/32"],
            ["10.0.0.0/255.0.0.0"],
            ["everywhere"],
            ["192.168.0.0/16", "10.0.0.0/8"],
            ["10.0.0.0/8", "10.0.0.0/8"],
            sorted(f"10.0.{n}.0/24" for n in range(17)),
        ],
    }
    for claim, values in wrong.items():
        for value in values:
            claims = honest_claims(now, **(ROLES | {claim: value}))
            yield f"{claim} {str(value)[:40]!r}", signed(key, claims)
    yield "roles without direct_scope", signed(key, honest_claims(now, roles=["user"]))
    yield "direct_scope without roles", signed(key, honest_claims(now, direct_scope="generate"))


def _wrong_forms(key: OKPKey, now: datetime) -> Iterator[tuple[str, str]]:
    honest = signed(key, honest_claims(now))
    head, body, signature = honest.split(".")
    yield "empty", ""
    yield "dots only", ".."
    yield "many dots", "." * 8000
    yield "two segments", f"{head}.{body}"
    yield "four segments", f"{honest}.{signature}"
    yield "five segments (JWE)", f"{honest}.{signature}.{signature}"
    yield "no payload", f"{head}..{signature}"
    yield "a space before", f" {honest}"
    yield "a newline after", f"{honest}\n"
    yield "padded", f"{head}=.{body}.{signature}"
    yield "standard base64", f"{head}.{body[:-1]}+.{signature}"
    yield "not ASCII", f"{head}.{body}é.{signature}"
    yield "surrogate", f"{head}.{body}\ud800.{signature}"
    yield "null byte", f"{head}.{body}\x00.{signature}"
    yield "a JSON serialisation", json.dumps({"protected": head, "payload": body, "signature": signature})
    yield "payload not JSON", signed(key, b"hello")
    yield "payload empty object", signed(key, b"{}")
    yield "payload a list", signed(key, b"[]")
    yield "payload null", signed(key, b"null")
    yield "payload nested deeply", signed(key, b"[" * 5000)
    yield "payload of 9 KB", signed(key, honest_claims(now, pad="x" * 9000))
    yield "payload of 10 MB", f"{head}.{'A' * 10 * 1024 * 1024}.{signature}"
    yield "random bytes", "".join(chr(c) for c in range(33, 127)) * 3
