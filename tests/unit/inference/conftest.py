"""Models for the tests of inference, made once for a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.inference.engine.tokenizer import PromptTokenizer
from tests.framework.models import FAMILY_MODELS, make_family_model, make_tiny_model, real_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct."""
    return real_model()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def family_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each family that the engine computes, by its name in FAMILY_MODELS."""
    root = tmp_path_factory.mktemp("family-models")
    return {name: make_family_model(root / name, name) for name in FAMILY_MODELS}


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> PromptTokenizer:
    """SmolLM2's tokenizer."""
    return PromptTokenizer.load(smollm2)
