"""vLLM on the CPU over its own HTTP, from an environment of its own: it needs another torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST
from tests.bench.generate import OFFLINE
from tests.bench.llama_cpp import cores
from tests.bench.over_http import OverHttp
from tests.bench.work import CannotMeasure, Stream

ENVIRONMENT = ROOT / ".tools" / "bench-vllm"
"""`make bench-engine VLLM=1` makes it."""
KV_CACHE_GIB = 2


def _preload() -> str:
    """What vLLM's makers have one load before: an allocator and Intel's OpenMP, where they are."""
    openmp = ENVIRONMENT / "lib" / "libiomp5.so"
    return ":".join(filter(None, (find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else "")))


class Vllm(OverHttp):
    """A `Subject`. All cores compute: by default it would leave one to its front end."""

    def __init__(
        self,
        folder: Path,
        dtype: str,
        encode: Callable[[str], Sequence[int]],
        *,
        streams: int,
        context: int,
        port: int,
        log_file: Path,
    ) -> None:
        self._folder, self._encode = folder, encode
        command = [
            *(str(ENVIRONMENT / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--dtype", dtype, "--host", HOST, "--port", str(port)),
            *("--max-model-len", str(context), "--max-num-seqs", str(streams)),
            *("--uvicorn-log-level", "warning", "--disable-log-stats"),
        ]
        env = OFFLINE | {
            "LD_PRELOAD": _preload(),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores() - 1}",
            "VLLM_NO_USAGE_STATS": "1",
        }
        super().__init__("vllm", command, env, port=port, log_file=log_file, label="vllm")

    async def start(self) -> None:
        if not (ENVIRONMENT / ".installed").exists():
            raise CannotMeasure(f"{ENVIRONMENT} is missing: `make bench-engine VLLM=1` makes it")
        await super().start()

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {
            "model": str(self._folder),
            "prompt": list(self._encode(prompt)),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    async def stream(self, body: Mapping[str, Any], due_s: float) -> Stream:
        first_s = last_s = 0.0
        token_ids: list[int] = []
        text: list[str] = []
        async with aclosing(self.events("/v1/completions", body)) as found:
            async for event in found:
                for choice in event["choices"]:
                    last_s = time.perf_counter() - due_s
                    first_s = first_s or last_s
                    token_ids += choice.get("token_ids") or ()
                    text.append(choice["text"])
        return Stream(first_s, last_s, len(token_ids), tuple(token_ids), "".join(text))
