"""Loads a model in the child process: weights, tokenizer, and what its files say of defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.inference.engine.choosing import make_step
from services.inference.engine.frames import Configure
from services.inference.engine.loop import LoadedModel
from services.inference.engine.port import Capability, ModelInfo
from services.inference.engine.sampler import SamplingDefaults
from services.inference.engine.step import PAGE_TOKENS, StepRow
from services.inference.engine.tokenizer import PromptTokenizer
from services.inference.models import ModelFolder, open_local, open_packaged

SAMPLER = "philox-2"
"""Names the definition of sampling; part of numerics_id."""


def load(configure: Configure, progress: Callable[[str], None]) -> LoadedModel:
    """Raises ModelUnusable, UnsupportedTokenizer, OSError, and what transformers raises on bad files."""
    progress("loading libraries")
    import torch

    if configure.threads:
        torch.set_num_threads(configure.threads)
    folder = _folder(configure, progress)
    progress(f"loading {folder.id}, revision {folder.revision}")
    tokenizer = PromptTokenizer.load(folder.path)
    step = make_step(configure, folder.path, progress)
    # Builds what is built on first use, and finds out a model that cannot run. Page 0 is nobody's yet.
    step.run([StepRow((0,), 0, (0,), 1)])
    capabilities = [Capability.GENERATE] + [Capability.CHAT] * tokenizer.has_chat_template
    info = ModelInfo(
        id=folder.id,
        revision=folder.revision,
        context_tokens=min(step.context_tokens, step.pages * PAGE_TOKENS),
        capabilities=tuple(capabilities),
        numerics_id=f"{folder.revision}/{step.numerics}/{SAMPLER}",
        exact_replay=step.exact_replay,
        ready=True,
    )
    generation = _json(folder.path / "generation_config.json")
    eos = _ids(generation.get("eos_token_id")) or _ids(_json(folder.path / "config.json").get("eos_token_id"))
    return LoadedModel(info, step, tokenizer, eos, _defaults(generation))


def _folder(configure: Configure, progress: Callable[[str], None]) -> ModelFolder:
    if configure.model_path is not None:
        return open_local(Path(configure.model_path), configure.model_id)
    return replace(open_packaged(Path(configure.models_dir), progress), id=configure.model_id)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_bytes())
    return content


def _ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _defaults(generation: dict[str, Any]) -> SamplingDefaults:
    """A model's own defaults, as `generation_config.json` has them; neutral where it says nothing."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return SamplingDefaults(**{name: generation[name] for name in names if generation.get(name) is not None})
