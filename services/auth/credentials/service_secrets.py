"""The secrets by which the four services prove themselves, read from files at start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.auth.credentials import keys
from services.auth.grants.policy import SERVICES
from services.mesh.access_token import SERVICE_PREFIX
from services.mesh.app import StartError

MIN_CHARS = 32
MAX_CHARS = 256


def load(folder: Path) -> Mapping[str, bytes]:
    """The digest of each service's secret, by client id.

    Raises StartError where one is missing, short, or shared by two services.
    """
    digests: dict[str, bytes] = {}
    for name in SERVICES:
        path = folder / name
        try:
            secret = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise StartError(
                f"the secret of the service {name} cannot be read from {path}: put {MIN_CHARS} or more "
                "random characters there (`openssl rand -hex 32`), readable by this process only, and give "
                f"the same file to {name}"
            ) from None
        if not MIN_CHARS <= len(secret) <= MAX_CHARS:
            raise StartError(f"the secret in {path} must have {MIN_CHARS} to {MAX_CHARS} characters")
        digest = keys.digest(secret)
        if digest in digests.values():
            raise StartError(f"the secret in {path} is that of another service too: each needs its own")
        digests[SERVICE_PREFIX + name] = digest
    return digests
