"""Where a provider's keys come from, how often they are fetched, and what a provider may not do with us."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.dev.certs import CertificateAuthority
from services.auth.providers import signature
from services.auth.providers.discovery import MAX_DOCUMENT_BYTES, MAX_JWKS_BYTES, is_issuer
from services.auth.providers.fetching import Fetcher, FetchError
from services.mesh.app import StartError
from services.mesh.errors import CredentialInvalid, DependencyUnavailable
from tests.framework.oidc_exchange import Trust, trust
from tests.framework.oidc_provider import DISCOVERY, JWKS, Answer, MockProvider, SigningKey, rsa_key

TIMEOUT_S = 0.3


@pytest.fixture
async def corp() -> AsyncIterator[Trust]:
    async with MockProvider() as provider, trust(provider) as trusted:
        yield trusted


class TestCaching:
    async def test_keys_are_fetched_once(self, corp: Trust) -> None:
        await asyncio.gather(*(corp.person() for _ in range(20)))
        await corp.clock.advance(599)
        await corp.person()
        assert corp.provider.requests == [DISCOVERY, JWKS]

    async def test_and_again_after_ten_minutes(self, corp: Trust) -> None:
        await corp.person()
        await corp.clock.advance(600)
        await corp.person()
        assert corp.provider.fetches == 2

    async def test_a_withdrawn_key_is_refused_after_ten_minutes(self, corp: Trust) -> None:
        old = corp.provider.key
        await corp.person()
        corp.provider.rotate()
        corp.provider.keys.remove(old)
        await corp.clock.advance(600)
        with pytest.raises(CredentialInvalid, match="its key is not known"):
            await corp.verify(old.sign(corp.provider.claims(corp.clock.now())))

    async def test_r22_a_new_key_is_taken_at_once(self, corp: Trust) -> None:
        await corp.person()
        await corp.clock.advance(31)
        for rotation in range(2, 5):
            corp.provider.rotate()
            assert (await corp.person()).roles == {"user"}
            assert corp.provider.fetches == rotation
            await corp.clock.advance(31)

    async def test_r22_unknown_key_ids_ask_once_in_30_s(self, corp: Trust) -> None:
        now = corp.clock.now()
        await corp.person()
        tokens = [corp.provider.key.sign(corp.provider.claims(now), kid=f"kid-{n}") for n in range(50)]
        for elapsed_s, fetches in ((0, 1), (29, 1), (2, 2), (0, 2), (30, 3)):
            await corp.clock.advance(elapsed_s)
            for outcome in await asyncio.gather(*map(corp.verify, tokens), return_exceptions=True):
                assert isinstance(outcome, CredentialInvalid)
            assert corp.provider.fetches == fetches

    async def test_the_old_keys_do_for_an_hour_while_the_provider_is_away(self, corp: Trust) -> None:
        await corp.person()
        await corp.provider.stop()
        await corp.clock.advance(3599)
        await corp.person()
        await corp.clock.advance(1)
        with pytest.raises(DependencyUnavailable):
            await corp.person()
        await corp.provider.start()
        await corp.clock.advance(1)
        await corp.person()

    async def test_a_provider_that_was_never_there(self, corp: Trust) -> None:
        await corp.provider.stop()
        for _ in range(3):
            with pytest.raises(DependencyUnavailable, match="does not answer") as caught:
                await corp.person()
            assert caught.value.retry_after_s == 1.0
        await corp.provider.start()
        with pytest.raises(DependencyUnavailable):
            await corp.person()
        assert corp.provider.requests == []
        await corp.clock.advance(1)
        await corp.person()

    async def test_who_gives_up_waiting_takes_the_fetch_from_nobody(self, corp: Trust) -> None:
        body = corp.provider.answer(JWKS).body
        corp.provider.answers[JWKS] = Answer(body, stalls=True)
        impatient = asyncio.create_task(corp.person())
        while JWKS not in corp.provider.requests:
            corp.provider.asked.clear()
            await asyncio.wait_for(corp.provider.asked.wait(), 10)
        patient = asyncio.create_task(corp.person())
        impatient.cancel()
        await asyncio.wait([impatient])
        assert impatient.cancelled()
        assert not patient.done()
        await corp.tokens.stop()
        with pytest.raises(DependencyUnavailable):
            await patient


class TestDiscovery:
    async def test_an_issuer_with_a_path(self) -> None:
        async with MockProvider("/realms/acme") as provider, trust(provider) as corp:
            await corp.person()
            assert provider.requests == [f"/realms/acme{DISCOVERY}", JWKS]

    async def test_an_issuer_that_ends_with_a_slash(self) -> None:
        async with MockProvider("/") as provider, trust(provider) as corp:
            provider.answers[DISCOVERY] = Answer(json.dumps(provider.document).encode())
            await corp.person()
            assert provider.requests == [DISCOVERY, JWKS]

    async def test_an_address_of_keys_with_a_query(self, corp: Trust) -> None:
        corp.provider.document["jwks_uri"] += "?p=policy"
        corp.provider.answers[f"{JWKS}?p=policy"] = corp.provider.answer(JWKS)
        await corp.person()

    async def test_the_issuer_must_be_the_configured_one_exactly(self, corp: Trust) -> None:
        issuer = corp.provider.issuer
        for other in (f"{issuer}/", issuer.upper(), "https://other.example", "", None, [issuer], 1):
            corp.provider.document["issuer"] = other
            await _unavailable(corp)
        assert corp.provider.fetches == 0

    async def test_only_these_addresses_of_keys_are_fetched(self, corp: Trust) -> None:
        async with MockProvider(number=1) as other:
            port = other.base.rpartition(":")[2]
            for uri in (
                "http://keys.example/keys",
                f"http://0.0.0.0:{port}/keys",
                f"http://user@127.0.0.1:{port}/keys",
                f"http://127.0.0.1:{port}/keys#x",
                f"http://127.0.0.1:{port}/ke ys",
                f"http://127.0.0.1:{port}/\r\nx: y",
                "file:///etc/passwd",
                "//127.0.0.1/keys",
                "keys",
                "",
                None,
                ["https://keys.example/keys"],
            ):
                corp.provider.document["jwks_uri"] = uri
                await _unavailable(corp)
            assert other.requests == []
            assert set(corp.provider.requests) == {DISCOVERY}

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"null",
            b"[]",
            b"{",
            b"\xff",
            b"[" * 100_000,
            b'{"keys": {}}',
            b'{"keys": []}',
            b'{"keys": [1, null, {}, {"kid": 1}]}',
            json.dumps({"keys": [{"kid": str(n)} for n in range(101)]}).encode(),
        ],
        ids=lambda body: body[:20],
    )
    async def test_what_is_no_key_set(self, corp: Trust, body: bytes) -> None:
        corp.provider.answers[JWKS] = Answer(body)
        await _unavailable(corp)

    async def test_keys_that_are_of_no_use_are_passed_over(self, corp: Trust) -> None:
        honest = corp.provider.key
        p384 = SigningKey("p384", ec.generate_private_key(ec.SECP384R1()), "ES384")
        p256 = SigningKey("p256", ec.generate_private_key(ec.SECP256R1()), "ES256")
        useless = [
            SigningKey("small", rsa_key(50, 1024)).jwk(),
            p384.jwk(),
            honest.jwk(kid="encrypts", use="enc"),
            honest.jwk(kid="hs", alg="HS256"),
            honest.jwk(kid="rs512", alg="RS512"),
            honest.jwk(kid="broken", n="!"),
            honest.jwk(kid="no n", n=None),
            p256.jwk(kid="off the curve", y=p256.jwk()["x"]),
            {"kty": "OKP", "crv": "Ed25519", "kid": "short", "x": "AAAA"},
            {"kty": "OKP", "crv": "Ed448", "kid": "Ed448", "x": "AAAA"},
            honest.jwk(kid="exponent", e="A" * 300 + "Q"),
            honest.jwk(kid="kty", kty=["RSA"]),
            honest.jwk(kid=None),
            {"kty": "oct", "kid": "secret", "k": "AAAA"},
        ]
        corp.provider.answers[JWKS] = Answer(json.dumps({"keys": [*useless, honest.jwk()]}).encode())
        await corp.person()
        keys = signature.parse_jwks(json.dumps({"keys": [*useless, honest.jwk()]}).encode())
        assert {kid: set(algorithms) for kid, algorithms in keys.items()} == {"key-1": {"RS256", "PS256"}}
        small = SigningKey("small", rsa_key(50, 1024))
        for kid in ("small", "encrypts", "hs", "rs512", "exponent", "secret"):
            key = small if kid == "small" else replace(honest, kid=kid)
            with pytest.raises(CredentialInvalid, match="its key is not known"):
                await corp.verify(key.sign(corp.provider.claims(corp.clock.now())))


async def _unavailable(corp: Trust) -> None:
    """The provider's answers are of no use; a second later it is asked again."""
    with pytest.raises(DependencyUnavailable):
        await corp.person()
    await corp.clock.advance(1)


