"""The first start makes the administrator, and hands over the key in a private file.

The file comes first, under a provisional name; then the database learns of the key; then the file gets its
name. Wherever that is cut off, the next start finishes it or begins anew, and no key is lost.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from services.auth.credentials import keys
from services.auth.store import ApiKey, Batch, Client, Put, Store, Tenant
from services.mesh.app import StartError
from services.mesh.clock import Clock
from services.mesh.errors import AlreadyExists, CredentialInvalid
from services.mesh.policy import UNLIMITED_PLAN

log = logging.getLogger(__name__)

TENANT = "default"
CLIENT = "admin"
ROLE = "admin"
ACTOR = "service:auth"


class KeyFile:
    """The file that hands the administrator's key over; only its owner can read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._provisional = path.with_name(f"{path.name}.new")

    def exists(self) -> bool:
        return self.path.exists()

    def provisional(self) -> str | None:
        """The key under the provisional name, if there is one."""
        try:
            return self._provisional.read_bytes().decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None

    def write(self, key: str) -> None:
        """Writes the key under the provisional name, durably. Never follows or replaces what is there."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self._provisional, flags, 0o600), "w", encoding="ascii") as file:
            file.write(f"{key}\n")
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Gives it its name."""
        self._provisional.rename(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Removes what is under the provisional name."""
        self._provisional.unlink(missing_ok=True)


async def ensure_administrator(store: Store, file: KeyFile, clock: Clock) -> None:
    """Makes tenant, client and key where the store is empty, and hands the key over in the file.

    Raises StartError where the file exists and the store is empty: they are not of one deployment.
    """
    if not await store.is_empty():
        await _finish(store, file)
        if not file.exists():
            log.warning(
                "the administrator's key is not in %s, where the first start wrote it. That is fine if it "
                "was moved to a safe place. If it is lost, stop auth, move its database away and start "
                "again: a new administrator is made, and all tenants, clients and keys have to be made anew.",
                file.path,
            )
        return
    if file.exists():
        raise StartError(
            f"{file.path} holds the key of an administrator, but the database is empty. Put the database "
            "back from a backup; or, to begin anew, delete that file and start again."
        )
    file.discard()
    key = keys.new_api_key()
    file.write(key)
    try:
        await _create(store, key, clock)
    except AlreadyExists:
        # another process on the same database made it in between, and hands over its own key
        file.discard()
        log.info("the administrator was made by another process of auth")
        return
    file.publish()
    log.info("the first start made the administrator; the key is in %s", file.path)


async def _create(store: Store, key: str, clock: Clock) -> None:
    """Raises AlreadyExists where there is a tenant already."""
    parsed = keys.parse_api_key(key)
    first = (
        Tenant(TENANT, display_name="Default", plan_id=UNLIMITED_PLAN),
        # without a client secret: the administrator comes with the key
        Client(CLIENT, TENANT, display_name="Administrator", roles=frozenset({ROLE})),
        ApiKey(keys.new_key_id(), CLIENT, parsed.prefix, parsed.digest, display_name="First key"),
    )
    writes = [Put(resource, create=True, note="first start") for resource in first]
    await store.commit(Batch(clock.now(), ACTOR, writes=writes, only_if_empty=True))


async def _finish(store: Store, file: KeyFile) -> None:
    """Where a first start was cut off before its last step: the key counts if the store knows it."""
    key = file.provisional()
    if key is None:
        return
    try:
        parsed = keys.parse_api_key(key)
        found = await store.find_api_key(parsed.prefix)
        known = found is not None and keys.matches(found[0].digest, parsed.digest)
    except CredentialInvalid:
        known = False
    if known and not file.exists():
        file.publish()
        log.info("the first start is finished; the administrator's key is in %s", file.path)
    else:
        file.discard()
