"""Which implementation of the step runs a model here: the native one where it can, else torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from services.inference.engine.frames import Configure
from services.inference.engine.kv_cache import pages_for
from services.inference.engine.kv_memory import pool_pages
from services.inference.engine.model.weights import ModelShape
from services.inference.engine.step import Step
from services.inference.models import ModelUnusable, block_formats, read_config

logger = logging.getLogger(__name__)


def make_step(configure: Configure, folder: Path, progress: Callable[[str], None]) -> Step:
    """Loads the folder's weights and makes a step over them.

    Raises ModelUnusable where the model, or what the configuration insists on, cannot be had; OSError.
    """
    on_cuda = _device(configure.device) == "cuda"
    if configure.dtype == "stored" and (on_cuda or configure.kernels == "torch"):
        raise ModelUnusable("only the native step computes with stored blocks; ask for `bfloat16`")
    if on_cuda:
        return _cuda_step(configure, folder, progress)
    if configure.kernels != "torch":
        from services.inference.engine.native.build import NativeUnavailable

        try:
            return _native_step(configure, folder, progress)
        except NativeUnavailable as error:
            if configure.kernels == "native" or configure.dtype == "stored":
                raise ModelUnusable(str(error)) from error
            logger.warning("torch computes the steps, more slowly: %s", error)
    return _torch_step(configure, folder, progress)


def _native_step(configure: Configure, folder: Path, progress: Callable[[str], None]) -> Step:
    """Raises NativeUnavailable, ModelUnusable, OSError."""
    from services.inference.engine.model.loader import load_stored, load_weights
    from services.inference.engine.native.library import load_native
    from services.inference.engine.native.parts import Weights, kv_dtype
    from services.inference.engine.native.step import NativeStep, page_bytes

    library = load_native(Path(configure.models_dir) / "native", progress)
    dtype = configure.dtype
    if dtype == "auto":
        dtype = "stored" if block_formats(read_config(folder)) else "bfloat16"
    progress(f"loading weights as {dtype}, for the native step")
    weights: Weights = load_stored(folder) if dtype == "stored" else load_weights(folder, dtype)
    pages = _pages(configure, weights.shape, page_bytes(weights.shape, kv_dtype(weights)))
    chosen = None if configure.instruction_set == "auto" else configure.instruction_set
    return NativeStep(weights, library, pages=pages, threads=configure.threads, instruction_set=chosen)


def _torch_step(configure: Configure, folder: Path, progress: Callable[[str], None]) -> Step:
    """Raises ModelUnusable, OSError."""
    import torch

    from services.inference.engine.model.loader import load_weights
    from services.inference.engine.model.torch_step import TorchStep, page_bytes

    dtype = configure.dtype
    if dtype == "auto":
        # Elsewhere bfloat16 is emulated, many times slower.
        native = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        dtype = "bfloat16" if native else "float32"
    progress(f"loading weights as {dtype}, for torch")
    weights = load_weights(folder, dtype)
    pages = _pages(configure, weights.shape, page_bytes(weights.shape, weights.head.dtype))
    return TorchStep(weights, pages=pages)


def _cuda_step(configure: Configure, folder: Path, progress: Callable[[str], None]) -> Step:
    """Raises ModelUnusable, OSError."""
    from services.inference.engine.model.cuda_step import CudaStep
    from services.inference.engine.model.loader import load_weights
    from services.inference.engine.model.torch_step import page_bytes

    if configure.kernels == "native":
        raise ModelUnusable("the native step runs on a CPU; ask for device `cpu`")
    dtype = "bfloat16" if configure.dtype == "auto" else configure.dtype
    progress(f"loading weights as {dtype}, for CUDA")
    weights = load_weights(folder, dtype)
    wanted = configure.max_running * pages_for(weights.shape.context_tokens)
    if configure.kv_cache_bytes:
        wanted = min(wanted, configure.kv_cache_bytes // page_bytes(weights.shape, weights.head.dtype))
    try:
        return CudaStep.sized(
            weights,
            max_pages=max(1, wanted),
            max_step_tokens=configure.max_prefill_tokens + configure.max_running,
            max_rows=configure.max_running,
        )
    except RuntimeError as error:
        raise ModelUnusable(str(error)) from error


def _device(asked: str) -> str:
    """Raises ModelUnusable."""
    if asked == "cpu":
        return asked
    import torch

    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ModelUnusable("there is no CUDA device that torch can use")
    return "cuda" if there else "cpu"


def _pages(configure: Configure, shape: ModelShape, page_bytes: int) -> int:
    return pool_pages(
        page_bytes,
        max_running=configure.max_running,
        context_tokens=shape.context_tokens,
        max_bytes=configure.kv_cache_bytes,
    )
