"""Says what is being done, each line with the seconds since the beginning."""

from __future__ import annotations

import time


class Progress:
    """`say = Progress()`; `say("…")`."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begun_s:6.1f} s] {text}", flush=True)
