"""Brings a database to this version's schema, whatever version left it; several processes may try at once."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from services.auth.stores.database import UNUSABLE, Database, make_private
from services.mesh.app import StartError

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).with_name("migrations")
_LOCK = 0x6C6C6D6F73  # "llmos": an advisory lock of PostgreSQL, held until the transaction ends
_OF_FILE = "put it back from a backup, or give the service an empty state folder"
_OF_SERVER = "check LLMOS_AUTH_DB_URL and the rights of its user, or put the database back from a backup"


async def migrate(database: Database, revision: str = "head") -> None:
    """To the newest revision, or to the given one, up or down; all steps or none.

    Raises StartError where the database cannot be used as it is.
    """
    try:
        if database.file is not None:
            make_private(database.file)
    except OSError as error:
        raise StartError(f"the database {database.name} cannot be opened: {error.strerror}") from error
    try:
        async with database.migrate() as connection:
            await connection.run_sync(_migrate, database.name, revision)
    except OSError as error:
        shown = error.strerror or type(error).__name__
        raise StartError(f"the database {database.name} cannot be reached: {shown}") from error
    except UNUSABLE as error:
        shown = str(getattr(error, "orig", None) or error)
        hint = _OF_SERVER if database.file is None else _OF_FILE
        raise StartError(f"the database {database.name} cannot be used ({shown}): {hint}") from error


def _migrate(connection: sa.Connection, name: str, revision: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    logging.getLogger("alembic").setLevel(logging.WARNING)  # what matters is logged here
    config = _config(connection)
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    found = MigrationContext.configure(connection).get_current_revision()
    newest = str(scripts.get_current_head())
    if found is None:
        found = _before_alembic(connection)
        if found in known:
            command.stamp(config, found)
    if found is not None and found not in known:
        raise StartError(
            f"the database {name} was written by a newer version of llmos (schema {_shown(found)}, this one "
            f"knows {_shown(newest)}): start that version, or put back a backup from before the update"
        )
    if revision == "base" or (revision in known and found is not None and revision < found):
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)
    now = MigrationContext.configure(connection).get_current_revision()
    if now != found:
        log.info("the schema of %s is %s now; it was %s", name, now, found or "not there")


def _before_alembic(connection: sa.Connection) -> str | None:
    """The revision of a file that an older version of llmos wrote, which counted in a table of its own."""
    if not sa.inspect(connection).has_table("schema_version"):
        return None
    version = connection.execute(sa.text("SELECT version FROM schema_version")).scalar()
    return None if version is None else f"{version:04}"


def _config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _shown(revision: str) -> str:
    """0002 as 2: as people were told before."""
    return str(int(revision)) if re.fullmatch(r"\d+", revision) else revision
