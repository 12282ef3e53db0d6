"""Development certificates are good for both sides of mTLS, private, and renewed in time."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from deploy.dev import certs


def contexts(folder: Path, server: str, client: str | None) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "ca.crt"))
    serving.verify_mode = ssl.CERT_REQUIRED
    serving.load_cert_chain(folder / f"{server}.crt", folder / f"{server}.key")
    calling = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    if client:
        calling.load_cert_chain(folder / f"{client}.crt", folder / f"{client}.key")
    return serving, calling


async def handshake(folder: Path, client: str | None, name: str) -> bytes:
    serving, calling = contexts(folder, "gateway", client)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=serving) as server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=calling, server_hostname=name)
        try:
            return await reader.read()
        finally:
            writer.close()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "gateway", "llmos-gateway"])
async def test_mtls_with_every_name(tmp_path: Path, name: str) -> None:
    certs.ensure_all(tmp_path)
    assert await handshake(tmp_path, "client", name) == b"hello"


async def test_no_certificate_no_connection(tmp_path: Path) -> None:
    certs.ensure_all(tmp_path)
    answer = b""
    with contextlib.suppress(OSError):  # in TLS 1.3 the client may see the refusal as a plain end
        answer = await handshake(tmp_path, None, "localhost")
    assert answer == b""


def test_made_once_and_private(tmp_path: Path) -> None:
    assert certs.ensure_all(tmp_path) == ["auth", "logging", "inference", "gateway", "client"]
    assert certs.ensure_all(tmp_path) == []
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("*.key")} == {0o600}


def test_what_ends_soon_is_renewed_and_a_new_authority_renews_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certs.ensure_all(tmp_path)
    monkeypatch.setattr(certs, "VALID_DAYS", 1)
    certs.CertificateAuthority(tmp_path).issue("auth")
    monkeypatch.undo()
    assert certs.ensure_all(tmp_path) == ["auth"]
    (tmp_path / "ca.key").unlink()
    assert len(certs.ensure_all(tmp_path)) == 5


def test_a_replaced_certificate_differs(tmp_path: Path) -> None:
    authority = certs.CertificateAuthority(tmp_path)
    serials = {
        x509.load_pem_x509_certificate(authority.issue("gateway")[0].read_bytes()).serial_number
        for _ in range(2)
    }
    assert len(serials) == 2