class TestFetching:
    @pytest.mark.parametrize("path", [DISCOVERY, JWKS])
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_redirects_are_refused(self, corp: Trust, path: str, status: int) -> None:
        async with MockProvider(number=1) as other:
            for target in (f"{other.base}{path}", f"{corp.provider.base}/moved"):
                corp.provider.answers[path] = Answer(b"", status, {"location": target})
                await _unavailable(corp)
            assert other.requests == []
            assert "/moved" not in corp.provider.requests

    @pytest.mark.parametrize("status", [201, 204, 400, 404, 500, 503])
    async def test_other_statuses_too(self, corp: Trust, status: int) -> None:
        body = b"" if status == 204 else corp.provider.answer(JWKS).body
        corp.provider.answers[JWKS] = Answer(body, status)
        await _unavailable(corp)

    @pytest.mark.parametrize(("path", "max_bytes"), [(DISCOVERY, MAX_DOCUMENT_BYTES), (JWKS, MAX_JWKS_BYTES)])
    @pytest.mark.parametrize("declares_length", [True, False])
    async def test_huge_answers(self, corp: Trust, path: str, max_bytes: int, declares_length: bool) -> None:
        honest = corp.provider.answer(path).body
        corp.provider.answers[path] = Answer(honest.ljust(max_bytes + 1), declares_length=declares_length)
        await _unavailable(corp)
        corp.provider.answers[path] = Answer(honest.ljust(max_bytes), declares_length=declares_length)
        await corp.person()

    async def test_compressed_answers(self, corp: Trust) -> None:
        """A few bytes could stand for gigabytes."""
        for name in ("gzip", "br", "deflate", "zstd"):
            corp.provider.answers[JWKS] = Answer(b"\x1f\x8b", headers={"content-encoding": name})
            await _unavailable(corp)

    @pytest.mark.parametrize("path", [DISCOVERY, JWKS])
    async def test_slow_answers(self, path: str) -> None:
        async with MockProvider() as provider, trust(provider, timeout_s=TIMEOUT_S) as corp:
            provider.answers[path] = Answer(provider.answer(path).body, stalls=True)
            async with asyncio.timeout(20):
                await _unavailable(corp)
            del provider.answers[path]
            await corp.person()

    async def test_proxies_of_the_environment_are_passed_by(
        self, corp: Trust, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with MockProvider(number=1) as proxy:
            for name in ("http_proxy", "https_proxy", "all_proxy"):
                monkeypatch.setenv(name, proxy.base)
                monkeypatch.setenv(name.upper(), proxy.base)
            monkeypatch.setenv("NO_PROXY", "")
            await corp.person()
            assert proxy.requests == []

    async def test_nothing_of_ours_is_sent(self, corp: Trust) -> None:
        corp.provider.answers[DISCOVERY] = replace(
            corp.provider.answer(DISCOVERY), headers={"set-cookie": "a=b; Path=/"}
        )
        await corp.person()
        await corp.clock.advance(600)
        await corp.person()
        for head in corp.provider.heads:
            assert b"cookie" not in head.lower()
            assert b"authorization" not in head.lower()

    async def test_a_certificate_is_checked(self, tmp_path: Path) -> None:
        authority = CertificateAuthority(tmp_path)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*authority.issue("provider"))
        async with MockProvider(tls=tls) as provider:
            with pytest.raises(FetchError, match="cannot be reached"):
                await Fetcher().get(provider.base + JWKS, 100_000)
            assert provider.requests == []
            trusting = Fetcher(authority.ca_file)
            assert await trusting.get(provider.base + JWKS, 100_000) == provider.answer(JWKS).body


