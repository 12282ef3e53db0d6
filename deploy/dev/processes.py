"""A child process: its own group, its output in a log file, its end seen at once, and no life after ours."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

GUARD = Path(__file__).with_name("guard.py")
MAX_LOG_BYTES = 16 * 1024 * 1024
TAIL_LINES = 200


class Launched(Protocol):
    """What is needed of a child: a part of what `subprocess.Popen` is."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """Set by `wait`."""

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


class Process:
    """One child process at a time under one name; it can be started again.

    It belongs to no event loop: two threads of its own copy its output and wait for its end.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        log_file: Path,
        on_line: Callable[[str, str], None] | None = None,
        launch: Callable[[], Launched] | None = None,
    ) -> None:
        """`on_line(name, line)` is called for each line of output, from a thread. `launch` starts it in
        another way than by its command; the child leads a group of its own and ends with this process."""
        self.name = name
        self.command = list(command)
        self.env = dict(env)
        self.log_file = log_file
        self._cwd = cwd
        self._on_line = on_line
        self._launch = launch or self._by_command
        self._popen: Launched | None = None
        self._ended = threading.Event()
        self._watchers: list[Callable[[], None]] = []
        self._threads: list[threading.Thread] = []
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)

    def start(self) -> None:
        """Starts it; from the main thread only, since the kernel ties the child's life to its thread."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a process is started from the main thread, whose end is its end")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._ended = threading.Event()
        self._popen = self._launch()
        assert self._popen.stdout is not None
        self._threads = [
            threading.Thread(target=self._copy_output, args=(self._popen.stdout,), daemon=True),
            threading.Thread(target=self._await_end, args=(self._popen, self._ended), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The process id of the present or last life; 0 where there was none."""
        return self._popen.pid if self._popen else 0

    @property
    def running(self) -> bool:
        return self._popen is not None and not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._popen.returncode if self._popen and self._ended.is_set() else None

    def wait(self, timeout_s: float | None) -> int | None:
        """Waits for the end in this thread; None where it did not come in time."""
        self._ended.wait(timeout_s)
        return self.exit_code

    async def wait_ended(self, timeout_s: float | None = None) -> int | None:
        """Waits for the end; None where it did not come in time."""
        loop, seen = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(seen.set)

        self._watchers.append(tell)
        try:
            if self.running:  # asked after the watcher stands in the list, so that no end is missed
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(seen.wait(), timeout_s)
        finally:
            self._watchers.remove(tell)
        return self.exit_code

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process itself; nothing happens where it has ended."""
        if self._popen is not None and not self._ended.is_set():
            self._popen.send_signal(number)

    def kill(self) -> None:
        """Sends SIGKILL to the process alone, as a crash would, and waits for the end."""
        self.signal(signal.SIGKILL)
        self.wait(10)

    async def stop(self, grace_s: float) -> int | None:
        """SIGTERM; after `grace_s`, SIGKILL, also to what is left of its group. Returns the exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            if self.running:
                await self.wait_ended(grace_s)
        finally:
            self.end_group()
        return self.exit_code

    def end_group(self) -> None:
        """Sends SIGKILL to whatever is left of the process group, and waits for the end of its output."""
        if self._popen is None:
            return
        self.signal(signal.SIGKILL)
        self.wait(10)
        # The number of a group in which somebody lives is not given to another process. So a process of that
        # number, now that ours has been waited for, is a stranger.
        if not Path(f"/proc/{self._popen.pid}").exists():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(timeout=5)

    def tail(self, lines: int = 40) -> str:
        """The last lines of output."""
        return "\n".join(list(self._tail)[-lines:])

    def _by_command(self) -> Launched:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *self.command],
            cwd=self._cwd,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _copy_output(self, pipe: IO[bytes]) -> None:
        with pipe, _BoundedLog(self.log_file) as log:
            for raw in pipe:
                log.write(raw)
                line = raw.decode(errors="replace").rstrip("\r\n")
                self._tail.append(line)
                if self._on_line is not None:
                    self._on_line(self.name, line)

    def _await_end(self, popen: Launched, ended: threading.Event) -> None:
        popen.wait()
        ended.set()
        for tell in list(self._watchers):
            tell()


class _BoundedLog:
    """Appends to a file; a full one becomes `FILE.1`, in place of the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> _BoundedLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        if self._file.tell() + len(data) > MAX_LOG_BYTES:
            self._file.close()
            self._path.replace(f"{self._path}.1")
            self._file = self._path.open("ab", buffering=0)
        self._file.write(data)
