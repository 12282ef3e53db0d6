"""The C library as Python calls it: `native.h` by ctypes, which lets go of the GIL during each call."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import ClassVar

from services.inference.engine.native.build import NativeUnavailable, Progress, build

INTERFACE = 2
"""NATIVE_INTERFACE of native.h."""


class Config(Structure):
    """struct native_config."""

    _fields_: ClassVar = [
        *[
            (name, c_int32)
            for name in (
                *("hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "layers", "ropes"),
                *("bf16", "gelu_tanh", "tied", "pages", "threads", "max_rows"),
            )
        ],
        *[
            (name, c_float)
            for name in (
                *("norm_eps", "embedding_scale", "query_scale", "attention_softcap", "logit_softcap"),
            )
        ],
    ]


class Batch(Structure):
    """struct native_batch."""

    _fields_: ClassVar = [
        *[(name, c_int32) for name in ("rows", "page_columns", "logit_rows", "logit_stride")],
        *[
            (name, c_void_p)
            for name in ("tokens", "positions", "sequences", "page_table", "wanted", "logits")
        ],
    ]


VECTORS = (
    "attention_norm",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "output_bias",
    "post_attention_norm",
    "ffn_norm",
    "post_ffn_norm",
    "final_norm",
)
LAYER_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
WEIGHTS = {name: number for number, name in enumerate((*VECTORS, *LAYER_MATRICES, "embedding", "head"))}
"""enum native_weight."""
FORMATS = {
    name: number for number, name in enumerate(("float32", "bfloat16", "Q8_0", "Q4_0", "Q4_1", "Q4_K"))
}
"""enum native_format."""


class Library:
    """The functions of native.h. Pointers are addresses; who passes them keeps the memory."""

    def __init__(self, path: Path) -> None:
        try:
            c = ctypes.CDLL(str(path))
            c.native_interface.restype = c_int32
            if c.native_interface() != INTERFACE:
                raise NativeUnavailable(f"{path} was built from other sources")
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"the native step cannot be loaded: {error}") from error
        c.native_page_bytes.argtypes = [POINTER(Config)]
        c.native_page_bytes.restype = c_size_t
        c.native_instruction_set.argtypes = [c_int32]
        c.native_instruction_set.restype = c_char_p
        c.native_row_bytes.argtypes = [c_int32, c_int32]
        c.native_row_bytes.restype = c_size_t
        c.native_model_new.argtypes = [POINTER(Config), c_char_p, c_void_p, c_void_p, c_void_p]
        c.native_model_new.restype = c_void_p
        c.native_model_set.argtypes = [c_void_p, c_int32, c_int32, c_void_p]
        c.native_model_set.restype = None
        c.native_model_set_rope.argtypes = [c_void_p, c_int32, c_void_p, c_void_p]
        c.native_model_set_rope.restype = None
        c.native_step.argtypes = [c_void_p, POINTER(Batch)]
        c.native_step.restype = None
        c.native_model_free.argtypes = [c_void_p]
        c.native_model_free.restype = None
        self.c = c

    def instruction_sets(self) -> tuple[str, ...]:
        """Those that this machine can run, best first."""
        found: list[str] = []
        while name := self.c.native_instruction_set(len(found)):
            found.append(name.decode())
        return tuple(found)


def load_native(cache_dir: Path, progress: Progress) -> Library:
    """The library, built into `cache_dir` if it is not there. Raises NativeUnavailable."""
    return Library(build(cache_dir, progress))
