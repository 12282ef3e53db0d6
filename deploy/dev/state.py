"""The state folder: secrets, the lock that keeps a second mesh out, and what may be wrong with it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
import shlex
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

SERVICES = ("auth", "logging", "inference", "gateway")
FORMAT = "1"


class CannotStart(Exception):
    """Something stands in the way; the message is a sentence that says what to do."""


class State:
    """One mesh's folder.

    `format` (its version, written last when the folder is made), `secrets/SERVICE` and
    `secrets/gateway-payload-key` (0600), `run/` (the lock, a record of the processes, `client.env`), `log/`,
    and one folder for each process.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.secrets = self.root / "secrets"
        self.payload_key = self.secrets / "gateway-payload-key"
        self.logs = self.root / "log"
        self.run = self.root / "run"
        self.client_env = self.run / "client.env"
        self.admin_key = self.root / "auth" / "admin-key"
        self._lock: IO[str] | None = None

    def of(self, part: str) -> Path:
        """The folder of one process."""
        return self.root / part

    def prepare(self) -> None:
        """Makes the folder and its secrets where they are missing.

        Raises:
            CannotStart: the folder is of another version, or half-made.
        """
        marker = self.root / "format"
        if marker.exists():
            found = marker.read_text().strip()
            if found != FORMAT:
                raise CannotStart(
                    f"{self.root} was made by another version of llmos (format {found}, not {FORMAT})."
                    f" Move it away, or remove it with its keys and records: rm -r {self.root}"
                )
        elif any((self.root / service).exists() for service in SERVICES):
            raise CannotStart(
                f"{self.root} is half-made: it holds a service's files, but was never finished."
                f" Move it away, or remove it: rm -r {self.root}"
            )
        for folder in (self.root, self.secrets, self.logs, self.run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for service in SERVICES:
            if not (self.secrets / service).exists():
                write_private(self.secrets / service, secrets.token_urlsafe(32))
        if not self.payload_key.exists():
            write_private(self.payload_key, base64.b64encode(secrets.token_bytes(32)).decode())
        if not marker.exists():
            write_private(marker, FORMAT)

    def lock(self) -> None:
        """Keeps every other mesh out of this folder until this process ends.

        Raises:
            CannotStart: a mesh runs here, or what is left of one does.
        """
        self.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (self.run / "lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            pid = self._record().get("mesh", {}).get("pid")
            raise CannotStart(
                f"A mesh runs already in {self.root}{f' (process {pid})' if pid else ''}. Use it, or stop it"
                " with Ctrl-C there or with `make down` here."
            ) from None
        left = {name: entry["pid"] for name, entry in self._record().items() if _alive(entry)}
        if left:
            file.close()
            raise CannotStart(
                "Processes of an earlier mesh still run: "
                + ", ".join(f"{name} ({pid})" for name, pid in left.items())
                + ". End them with `make down`."
            )
        self._lock = file

    def record(self, processes: Mapping[str, int]) -> None:
        """Notes which processes belong to this mesh, for `lock` and `stop_recorded`."""
        entries = {"mesh": os.getpid(), **processes}
        content = {name: {"pid": pid, "started": _start_time(pid)} for name, pid in entries.items() if pid}
        write_private(self.run / "mesh.json", json.dumps(content, indent=1))

    def tell_clients(self, variables: Mapping[str, str]) -> None:
        """Writes what clients on this machine need, for a shell to read: `. .state/run/client.env`."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
        write_private(self.client_env, "\n".join(lines) + "\n")

    def client_variables(self) -> dict[str, str]:
        """What `tell_clients` wrote.

        Raises:
            CannotStart: no mesh is ready here.
        """
        try:
            lines = self.client_env.read_text().splitlines()
        except OSError:
            raise CannotStart(f"No mesh is ready in {self.root}: start one with `make up`.") from None
        words = [shlex.split(line)[1] for line in lines]
        return dict(word.split("=", 1) for word in words)

    def forget(self) -> None:
        """The mesh has stopped: nothing of it is left to be found."""
        if self._lock is not None:
            for file in (self.run / "mesh.json", self.client_env):
                file.unlink(missing_ok=True)

    def stop_recorded(self, timeout_s: float) -> bool:
        """Asks a mesh of another terminal to stop, or ends what is left of one; False where there is none."""
        record = {name: entry for name, entry in self._record().items() if _alive(entry)}
        mesh = record.pop("mesh", None)
        if mesh is not None:
            os.kill(mesh["pid"], signal.SIGTERM)
            _wait_gone([mesh], timeout_s)
        for entry in record.values():
            if _alive(entry):
                os.kill(entry["pid"], signal.SIGKILL)
        return mesh is not None or bool(record)

    def _record(self) -> dict[str, dict[str, int]]:
        try:
            content: dict[str, dict[str, int]] = json.loads((self.run / "mesh.json").read_text())
        except (OSError, ValueError):
            return {}
        return content


def write_private(path: Path, text: str) -> None:
    """Writes a file of mode 0600, whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)


def _start_time(pid: int) -> int:
    """When a process started, in the kernel's ticks, which tells a reused number apart; 0: unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


def _alive(entry: Mapping[str, int]) -> bool:
    if Path("/proc/self/stat").exists():
        return _start_time(entry["pid"]) == entry["started"] != 0
    try:
        os.kill(entry["pid"], 0)
    except OSError:
        return False
    return True


def _wait_gone(entries: list[dict[str, int]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(_alive(entry) for entry in entries):
        if time.monotonic() > deadline:
            raise CannotStart(
                f"The mesh (process {entries[0]['pid']}) did not stop within {timeout_s:.0f} s; end it with"
                f" `kill -9 {entries[0]['pid']}`, then `make down` again."
            )
        time.sleep(0.1)
