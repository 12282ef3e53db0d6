"""Models for tests: the real one, converted once for all runs, and a tiny random one with its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from services.inference.models import open_packaged

ROOT = Path(__file__).parents[2]
TINY_MODEL_ID = "tiny"
TINY_CONTEXT_TOKENS = 4096
TINY_VOCAB_TOKENS = 49_100
"""Less than the tokenizer has: a prompt with a token above makes the model raise."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def real_model() -> Path:
    """SmolLM2-135M-Instruct in float32. The first run on a machine converts it, some ten seconds."""
    return open_packaged(_models_dir(), print, keep_blocks=False).path


def real_model_in_blocks() -> Path:
    """The same, in the quantised blocks of its file."""
    return open_packaged(_models_dir(), print).path


def _models_dir() -> Path:
    return Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models")


def make_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """A Llama of 2 layers with random weights in float32, quick enough to run hundreds of steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY_VOCAB_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        # Large enough that the logits differ: the smaller they are, the more random greedy decoding looks.
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer = real_model()
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    return folder


FAMILY_VOCAB_TOKENS = 512
FAMILY_CONTEXT_TOKENS = 512
FAMILY_WINDOW_TOKENS = 20
"""Shorter than most prompts of the tests."""
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": FAMILY_WINDOW_TOKENS}
FAMILY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": _LLAMA3_ROPE, "attention_bias": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": _LINEAR_ROPE}),
    "llama-yarn-rope": ("llama", {"rope_parameters": _YARN_ROPE}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "mistral": ("mistral", {"sliding_window": FAMILY_WINDOW_TOKENS}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {**_SLIDING, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma2": ("gemma2", {"sliding_window": FAMILY_WINDOW_TOKENS, "query_pre_attn_scalar": 24}),
    "gemma3_text": (
        "gemma3_text",
        {"sliding_window": FAMILY_WINDOW_TOKENS, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24},
    ),
}
"""Name -> (model_type, what its config says beside the sizes): each row of the engine's table, and each way
of a family to differ."""


def make_family_model(
    folder: Path, name: str, *, seed: int = 0, vocab_tokens: int = FAMILY_VOCAB_TOKENS, **settings: Any
) -> Path:
    """One of FAMILY_MODELS: 4 layers, random weights in float32, norms and biases too; no tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model_type, own = FAMILY_MODELS[name]
    sizes = {
        "vocab_size": vocab_tokens,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # Not hidden / heads.
        "head_dim": 16,
        "max_position_embeddings": FAMILY_CONTEXT_TOKENS,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type == "smollm3":
        # Which does not know of it.
        del sizes["head_dim"]
    config = AutoConfig.for_model(model_type, **{**sizes, **own, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += torch.randn_like(parameter) * 0.2
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


def prompt_that_raises(folder: Path) -> str:
    """A text whose tokens the tiny model has no embeddings for."""
    vocab = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    return next(token for token, index in vocab.items() if index >= TINY_VOCAB_TOKENS and token.isascii())
