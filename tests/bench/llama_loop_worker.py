"""llama.cpp's library in a process of its own: a batch of sequences, decoded together, greedy.

Arguments: GGUF file, tokens of one sequence, threads, and the numbers of sequences to be ready for. JSON
lines in, `{"prompts": [[id, …], …], "max_tokens": …}`, JSON lines out; the first one tells what was chosen.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

FLASH = {"flash": 1, "no flash": 0}
"""Attention, as `llama_flash_attn_type` numbers it."""
TUNE_PROMPT, TUNE_TOKENS = 100, 16
TUNE_MOST = 8
"""Sequences: beyond, what is fastest with fewer is taken, since trying takes minutes."""


class Loop:
    """A context for at most so many sequences, each with a cache of its own, and batches for it."""

    def __init__(self, model: Any, sequences: int, context: int, threads: int, flash: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = sequences * context
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        params.kv_unified = False
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            sys.exit("llama.cpp makes no context")
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(sequences * context, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def answer(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        begun_s = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        count = 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(count, token, position, sequence, wanted=position == len(prompt) - 1)
                count += 1
        newest = self._decode(count, len(prompts))
        first_s = time.perf_counter() - begun_s
        found = [newest]
        for step in range(max_tokens - 1):
            for sequence, prompt in enumerate(prompts):
                self._put(sequence, newest[sequence], len(prompt) + step, sequence, wanted=True)
            newest = self._decode(len(prompts), len(prompts))
            found.append(newest)
        last_s = time.perf_counter() - begun_s
        return {
            "first_s": first_s,
            "last_s": last_s,
            "token_ids": [list(ids) for ids in zip(*found, strict=True)],
        }

    def _put(self, index: int, token: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch = self._batch
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = wanted

    def _decode(self, count: int, sequences: int) -> list[int]:
        """The most probable next token of each sequence."""
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            sys.exit(f"llama_decode says {status}")
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (sequences, self._words))
        best: list[int] = rows.argmax(axis=1).tolist()
        return best


def tuned(model: Any, sequences: int, context: int, threads: int) -> tuple[Loop, str, dict[str, float]]:
    """The loop that is fastest with so many sequences; which one; what each took, in seconds."""
    took_s: dict[str, float] = {}
    loops: dict[str, Loop] = {}
    prompts = [
        [1000 + 7 * sequence + 3 * index for index in range(TUNE_PROMPT)] for sequence in range(sequences)
    ]
    for name, flash in FLASH.items():
        loops[name] = loop = Loop(model, sequences, context, threads, flash)
        loop.answer(prompts, 2)
        took_s[name] = min(loop.answer(prompts, TUNE_TOKENS)["last_s"] for _ in range(2))
    best = min(took_s, key=took_s.__getitem__)
    for name, loop in loops.items():
        if name != best:
            loop.close()
    return loops[best], best, took_s


def main() -> None:
    file, (context, threads, *levels) = sys.argv[1], (int(number) for number in sys.argv[2:])
    # Whatever the library prints must not be taken for an answer.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp does not load {file}")
    loops: dict[int, Loop] = {}
    hello: dict[str, Any] = {"threads": threads}
    best = ""
    for level in sorted(levels):
        if best and level > TUNE_MOST:
            loops[level] = Loop(model, level, context, threads, FLASH[best])
            continue
        loops[level], best, took_s = tuned(model, level, context, threads)
        hello[str(level)] = {"chosen": best, "tuned_s": took_s}
    print(json.dumps(hello), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        fitting = min(level for level in loops if level >= len(request["prompts"]))
        print(
            json.dumps(loops[fitting].answer(request["prompts"], request["max_tokens"])), file=out, flush=True
        )


if __name__ == "__main__":
    main()
