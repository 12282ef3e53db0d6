"""What a client is told: where the server is, the credential, TLS and defaults of its calls.

An argument wins over the environment:

    target          LLMOS_TARGET            host:port of the gateway; default 127.0.0.1:50050
    api_key         LLMOS_API_KEY           an API key, or an access token
    api_key_file    LLMOS_API_KEY_FILE      a file that holds one, and nothing else
    model           LLMOS_MODEL             the model of calls that name none
    tls_ca_file     LLMOS_TLS_CA_FILE       PEM; whom to trust
    tls_cert_file   LLMOS_TLS_CERT_FILE     PEM; this client's certificate, for mTLS
    tls_key_file    LLMOS_TLS_KEY_FILE      PEM; its key
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from llmos_client.errors import ConfigurationError
from llmos_client.retry import RetryPolicy

DEFAULT_TARGET = "127.0.0.1:50050"
MAX_SECRET_FILE_BYTES = 64 * 1024
MAX_PEM_FILE_BYTES = 1024 * 1024

StrPath = str | os.PathLike[str]


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of `Client` and `AsyncClient`."""

    api_key: str | None
    """An API key or an access token; kept out of `repr`."""
    api_key_file: StrPath | None
    """A file that holds it instead."""
    model: str | None
    """The model of calls that name none."""
    tls: bool
    """Use TLS and trust the system's authorities; implied by the files below."""
    tls_ca_file: StrPath | None
    """PEM file of the authorities to trust instead."""
    tls_cert_file: StrPath | None
    """PEM file of this client's certificate, for mTLS; needs `tls_key_file`."""
    tls_key_file: StrPath | None
    """PEM file of its key."""
    allow_plaintext: bool
    """Send the credential without TLS to a server that is not on this machine: only where the network
    itself encrypts."""
    timeout_s: float
    """Deadline of `generate` and `stream` where the call names none. Default 600 s."""
    query_timeout_s: float
    """The same for all other calls. Default 30 s."""
    retry: RetryPolicy
    """When an unavailable server is tried again."""


@dataclass(frozen=True)
class TlsMaterial:
    """The contents of PEM files. Without `ca` the system's authorities are trusted."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ClientConfig:
    """Everything resolved and checked."""

    target: str
    api_key: str | None = field(repr=False)
    model: str | None
    tls: TlsMaterial | None
    timeout_s: float
    query_timeout_s: float
    retry: RetryPolicy

    @classmethod
    def of(
        cls, target: str | None, options: ClientOptions, environment: Mapping[str, str] | None = None
    ) -> ClientConfig:
        """Raises ConfigurationError with a sentence. `environment` defaults to the process's."""
        env = os.environ if environment is None else environment
        place = target or env.get("LLMOS_TARGET") or DEFAULT_TARGET
        if place.startswith(("http://", "https://")):
            raise ConfigurationError(f"The target {place!r} is a URL; give host:port of the gRPC port.")
        tls = _tls(options, env)
        api_key = _api_key(options, env)
        if api_key and tls is None and not is_local(place) and not options.get("allow_plaintext"):
            raise ConfigurationError(
                f"The credential would go to {place} unencrypted.",
                hint="Configure TLS, or set allow_plaintext where the network itself encrypts.",
            )
        return cls(
            target=place,
            api_key=api_key,
            model=options.get("model") or env.get("LLMOS_MODEL") or None,
            tls=tls,
            timeout_s=_positive("timeout_s", options.get("timeout_s", 600.0)),
            query_timeout_s=_positive("query_timeout_s", options.get("query_timeout_s", 30.0)),
            retry=options.get("retry") or RetryPolicy(),
        )


def is_local(target: str) -> bool:
    """Whether a gRPC target cannot leave this machine."""
    scheme, colon, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    host = target.rpartition(":")[0] if target.count(":") == 1 else target
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    return host == "localhost" or host == "::1" or _in_127(host)


def _in_127(host: str) -> bool:
    octets = host.split(".")
    return len(octets) == 4 and octets[0] == "127" and all(octet.isdecimal() for octet in octets)


def check_credential(text: str, source: str) -> str:
    """`text` without surrounding white space. Raises ConfigurationError, never quoting it."""
    credential = text.strip()
    if not credential:
        raise ConfigurationError(f"The credential from {source} is empty.")
    if not credential.isascii() or not credential.isprintable() or " " in credential:
        raise ConfigurationError(f"The credential from {source} is not one word of printable ASCII.")
    return credential


def _api_key(options: ClientOptions, env: Mapping[str, str]) -> str | None:
    if (key := options.get("api_key")) is not None:
        return check_credential(key, "the argument api_key")
    if (file := options.get("api_key_file")) is not None:
        return read_secret(file)
    if key := env.get("LLMOS_API_KEY"):
        return check_credential(key, "LLMOS_API_KEY")
    if file := env.get("LLMOS_API_KEY_FILE"):
        return read_secret(file)
    return None


def read_secret(file: StrPath) -> str:
    """The one word that the file holds. Raises ConfigurationError."""
    content = _read(file, MAX_SECRET_FILE_BYTES)
    return check_credential(content.decode("utf-8", errors="replace"), f"the file {os.fspath(file)}")


def _tls(options: ClientOptions, env: Mapping[str, str]) -> TlsMaterial | None:
    ca = options.get("tls_ca_file") or env.get("LLMOS_TLS_CA_FILE")
    cert = options.get("tls_cert_file") or env.get("LLMOS_TLS_CERT_FILE")
    key = options.get("tls_key_file") or env.get("LLMOS_TLS_KEY_FILE")
    if bool(cert) != bool(key):
        raise ConfigurationError("A TLS certificate and its key belong together: give both files or none.")
    if not (ca or cert or options.get("tls")):
        return None
    material = TlsMaterial(*(_read(file, MAX_PEM_FILE_BYTES) if file else None for file in (ca, cert, key)))
    # gRPC would take anything, and fail at the first call without saying why.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca:
            context.load_verify_locations(ca)
        if cert and key:
            context.load_cert_chain(cert, key, password=lambda: "")  # never asks at the terminal
    except ssl.SSLError as error:
        raise ConfigurationError(
            "The TLS files hold no certificate, or a certificate and a key that do not belong together."
        ) from error
    return material


def _read(file: StrPath, max_bytes: int) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(max_bytes + 1)
    except OSError as error:
        raise ConfigurationError(f"Cannot read {os.fspath(file)}: {error.strerror}.") from error
    if len(content) > max_bytes:
        raise ConfigurationError(f"{os.fspath(file)} is larger than {max_bytes} bytes.")
    return content


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ConfigurationError(f"{name} must be above 0 and finite, not {value:g}.")
    return value
