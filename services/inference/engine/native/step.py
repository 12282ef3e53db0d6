"""`NativeStep`: the engine's `Step` by the native library."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.inference.engine.model.weights import Blocks, ModelShape, Rope
from services.inference.engine.native.build import NativeUnavailable
from services.inference.engine.native.library import (
    FORMATS,
    LAYER_MATRICES,
    VECTORS,
    WEIGHTS,
    Batch,
    Config,
    Library,
)
from services.inference.engine.native.parts import (
    WHOLE_MODEL,
    Weights,
    format_of,
    is_tied,
    kv_dtype,
    parts_of,
)
from services.inference.engine.step import PAGE_TOKENS, Logits, StepRow, check_row

KERNELS = "native-2"
"""Names the order of every sum and the roundings between; part of `numerics`."""
MAX_ROWS = 256
"""Tokens computed at once: enough to be bound by arithmetic, few enough for the caches."""


def page_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes that one page of PAGE_TOKENS tokens takes over all layers; `dtype` of keys and values."""
    return 2 * PAGE_TOKENS * shape.head_dim * shape.kv_heads * shape.layers * dtype.itemsize


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that the process may use: by affinity, and by the quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


class NativeStep:
    """A model, packed, with its pool of pages. `weights` can be dropped once this is made.

    Raises NativeUnavailable where the model's shapes or types are not supported, or memory is not to be had.
    """

    exact_replay = True

    def __init__(
        self,
        weights: Weights,
        library: Library,
        *,
        pages: int,
        threads: int = 0,
        instruction_set: str | None = None,
        max_rows: int = MAX_ROWS,
        keys_and_values: torch.dtype | None = None,
    ) -> None:
        """`threads` 0 takes all usable cores; `instruction_set` None the best (see `Library`).

        `keys_and_values` are float32 or bfloat16; None: what suits the weights (`kv_dtype`).
        """
        shape = weights.shape
        parts = list(parts_of(weights))
        formats = {(layer, name): format_of(part) for layer, name, part in parts if name not in VECTORS}
        usual = kv_dtype(weights)
        dtype = keys_and_values or usual
        self.vocab_tokens = shape.vocab_tokens
        self.context_tokens = shape.context_tokens
        self.pages = pages
        available = library.instruction_sets()
        chosen = instruction_set or available[0]
        if chosen not in available:
            raise NativeUnavailable(f"this machine cannot run {chosen}, only {', '.join(available)}")
        names = "+".join(sorted(set(formats.values())))
        if dtype is not usual:
            names += f"/kv-{str(dtype).removeprefix('torch.')}"
        self.numerics = f"{KERNELS}/{names}/{chosen}"
        self._c = library.c
        tied = is_tied(weights)
        config = Config(
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            ffn=shape.ffn,
            vocab=shape.vocab_tokens,
            context=shape.context_tokens,
            layers=shape.layers,
            ropes=len(weights.ropes),
            bf16=dtype is torch.bfloat16,
            gelu_tanh=shape.activation == "gelu_tanh",
            tied=tied,
            pages=pages,
            threads=threads or usable_cores(),
            max_rows=max_rows,
            norm_eps=shape.norm_eps,
            embedding_scale=shape.embedding_scale,
            query_scale=shape.query_scale,
            attention_softcap=shape.attention_softcap,
            logit_softcap=shape.logit_softcap,
        )
        if self._c.native_page_bytes(config) != page_bytes(shape, dtype):
            raise NativeUnavailable("the library counts a page's bytes otherwise")
        windows, ropes = _int32(shape.windows), _int32(shape.ropes)
        kinds = [formats[layer, name] for layer in range(shape.layers) for name in LAYER_MATRICES]
        head = formats[WHOLE_MODEL, "head"]
        kinds += [formats.get((WHOLE_MODEL, "embedding"), head), head]
        numbers = _int32([FORMATS[kind] for kind in kinds])
        self._model = self._c.native_model_new(
            config, chosen.encode(), windows.ctypes.data, ropes.ctypes.data, numbers.ctypes.data
        )
        if not self._model:
            raise NativeUnavailable("there is not enough memory for the weights and the pool, or no thread")
        self.close = weakref.finalize(self, self._c.native_model_free, self._model)
        """Frees weights, pool and threads; nothing may be called after it."""
        for layer, name, part in parts:
            self._set(layer, name, part)
        for index, rope in enumerate(weights.ropes):
            cosines, sines = _turns(rope, self.context_tokens)
            self._c.native_model_set_rope(self._model, index, cosines.ctypes.data, sines.ctypes.data)
        self._logit_stride = -(-shape.vocab_tokens // 16) * 16
        self._logits = np.empty((0, self._logit_stride), np.float32)

    def run(self, rows: Sequence[StepRow]) -> Logits:
        """See `Step`."""
        for row in rows:
            check_row(
                row, vocab_tokens=self.vocab_tokens, context_tokens=self.context_tokens, pages=self.pages
            )
        lengths = np.array([len(row.tokens) for row in rows], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        total = int(ends[-1]) if rows else 0
        tokens = np.fromiter((token for row in rows for token in row.tokens), np.int32, total)
        starts = np.array([row.position for row in rows], np.int32) - (ends - lengths)
        positions = np.arange(total, dtype=np.int32) + np.repeat(starts, lengths)
        sequences = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        counts = [-(-(row.position + len(row.tokens)) // PAGE_TOKENS) for row in rows]
        table = np.zeros((len(rows), max(counts, default=0)), np.int32)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            table[index, :count] = row.pages[:count]
        wanted = [np.arange(end - row.logits, end) for row, end in zip(rows, ends, strict=True)]
        wanted_rows = np.concatenate(wanted or [np.empty(0)]).astype(np.int32)
        logits = self._logits_for(len(wanted_rows))
        batch = Batch(
            rows=total,
            page_columns=table.shape[1],
            logit_rows=len(wanted_rows),
            logit_stride=self._logit_stride,
            tokens=tokens.ctypes.data,
            positions=positions.ctypes.data,
            sequences=sequences.ctypes.data,
            page_table=table.ctypes.data,
            wanted=wanted_rows.ctypes.data,
            logits=logits.ctypes.data,
        )
        if not self.close.alive:
            raise ValueError("the step is closed")
        self._c.native_step(self._model, ctypes.byref(batch))
        return logits[: len(wanted_rows), : self.vocab_tokens]

    def _logits_for(self, rows: int) -> Logits:
        if rows > len(self._logits):
            self._logits = np.empty((rows, self._logit_stride), np.float32)
        return self._logits

    def _set(self, layer: int, name: str, part: Tensor | Blocks) -> None:
        """Packs a copy of the weight."""
        if isinstance(part, Blocks):
            content = part.data.contiguous()
            if content.shape[1] != self._c.native_row_bytes(FORMATS[part.format], part.inputs):
                raise NativeUnavailable(f"the library counts the bytes of {part.format} otherwise")
        else:
            wanted = torch.float32 if name in VECTORS else part.dtype
            content = part.detach().to(wanted).contiguous()
        self._c.native_model_set(self._model, layer, WEIGHTS[name], content.data_ptr())


def _turns(rope: Rope, context_tokens: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, each float32 [context, head_dim / 2]; angles in float32, as the models have them."""
    frequencies = rope.inverse_frequencies.to(torch.float32).numpy()
    angles = (np.arange(context_tokens, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    cosines, sines = np.cos(angles) * rope.scale, np.sin(angles) * rope.scale
    return cosines.astype(np.float32), sines.astype(np.float32)


def _int32(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)
