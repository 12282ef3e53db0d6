"""Models for tests: the real one, converted once for all runs, and a tiny random one with its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from services.inference.models import open_packaged

ROOT = Path(__file__).parents[2]
TINY_MODEL_ID = "tiny"
TINY_CONTEXT_TOKENS = 4096
TINY_VOCAB_TOKENS = 49_100
"""Less than the tokenizer has: a prompt with a token above makes the model raise."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def real_model() -> Path:
    """SmolLM2-135M-Instruct as safetensors. The first run on a machine converts it, most of a minute."""
    models_dir = Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models")
    return open_packaged(models_dir, print).path


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


def prompt_that_raises(folder: Path) -> str:
    """A text whose tokens the tiny model has no embeddings for."""
    vocab = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    return next(token for token, index in vocab.items() if index >= TINY_VOCAB_TOKENS and token.isascii())
