"""Development certificates: an authority of our own, one certificate for each service, one for clients.

For one machine only: the authority's key lies beside them, and they are good for a year.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.dev.state import SERVICES, write_private

CLIENT = "client"
VALID_DAYS = 365
RENEW_DAYS = 14
CLOCK_SKEW = datetime.timedelta(minutes=5)


class CertificateAuthority:
    """Issues certificates into a folder: `ca.crt`, and `NAME.crt` with `NAME.key` (0600)."""

    def __init__(self, folder: Path) -> None:
        """Reads the authority of the folder, or makes one where there is none or it ends soon."""
        self.folder = folder
        self.ca_file = folder / "ca.crt"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key_file = folder / "ca.key"
        if self.ca_file.exists() and key_file.exists() and not _ends_soon(self.ca_file):
            self._certificate = x509.load_pem_x509_certificate(self.ca_file.read_bytes())
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            self._key = key
            self.made = False
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llmos development authority")])
        builder = _builder(name, name, self._key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(ca=True), critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        write_private(key_file, _pem(self._key))
        _write(self.ca_file, self._certificate)
        self.made = True

    def issue(self, name: str) -> tuple[Path, Path]:
        """Makes a new certificate for `name`, in place of the one before; returns its file and its key's.

        It is good for a server under `name`, `llmos-NAME`, localhost and the loopback addresses, and for
        a client.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names: list[x509.GeneralName] = [x509.DNSName(host) for host in (name, f"llmos-{name}", "localhost")]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(subject, self._certificate.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(authority, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        cert_file, key_file = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        write_private(key_file, _pem(key))
        _write(cert_file, certificate)
        return cert_file, key_file

    def ensure(self, name: str) -> bool:
        """Issues where there is none of this authority or it ends soon; returns whether it did."""
        files = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        if not self.made and all(file.exists() for file in files) and not _ends_soon(files[0]):
            return False
        self.issue(name)
        return True


def ensure_all(folder: Path) -> list[str]:
    """Makes what is missing; returns the names of the certificates that it made."""
    authority = CertificateAuthority(folder)
    return [name for name in (*SERVICES, CLIENT) if authority.ensure(name)]


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _ends_soon(file: Path) -> bool:
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left < datetime.timedelta(days=RENEW_DAYS)


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _write(file: Path, certificate: x509.Certificate) -> None:
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    fresh.replace(file)
