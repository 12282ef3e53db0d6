"""The client over TLS and mTLS, against a server that demands a client's certificate."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import llmos_client as sdk
import pytest
from llmos_client import AsyncClient, Client, RetryPolicy

from deploy.dev.certs import CertificateAuthority
from tests.framework import scripted_gateway as script
from tests.framework.scripted_gateway import ScriptedGateway

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    authority = CertificateAuthority(folder)
    for name in ("gateway", "client"):
        authority.ensure(name)
    return folder


@pytest.fixture
def gateway(certificates: Path) -> Iterator[ScriptedGateway]:
    pair = ((certificates / "gateway.key").read_bytes(), (certificates / "gateway.crt").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], (certificates / "ca.crt").read_bytes(), True)
    with ScriptedGateway(credentials=credentials) as server:
        yield server


def options(certificates: Path) -> sdk.ClientOptions:
    return sdk.ClientOptions(
        tls_ca_file=certificates / "ca.crt",
        tls_cert_file=certificates / "client.crt",
        tls_key_file=certificates / "client.key",
        api_key="llmos_secret",
        retry=ONCE,
        query_timeout_s=10,
    )


async def test_both_sides_prove_themselves(gateway: ScriptedGateway, certificates: Path) -> None:
    gateway.will(script.models("a"))
    gateway.will(script.models("b"))
    async with AsyncClient(gateway.target, **options(certificates)) as client:
        assert [model.id for model in await client.models()] == ["a"]

    def in_a_thread() -> list[sdk.Model]:
        with Client(gateway.target, **options(certificates)) as client:
            return client.models()

    assert [model.id for model in await asyncio.to_thread(in_a_thread)] == ["b"]


@pytest.mark.parametrize("without", ["certificate", "authority", "tls"])
async def test_what_is_missing_on_one_side_is_a_clear_refusal(
    gateway: ScriptedGateway, certificates: Path, without: str
) -> None:
    given = options(certificates)
    if without in ("certificate", "tls"):
        given["tls_cert_file"] = given["tls_key_file"] = None
    if without in ("authority", "tls"):
        given["tls_ca_file"] = None
    async with AsyncClient(gateway.target, **given) as client:
        with pytest.raises(sdk.Unavailable, match="cannot be reached") as caught:
            await client.models()
    assert "TLS" in caught.value.hint
    assert not gateway.calls


def test_pem_files_that_hold_nothing_usable(certificates: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("not a certificate")
    for files in (
        sdk.ClientOptions(tls_ca_file=empty),
        sdk.ClientOptions(tls_cert_file=empty, tls_key_file=empty),
        sdk.ClientOptions(
            tls_cert_file=certificates / "client.crt", tls_key_file=certificates / "gateway.key"
        ),
    ):
        with pytest.raises(sdk.ConfigurationError, match="belong together"):
            Client("127.0.0.1:1", **files)
