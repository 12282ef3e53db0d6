"""A corporate identity provider on loopback: OpenID Connect Discovery, a key set and signed tokens, as honest
as a test wants it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from joserfc.jwk import ECKey, OKPKey, RSAKey

AUDIENCE = "llmos"
DISCOVERY = "/.well-known/openid-configuration"
JWKS = "/keys"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@cache
def rsa_key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Making one takes a while, so each is made once in a run."""
    return rsa.generate_private_key(65537, bits)


Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def signature(private: Private, alg: object, data: bytes) -> bytes:
    """As RFC 7518, section 3, and RFC 8037 have it; for an `alg` that the key cannot have, its usual one."""
    if isinstance(private, rsa.RSAPrivateKey):
        if alg == "PS256":
            return private.sign(data, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
        return private.sign(data, padding.PKCS1v15(), hashes.SHA256())
    if isinstance(private, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(private.sign(data, ec.ECDSA(hashes.SHA256())))
        size = (private.curve.key_size + 7) // 8
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")
    return private.sign(data)


@dataclass(frozen=True)
class SigningKey:
    """A key of a provider."""

    kid: str
    private: Private
    alg: str = "RS256"

    def jwk(self, **changes: Any) -> dict[str, Any]:
        """The public key as a provider publishes it; a change of None leaves the member out."""
        public = self.private.public_key()
        kinds: dict[type, Any] = {rsa.RSAPrivateKey: RSAKey, ec.EllipticCurvePrivateKey: ECKey}
        cls = next((kinds[kind] for kind in kinds if isinstance(self.private, kind)), OKPKey)
        fields = {**cls.import_key(public).as_dict(private=False), "kid": self.kid, "use": "sig"} | changes
        return {name: value for name, value in fields.items() if value is not None}

    def sign(self, claims: Mapping[str, Any] | bytes, header: bytes | None = None, **fields: Any) -> str:
        """A token over any header and payload, however wrong, truly signed. `fields` change the header; None
        leaves one out."""
        named = {"alg": self.alg, "typ": "JWT", "kid": self.kid} | fields
        named = {name: value for name, value in named.items() if value is not None}
        head = json.dumps(named).encode() if header is None else header
        body = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
        text = f"{b64(head)}.{b64(body)}"
        return f"{text}.{b64(signature(self.private, named.get('alg'), text.encode()))}"


@dataclass(frozen=True)
class Answer:
    """What is sent for a path."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    stalls: bool = False
    """Sends the head and half of the body, and then nothing for ever."""
    declares_length: bool = True


class MockProvider:
    """Serves its document and its keys, and remembers what it was asked for.

    `answers` replaces what it says at a path; `document` and `keys` are what it says otherwise.
    """

    def __init__(self, path: str = "", *, number: int = 0, tls: ssl.SSLContext | None = None) -> None:
        """`path`: of its issuer, for a provider that has several, such as `/realms/acme`. `number`: tells its
        keys from those of other providers. `tls`: https instead of http."""
        self.requests: list[str] = []
        """The paths, in the order in which they were asked for."""
        self.heads: list[bytes] = []
        """The whole heads of the requests."""
        self.answers: dict[str, Answer] = {}
        self._number = number
        self.keys = [SigningKey("key-1", rsa_key(10 * number))]
        self.document: dict[str, Any] = {}
        self.asked = asyncio.Event()
        self._path = path
        self._server: asyncio.Server | None = None
        self._port = 0
        self._tls = tls

    @property
    def base(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def issuer(self) -> str:
        return f"{self.base}{self._path}"

    @property
    def key(self) -> SigningKey:
        """The one that it signs with."""
        return self.keys[-1]

    @property
    def fetches(self) -> int:
        """How often its keys were fetched."""
        return self.requests.count(JWKS)

    async def __aenter__(self) -> MockProvider:
        await self.start()
        self.document = {
            "issuer": self.issuer,
            "jwks_uri": f"{self.base}{JWKS}",
            "id_token_signing_alg_values_supported": ["RS256"],
        }
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """On the port that it had before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuses connections from now on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def rotate(self) -> SigningKey:
        """Signs with a new key, and publishes it beside the ones before."""
        number = len(self.keys)
        self.keys.append(SigningKey(f"key-{number + 1}", rsa_key(10 * self._number + number)))
        return self.key

    def claims(self, now: datetime, **changes: Any) -> dict[str, Any]:
        """Those of an honest ID token that holds for an hour; a change of None leaves a claim out."""
        issued = int(now.timestamp())
        claims = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": "00u1-alice",
            "name": "Alice",
            "groups": ["staff", "ml"],
            "iat": issued,
            "exp": issued + 3600,
        } | changes
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, now: datetime, **changes: Any) -> str:
        """An honest token, but for what is changed of its claims."""
        return self.key.sign(self.claims(now, **changes))

    def answer(self, path: str) -> Answer:
        """What it sends for a path now."""
        if path in self.answers:
            return self.answers[path]
        if path == self._path + DISCOVERY:
            return Answer(json.dumps(self.document).encode())
        if path == JWKS:
            return Answer(json.dumps({"keys": [key.jwk() for key in self.keys]}).encode())
        return Answer(b"{}", 404)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1].decode()
                self.heads.append(head)
                self.requests.append(path)
                await self._send(writer, self.answer(path))
                self.asked.set()
                if self.answer(path).stalls:
                    await reader.read()  # until the other side gives up
                if not self.answer(path).declares_length:
                    break
        writer.close()

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        headers = {"content-type": "application/json"} | dict(answer.headers)
        if answer.declares_length:
            headers["content-length"] = str(len(answer.body))
        lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {value}" for name, value in headers.items())]
        body = answer.body[: len(answer.body) // 2] if answer.stalls else answer.body
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()
