"""A process on a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

DEADLINE_S = 20.0


class Terminal:
    """Use as a context manager; the process is killed at the end."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder
        )
        os.close(theirs)
        self.shown = ""
        self._seen = 0

    def expect(self, text: str) -> None:
        """Waits until `text` is shown after what was expected before."""
        end_s = time.monotonic() + DEADLINE_S
        while (place := self.shown.find(text, self._seen)) < 0:
            left_s = end_s - time.monotonic()
            readable, _, _ = select.select([self._ours], [], [], max(0.0, left_s))
            assert readable, f"{text!r} was not shown, but: {self.shown[self._seen :]!r}"
            self.shown += os.read(self._ours, 65536).decode()
        self._seen = place + len(text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_the_prompt(self) -> int:
        """Presses Ctrl-C until the process ends; returns its exit code.

        CPython's readline loses a signal that comes after the prompt is shown and before it begins to wait:
        a person does not hit that moment, and would press again.
        """
        for _ in range(10):
            self.interrupt()
            try:
                return self.process.wait(2)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"Ctrl-C at the prompt does not end it: {self.shown[self._seen :]!r}")

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        os.close(self._ours)
