"""llama.cpp: its own server over HTTP, and a batched loop over its library; both read the same GGUF file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST
from tests.bench.over_http import OverHttp
from tests.bench.piped import Piped
from tests.bench.work import CannotMeasure, Stream, Work

LIBRARIES = ROOT / ".tools" / "bench-llama"
"""llama.cpp, built for this machine; `make bench-engine DTYPE=q4` builds it."""
SERVER = LIBRARIES / "build" / "bin" / "llama-server"

GUESSING = (
    "--spec-type",
    "ngram-simple",
    "--spec-ngram-simple-size-n",
    "4",
    "--spec-ngram-simple-size-m",
    "6",
)
"""What comes next is guessed from what came before, as we guess it: as many tokens at most."""

Encode = Callable[[str], Sequence[int]]


def require() -> None:
    """Raises CannotMeasure where llama.cpp is not built."""
    if not SERVER.exists():
        raise CannotMeasure(f"{SERVER} is missing: `make bench-engine DTYPE=q4` builds it")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LlamaServer(OverHttp):
    """A `Subject`: a slot for each stream, continuous batching, all cores, no search for known prefixes.

    `ignore_eos` forbids the end of sequence, where others go past it.
    """

    def __init__(
        self,
        gguf: Path,
        encode: Encode,
        *,
        slots: int,
        context: int,
        port: int,
        log_file: Path,
        guessing: bool,
    ) -> None:
        """`context`: tokens of one stream."""
        self._encode = encode
        command = [
            *(str(SERVER), "--model", str(gguf), "--host", HOST, "--port", str(port), "--offline"),
            *("--parallel", str(slots), "--ctx-size", str(slots * context), "--no-kv-unified"),
            *("--threads", str(cores()), "--flash-attn", "on"),
            *("--cache-ram", "0", "--no-cache-prompt", "--no-ui", "--no-slots", "--log-verbosity", "1"),
            *(GUESSING if guessing else ()),
        ]
        name = "llama.cpp server guessing" if guessing else "llama.cpp server"
        super().__init__(name, command, {}, port=port, log_file=log_file, label="llama.cpp")

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {
            "prompt": list(self._encode(prompt)),
            "n_predict": max_tokens,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": False,
            "ignore_eos": True,
            # The shortest way to the most probable token.
            "samplers": ["top_k"],
            "top_k": 1,
        }

    async def stream(self, body: Mapping[str, Any], due_s: float) -> Stream:
        first_s = last_s = 0.0
        tokens = 0
        token_ids: list[int] = []
        text: list[str] = []
        async with aclosing(self.events("/completion", body)) as found:
            async for event in found:
                last_s = time.perf_counter() - due_s
                if event["stop"]:
                    tokens = event["tokens_predicted"]
                    continue
                first_s = first_s or last_s
                token_ids += event["tokens"]
                text.append(event["content"])
        # It tells no id of a token that ends within a character: then its own count is what is left.
        whole = len(token_ids) == tokens
        return Stream(first_s, last_s, tokens, tuple(token_ids) if whole else (), "".join(text))


class LlamaLoop(Piped):
    """A `Subject`: a static batch through `llama_decode`, the arg-max taken by numpy."""

    def __init__(self, gguf: Path, encode: Encode, *, levels: Sequence[int], context: int) -> None:
        self._encode = encode
        numbers = (str(context), str(cores()), *(str(level) for level in levels))
        command = ("-m", "tests.bench.llama_loop_worker", str(gguf), *numbers)
        super().__init__("llama.cpp loop", command, {"PYTHONPATH": str(LIBRARIES)})

    def prompts(self, work: Work) -> list[list[int]]:
        return [list(self._encode(prompt)) for prompt in work.prompts]
