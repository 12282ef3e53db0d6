"""Fetching one JSON document over HTTPS from an address that an administrator has configured.

What a provider may not do with us: send us elsewhere (redirects), keep us (time), fill us (size, also by
compression), or have us call what only we can reach (a key set of an outside issuer on loopback).
"""

from __future__ import annotations

import asyncio
import ssl
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from services.mesh.app import StartError

FETCH_TIMEOUT_S = 5.0


class FetchError(Exception):
    """The document cannot be had; says why, for the log."""


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine, without asking any resolver."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_allowed(url: str) -> bool:
    """Whether an address may be fetched at all: https, or http on loopback, without user and fragment."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return False
    if not parts.hostname or "@" in parts.netloc or "#" in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))


def on_loopback(url: str) -> bool:
    """Whether an allowed address is on this machine."""
    return is_loopback(urlsplit(url).hostname or "")


class Fetcher:
    """Fetches, with a connection for each use: a provider is asked every ten minutes, and nothing that one
    sets, such as a cookie, is there for the next.

    `ca_file`: authorities to trust besides those that httpx brings. `timeout_s`: for connecting, sending and
    receiving together. Raises StartError where the file cannot be used.
    """

    def __init__(self, ca_file: Path | None = None, *, timeout_s: float = FETCH_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._tls: ssl.SSLContext = httpx.create_ssl_context(trust_env=False)
        if ca_file is not None:
            try:
                self._tls.load_verify_locations(cafile=ca_file)
            except OSError as error:  # ssl.SSLError too
                raise StartError(
                    f"the certificates for identity providers cannot be read: {ca_file}: {error.strerror}"
                ) from None

    async def get(self, url: str, max_bytes: int) -> bytes:
        """The body of a 200. Ends within `timeout_s`; raises FetchError."""
        if not is_allowed(url):
            raise FetchError("its address is not https")
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._get(url, max_bytes)
        except TimeoutError:
            raise FetchError("it does not answer in time") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise FetchError(f"it cannot be reached ({type(error).__name__})") from error

    async def _get(self, url: str, max_bytes: int) -> bytes:
        # nothing from the environment: a proxy would see, and could choose, whose keys we believe
        client = httpx.AsyncClient(
            verify=self._tls, trust_env=False, follow_redirects=False, timeout=self._timeout_s
        )
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        async with client, client.stream("GET", url, headers=headers) as response:
            if response.status_code != 200:
                raise FetchError(f"it answers {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise FetchError("it answers compressed, though it was asked not to")
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > max_bytes:
                    raise FetchError(f"it answers with more than {max_bytes} bytes")
            return bytes(body)