@pytest.mark.parametrize(
    "issuer",
    [
        "https://login.example",
        "https://login.example/",
        "https://login.example:8443/realms/acme",
        "http://127.0.0.1:8080",
        "http://localhost:8080/realms/acme",
        "http://[::1]:8080",
    ],
)
def test_issuers(issuer: str) -> None:
    assert is_issuer(issuer)


@pytest.mark.parametrize(
    "issuer",
    [
        "http://login.example",
        "http://10.0.0.1",
        "http://169.254.169.254",
        "http://127.0.0.1.example",
        "http://localhost.example",
        "http://localhost@login.example",
        "http://2130706433",
        "https://user:password@login.example",
        "https://login.example?x=1",
        "https://login.example?",
        "https://login.example#x",
        "https://login.example:x",
        "https://",
        "https:login.example",
        "ftp://login.example",
        "login.example",
        "https://login.exam\nple",
        "https://login.example/\u00e4",
        "https://login.example/" + "x" * 512,
        "",
    ],
)
def test_what_no_issuer_can_be(issuer: str) -> None:
    assert not is_issuer(issuer)


def test_r33_authorities_that_cannot_be_read_stop_the_start(tmp_path: Path) -> None:
    for content in (None, "no certificate"):
        file = tmp_path / "ca.crt"
        if content is not None:
            file.write_text(content)
        with pytest.raises(StartError, match="certificates for identity providers cannot be read"):
            Fetcher(file)


async def test_what_is_not_https_is_not_fetched() -> None:
    for url in (
        "http://10.0.0.1",
        "http://2130706433",
        "file:///etc/passwd",
        "https://user@login.example",
        "",
    ):
        with pytest.raises(FetchError, match="its address is not https"):
            await Fetcher().get(url, 1000)
