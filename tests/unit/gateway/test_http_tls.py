"""The HTTP edge over mTLS: a client certificate is demanded, and replaced files are used at once."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path

import httpx
import pytest
import uvloop

from deploy.dev.certs import CertificateAuthority
from services.mesh.tls import TlsFiles
from tests.framework.gateway_fakes import Bench, FakeReplica
from tests.framework.gateway_http import KEY, HttpBench, serving

AUTH = {"authorization": f"Bearer {KEY}"}


def client_context(authority: Path, certificate: tuple[Path, Path] | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context


async def status(http: HttpBench, context: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(verify=context) as client:
        response = await client.get(f"https://127.0.0.1:{http.port}/v1/models", headers=AUTH)
        return response.status_code


async def scenario(folder: Path) -> None:
    first, second = CertificateAuthority(folder / "1"), CertificateAuthority(folder / "2")
    server, replacement = first.issue("gateway"), second.issue("gateway")
    with_first = client_context(folder / "1", first.issue("client"))
    with_second = client_context(folder / "2", second.issue("client"))
    # Trusts the new server, and shows what the old authority gave it.
    mixed = client_context(folder / "2", first.issue("client"))
    files = TlsFiles(*server, folder / "1" / "ca.crt")
    async with serving(Bench([FakeReplica()]), tls=files) as http:
        assert await status(http, with_first) == 200
        with pytest.raises(httpx.TransportError):
            await status(http, client_context(folder / "1", None))
        with pytest.raises(httpx.TransportError):
            await status(http, with_second)
        async with httpx.AsyncClient(verify=with_first) as kept:
            url = f"https://127.0.0.1:{http.port}/v1/models"
            await kept.get(url, headers=AUTH)
            for name in (*(file.name for file in replacement), "ca.crt"):
                shutil.copy(folder / "2" / name, folder / "1" / name)
            assert await status(http, with_second) == 200
            # A connection that stands is not cut.
            assert (await kept.get(url, headers=AUTH)).status_code == 200
        with pytest.raises(httpx.TransportError):
            await status(http, with_first)
        with pytest.raises(httpx.TransportError):
            await status(http, mixed)


def test_mtls_and_replaced_certificates(tmp_path: Path) -> None:
    asyncio.run(scenario(tmp_path))


def test_mtls_and_replaced_certificates_on_uvloop(tmp_path: Path) -> None:
    """The loop that the service runs on has a TLS of its own."""
    uvloop.run(scenario(tmp_path))
