"""A GGUF file becomes the model that transformers reads from it, and what is not known is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from services.inference.gguf_model import UnknownLayout, convert

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TOKENS = ["<|end|>", "<|start|>", "a", "b", "c", "Ġ", "ab", "Ġa"]


def write_gguf(file: Path, *, model: str = "gpt2", extra: str | None = None) -> Path:
    """A tiny random Llama with quantised matrices."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model(model)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    chance = np.random.default_rng(1)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (kv, HIDDEN),
            f"blk.{layer}.attn_v": (kv, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FFN),
        }
    if extra:
        shapes[extra] = (HIDDEN,)
    for name, shape in shapes.items():
        values = chance.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_folder_holds_what_transformers_reads_from_the_file(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = write_gguf(tmp_path / "model.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    said: list[int] = []
    convert(file, folder, {"temperature": 0.5}, lambda percent, text: said.append(percent), keep_blocks=False)
    assert said == sorted(said)

    ours = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, values in ours.state_dict().items():
        assert torch.equal(values, expected[name]), name
    for name in ("rms_norm_eps", "rope_parameters", "head_dim", "max_position_embeddings", "eos_token_id"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    assert ours.generation_config.temperature == 0.5

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert [TOKENS[index] for index in tokenizer.encode("<|start|>ab a")] == ["<|start|>", "ab", "Ġa"]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "c"}], tokenize=False) == "c"
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert merges == [["a", "b"], ["Ġ", "a"]]


def test_blocks_are_kept_and_mean_the_same(tmp_path: Path) -> None:
    import torch

    from services.inference.engine.model.loader import load_stored, load_weights
    from services.inference.engine.model.weights import Blocks

    file = write_gguf(tmp_path / "model.gguf")
    folders = {keep: tmp_path / str(keep) for keep in (True, False)}
    for keep, folder in folders.items():
        folder.mkdir()
        convert(file, folder, {}, lambda percent, text: None, keep_blocks=keep)
    stored = load_stored(folders[True])
    assert all(isinstance(part, Blocks) and part.format == "Q8_0" for part in stored.layers[1].qkv)
    sizes = {keep: (folder / "model.safetensors").stat().st_size for keep, folder in folders.items()}
    assert sizes[True] < 0.4 * sizes[False]
    for dtype in ("float32", "bfloat16"):
        ours, expected = (load_weights(folders[keep], dtype) for keep in (True, False))
        for index, layer in enumerate(expected.layers):
            for name in ("qkv", "output", "gate_up", "down", "attention_norm", "ffn_norm"):
                assert torch.equal(getattr(ours.layers[index], name), getattr(layer, name)), name
        assert torch.equal(ours.embedding, expected.embedding)


@pytest.mark.parametrize(
    "file", [{"extra": "output"}, {"extra": "blk.0.attn_q_norm"}, {"model": "llama"}], ids=str
)
def test_what_is_not_known_is_refused(tmp_path: Path, file: dict[str, str]) -> None:
    with pytest.raises(UnknownLayout):
        convert(
            write_gguf(tmp_path / "model.gguf", **file),
            tmp_path,
            {},
            lambda percent, text: None,
            keep_blocks=True,
        )
