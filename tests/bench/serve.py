"""`transformers serve` over its own HTTP: with continuous batching or without, whichever is the faster."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST
from tests.bench.generate import OFFLINE
from tests.bench.generate_worker import NEVER
from tests.bench.over_http import OverHttp
from tests.bench.work import CannotMeasure, Stream

LIBRARIES = ROOT / ".tools" / "bench"
"""What `transformers serve` needs beyond dev; `make bench-engine` installs it."""


class Serve(OverHttp):
    """A `Subject`."""

    def __init__(
        self, folder: Path, dtype: str, device: str, *, port: int, log_file: Path, batching: bool
    ) -> None:
        self._folder = folder
        command = [
            *(sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)),
            *("--host", HOST, "--port", str(port), "--dtype", dtype, "--device", device),
            *("--log-level", "error"),
            *(["--continuous-batching"] if batching else []),
        ]
        env = OFFLINE | {"PYTHONPATH": str(LIBRARIES)}
        name = "serve batching" if batching else "serve"
        super().__init__(name, command, env, port=port, log_file=log_file, label="serve")

    async def start(self) -> None:
        if not LIBRARIES.is_dir():
            raise CannotMeasure(f"{LIBRARIES} is missing: `make bench-engine` installs it")
        await super().start()

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        config = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": NEVER, "pad_token_id": 0}
        return {
            "model": str(self._folder),
            "prompt": prompt,
            "stream": True,
            "max_tokens": max_tokens,
            "generation_config": json.dumps(config),
        }

    async def stream(self, body: Mapping[str, Any], due_s: float) -> Stream:
        first_s = last_s = 0.0
        tokens = 0
        text: list[str] = []
        async with aclosing(self.events("/v1/completions", body)) as found:
            async for event in found:
                last_s = time.perf_counter() - due_s
                piece = event["choices"][0].get("text") or ""
                if piece:
                    first_s = first_s or last_s
                    text.append(piece)
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        return Stream(first_s, last_s, tokens, text="".join(text))
