"""Which store the settings ask for."""

from __future__ import annotations

import ssl
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from services.auth.settings import AuthSettings
from services.auth.stores import database
from services.auth.stores.sql import SqlStore
from services.mesh.app import StartError
from services.mesh.settings import LOOPBACK


def open_store(settings: AuthSettings) -> SqlStore:
    """Not yet connected: `start` does that. Raises StartError where the settings cannot be used."""
    if settings.db_url is None:
        return sqlite_store(settings.db_path)
    try:
        url = make_url(settings.db_url.get_secret_value())
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgresql", "postgres") or not url.database:
        raise StartError("LLMOS_AUTH_DB_URL must look like postgresql://user@host:5432/database")
    if settings.db_password_file is not None:
        url = url.set(password=_password(settings.db_password_file))
    tls = _tls(settings.db_ca_file) if settings.db_ca_file is not None or not _is_near(url) else None
    return SqlStore(database.postgresql(url, pool_size=settings.db_pool_size, tls=tls))


def sqlite_store(path: Path) -> SqlStore:
    """In this file, which is made if it is not there."""
    return SqlStore(database.sqlite(path))


def _is_near(url: URL) -> bool:
    """On this machine: over loopback, or a socket in the file system."""
    host = url.host or str(url.query.get("host", ""))
    return not host or host in LOOPBACK or host.startswith("/")


def _password(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        raise StartError(f"the password of the database cannot be read from {path}") from None


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError):
        raise StartError(f"{ca_file} holds no certificates that the database's could be checked by") from None
