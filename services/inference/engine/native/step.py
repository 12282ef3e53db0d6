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

from services.inference.engine.model.weights import ModelShape, ModelWeights, Rope
from services.inference.engine.native.build import NativeUnavailable
from services.inference.engine.native.library import VECTORS, WEIGHTS, Batch, Config, Library
from services.inference.engine.step import PAGE_TOKENS, Logits, StepRow, check_row

KERNELS = "native-1"
"""Names the order of every sum and the roundings between; part of `numerics`."""
MAX_ROWS = 256
"""Tokens computed at once: enough to be bound by arithmetic, few enough for the caches."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def page_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes that one page of PAGE_TOKENS tokens takes over all layers."""
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
        weights: ModelWeights,
        library: Library,
        *,
        pages: int,
        threads: int = 0,
        instruction_set: str | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """`threads` 0 takes all usable cores; `instruction_set` None the best (see `Library`)."""
        shape = weights.shape
        dtype = weights.head.dtype
        _check_model(weights)
        self.vocab_tokens = shape.vocab_tokens
        self.context_tokens = shape.context_tokens
        self.pages = pages
        available = library.instruction_sets()
        chosen = instruction_set or available[0]
        if chosen not in available:
            raise NativeUnavailable(f"this machine cannot run {chosen}, only {', '.join(available)}")
        self.numerics = f"{KERNELS}/{DTYPES[dtype]}/{chosen}"
        self._c = library.c
        tied = weights.head is weights.embedding or weights.head.data_ptr() == weights.embedding.data_ptr()
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
        self._model = self._c.native_model_new(
            config, chosen.encode(), windows.ctypes.data, ropes.ctypes.data
        )
        if not self._model:
            raise NativeUnavailable("there is not enough memory for the weights and the pool, or no thread")
        self.close = weakref.finalize(self, self._c.native_model_free, self._model)
        """Frees weights, pool and threads; nothing may be called after it."""
        self._fill(weights, tied)
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

    def _fill(self, weights: ModelWeights, tied: bool) -> None:
        for index, layer in enumerate(weights.layers):
            for name in WEIGHTS:
                tensor = getattr(layer, name, None)
                if tensor is not None:
                    self._set(index, name, tensor)
        self._set(-1, "final_norm", weights.final_norm)
        self._set(-1, "head", weights.head)
        if not tied:
            self._set(-1, "embedding", weights.embedding)
        for index, rope in enumerate(weights.ropes):
            cosines, sines = _turns(rope, self.context_tokens)
            self._c.native_model_set_rope(self._model, index, cosines.ctypes.data, sines.ctypes.data)

    def _set(self, layer: int, name: str, tensor: torch.Tensor) -> None:
        """Packs a copy of the tensor."""
        wanted = torch.float32 if name in VECTORS else tensor.dtype
        content = tensor.detach().to(wanted).contiguous()
        self._c.native_model_set(self._model, layer, WEIGHTS[name], content.data_ptr())


def _turns(rope: Rope, context_tokens: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines, each float32 [context, head_dim / 2]; angles in float32, as the models have them."""
    frequencies = rope.inverse_frequencies.to(torch.float32).numpy()
    angles = (np.arange(context_tokens, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    cosines, sines = np.cos(angles) * rope.scale, np.sin(angles) * rope.scale
    return cosines.astype(np.float32), sines.astype(np.float32)


def _int32(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def _check_model(weights: ModelWeights) -> None:
    """Raises NativeUnavailable where the kernels were not made for this model: they check nothing."""
    shape = weights.shape
    heads_dim, kv_dim = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.head_dim % 16 or shape.head_dim > 512:
        raise NativeUnavailable(
            f"the native step takes heads of 16 to 512 in steps of 16, not {shape.head_dim}"
        )
    if (
        shape.heads % shape.kv_heads
        or len(weights.layers) != shape.layers
        or len(shape.ropes) != shape.layers
    ):
        raise NativeUnavailable("the model's heads or layers do not fit each other")
    if any(rope >= len(weights.ropes) for rope in shape.ropes):
        raise NativeUnavailable("a layer names a rope that is not there")
    if any(rope.inverse_frequencies.shape != (shape.head_dim // 2,) for rope in weights.ropes):
        raise NativeUnavailable("the native step turns whole heads only")
    dtype = weights.head.dtype
    if dtype not in DTYPES:
        raise NativeUnavailable(f"the native step computes from float32 or bfloat16, not {dtype}")
    hidden = (shape.hidden,)
    required = {
        "qkv": (heads_dim + 2 * kv_dim, shape.hidden),
        "output": (shape.hidden, heads_dim),
        "gate_up": (2 * shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
        "attention_norm": hidden,
        "ffn_norm": hidden,
    }
    optional = {
        "qkv_bias": (heads_dim + 2 * kv_dim,),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
        "output_bias": hidden,
        "post_attention_norm": hidden,
        "post_ffn_norm": hidden,
    }
    for layer in weights.layers:
        for name, size in (required | optional).items():
            _check_tensor(name, getattr(layer, name), size, dtype, may_lack=name in optional)
    vocab = (shape.vocab_tokens, shape.hidden)
    _check_tensor("embedding", weights.embedding, vocab, dtype)
    _check_tensor("head", weights.head, vocab, dtype)
    _check_tensor("final_norm", weights.final_norm, hidden, dtype)


def _check_tensor(
    name: str,
    tensor: torch.Tensor | None,
    size: tuple[int, ...],
    dtype: torch.dtype,
    *,
    may_lack: bool = False,
) -> None:
    if tensor is None:
        if not may_lack:
            raise NativeUnavailable(f"{name} is missing")
        return
    if tuple(tensor.shape) != size:
        raise NativeUnavailable(f"{name} is {tuple(tensor.shape)}, not {size}")
    if name not in VECTORS and tensor.dtype != dtype:
        raise NativeUnavailable(f"{name} is {tensor.dtype}, others are {dtype}")
    if tensor.device.type != "cpu":
        raise NativeUnavailable(f"{name} is on {tensor.device}")
