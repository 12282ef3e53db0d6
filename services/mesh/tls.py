"""Certificates from files, read again when the files change, so that a rotation needs no restart.

mTLS on every hop: both sides present a certificate of the same authority.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from services.mesh.settings import ServiceSettings


class TlsFiles:
    """A certificate, its key and the authority that the other side must come from (PEM files)."""

    def __init__(self, cert_file: Path, key_file: Path, ca_file: Path) -> None:
        self._files = (cert_file, key_file, ca_file)
        self._contents: tuple[bytes, bytes, bytes] | None = None
        self._stamp: tuple[tuple[int, int, int], ...] = ()
        self.version = 0
        self.load()

    @classmethod
    def of(cls, settings: ServiceSettings) -> TlsFiles | None:
        """None where TLS is not configured."""
        if settings.tls_cert_file is None or settings.tls_key_file is None or settings.tls_ca_file is None:
            return None
        return cls(settings.tls_cert_file, settings.tls_key_file, settings.tls_ca_file)

    def load(self) -> tuple[bytes, bytes, bytes]:
        """(certificate, key, authority); `version` grows when they changed.

        A file that cannot be read while it is being replaced leaves the former contents in force. Raises
        OSError where there are none yet, ssl.SSLError where certificate and key do not belong together.
        """
        try:
            stamp = tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in (path.stat() for path in self._files))
            if self._contents is None or stamp != self._stamp:
                cert, key, authority = (path.read_bytes() for path in self._files)
                self._check()
                self._contents, self._stamp = (cert, key, authority), stamp
                self.version += 1
        except (OSError, ssl.SSLError):
            if self._contents is None:
                raise
        return self._contents

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._files[0], self._files[1])

    def server_credentials(self) -> grpc.ServerCredentials:
        """Asks the files at each handshake; demands a client certificate."""

        def configuration() -> grpc.ServerCertificateConfiguration:
            cert, key, authority = self.load()
            return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=authority)

        return grpc.dynamic_ssl_server_credentials(
            configuration(), configuration, require_client_authentication=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """With what the files hold now; a channel is made anew when `version` has grown."""
        cert, key, authority = self.load()
        return grpc.ssl_channel_credentials(authority, private_key=key, certificate_chain=cert)

    def http_context(self) -> ssl.SSLContext:
        """For an HTTP listener; `refresh` brings later contents in, for connections from then on."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self._files[2]))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._files[0], self._files[1])
        return context

    def refresh(self, context: ssl.SSLContext, version: int) -> int:
        """Loads the files into `context` if they changed since `version`; returns the version in force."""
        self.load()
        if version != self.version:
            context.load_cert_chain(self._files[0], self._files[1])
            context.load_verify_locations(self._files[2])
        return self.version
