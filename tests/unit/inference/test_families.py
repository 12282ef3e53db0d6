"""Models of the Llama family as tensors: what the table reads from a config, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.inference.engine.model.families import FAMILIES, complete_config, describe
from services.inference.engine.model.loader import load_weights
from services.inference.models import ModelUnusable
from tests.framework.models import FAMILY_MODELS, FAMILY_WINDOW_TOKENS

W = FAMILY_WINDOW_TOKENS
EXPECTED: dict[str, dict[str, Any]] = {
    "llama": {"windows": (0, 0, 0, 0), "ropes": (0, 0, 0, 0), "head_dim": 16, "query_scale": 0.25},
    "smollm3": {"ropes": (0, -1, 0, -1), "windows": (0, 0, 0, 0)},
    "mistral": {"windows": (W, W, W, W)},
    "qwen2": {"windows": (0, 0, 0, 0)},
    "qwen2-sliding": {"windows": (0, 0, W, W)},
    "qwen3": {"head_dim": 24},
    "gemma2": {
        "windows": (W, 0, W, 0),
        "activation": "gelu_tanh",
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "query_scale": 24**-0.5,
    },
    "gemma3_text": {"windows": (W, W, 0, W), "ropes": (1, 1, 0, 1), "logit_softcap": 0.0},
}


@pytest.fixture
def llama(family_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    for file in family_models["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_config(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | settings))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_is_read_from_its_config(family_models: dict[str, Path], name: str) -> None:
    shape = load_weights(family_models[name], "float32").shape
    assert {field: getattr(shape, field) for field in EXPECTED[name]} == EXPECTED[name]
    assert shape.family == FAMILY_MODELS[name][0]


def test_optional_parts_are_there_where_a_family_has_them(family_models: dict[str, Path]) -> None:
    models = {name: load_weights(folder, "float32") for name, folder in family_models.items()}

    def having(part: str) -> set[str]:
        return {name for name, model in models.items() if getattr(model.layers[0], part) is not None}

    gemmas = {"gemma2", "gemma3_text"}
    assert having("qkv_bias") == {"llama-llama3-rope", "qwen2", "qwen2-sliding"}
    assert having("output_bias") == {"llama-llama3-rope"}
    assert having("q_norm") == having("k_norm") == {"qwen3", "gemma3_text"}
    assert having("post_attention_norm") == having("post_ffn_norm") == gemmas
    tied = {name for name, model in models.items() if model.head is model.embedding}
    assert tied == {"llama", "smollm3", "qwen2", *gemmas}
    assert {name for name, model in models.items() if model.ropes[0].scale != 1} == {"llama-yarn-rope"}


def test_tensors_are_fused_in_order_and_notation_is_folded_in(family_models: dict[str, Path]) -> None:
    stored = load_file(family_models["gemma2"] / "model.safetensors")
    model = load_weights(family_models["gemma2"], "float32")
    layer = model.layers[1]
    prefix = "model.layers.1."
    parts = [stored[f"{prefix}self_attn.{each}_proj.weight"] for each in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(parts))
    assert torch.equal(
        layer.gate_up, torch.cat([stored[f"{prefix}mlp.{each}_proj.weight"] for each in ("gate", "up")])
    )
    assert torch.equal(layer.ffn_norm, stored[f"{prefix}pre_feedforward_layernorm.weight"] + 1)
    assert model.shape.embedding_scale == pytest.approx(48**0.5)


def test_matrices_get_the_dtype_and_norms_stay_float32(family_models: dict[str, Path]) -> None:
    model = load_weights(family_models["gemma2"], "bfloat16")
    assert model.embedding.dtype == model.layers[0].down.dtype == torch.bfloat16
    assert model.layers[0].attention_norm.dtype == model.ropes[0].inverse_frequencies.dtype == torch.float32
    assert model.shape.embedding_scale == 6.9375, "rounded to bfloat16, as the model was trained"


def test_weights_in_several_files_are_one_model(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    whole = load_weights(llama, "float32")
    (llama / "model.safetensors").unlink()
    names = sorted(stored)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({name: stored[name] for name in part}, llama / f"model-{index}.safetensors")
    assert torch.equal(load_weights(llama, "float32").layers[3].qkv, whole.layers[3].qkv)


def test_a_language_model_inside_a_larger_one_is_found(
    family_models: dict[str, Path], tmp_path: Path
) -> None:
    stored = load_file(family_models["gemma3_text"] / "model.safetensors")
    inner = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    save_file(inner | {"vision_tower.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    text = json.loads((family_models["gemma3_text"] / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    model = load_weights(tmp_path, "float32")
    alone = load_weights(family_models["gemma3_text"], "float32")
    assert model.shape.windows == alone.shape.windows
    assert torch.equal(model.layers[3].down, alone.layers[3].down)


def test_a_model_outside_the_table_is_refused_and_the_served_ones_named(llama: Path) -> None:
    change_config(llama, model_type="gpt_neox")
    with pytest.raises(ModelUnusable, match="gpt_neox") as caught:
        load_weights(llama, "float32")
    assert all(family in str(caught.value) for family in FAMILIES)


def test_code_that_a_folder_brings_is_not_run(llama: Path) -> None:
    (llama / "evil.py").write_text("raise SystemExit('run')")
    change_config(llama, auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    with pytest.raises(ModelUnusable):
        load_weights(llama, "float32")
    change_config(llama, model_type="llama")
    load_weights(llama, "float32")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "8 of 16",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"hidden_size": 64}, r"\(512, 48\)"),
        ({"num_hidden_layers": 5}, "layers.4"),
        ({"tie_word_embeddings": False}, "lm_head"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
    ],
)
def test_what_the_step_does_not_compute_is_refused(llama: Path, settings: dict[str, Any], said: str) -> None:
    change_config(llama, **settings)
    with pytest.raises(ModelUnusable, match=said):
        load_weights(llama, "float32")


def test_a_damaged_file_and_a_folder_without_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(ModelUnusable):
        load_weights(llama, "float32")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelUnusable, match="neither"):
        load_weights(llama, "float32")


def test_a_gguf_file_is_read(family_models: dict[str, Path], tmp_path: Path) -> None:
    stored = load_file(family_models["llama"] / "model.safetensors")
    write_gguf(tmp_path / "model.gguf", stored)
    model = load_weights(tmp_path, "float32")
    original = load_weights(family_models["llama"], "float32")
    assert replace(model.shape, norm_eps=1e-6) == original.shape
    assert model.shape.norm_eps == pytest.approx(1e-6)
    for layer, other in zip(model.layers, original.layers, strict=True):
        assert torch.equal(layer.qkv, other.qkv)
        assert torch.equal(layer.down, other.down)
        assert torch.equal(layer.ffn_norm, other.ffn_norm)
    assert torch.equal(model.head, original.head)


def test_a_gguf_file_that_lacks_tensors_is_not_filled_with_random_ones(
    family_models: dict[str, Path], tmp_path: Path
) -> None:
    stored = load_file(family_models["llama"] / "model.safetensors")
    del stored["model.layers.2.mlp.up_proj.weight"]
    write_gguf(tmp_path / "model.gguf", stored)
    with pytest.raises(ModelUnusable, match=r"lacks 1 tensors.*layers\.2\.mlp\.up_proj"):
        load_weights(tmp_path, "float32")


def write_gguf(file: Path, stored: dict[str, torch.Tensor]) -> None:
    """The family's llama as GGUF has it, in float32."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(512)
    writer.add_context_length(512)
    writer.add_embedding_length(48)
    writer.add_block_count(4)
    writer.add_feed_forward_length(80)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(512)])
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, tensor in stored.items():
        values = tensor
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                # The file's way of turning: even and odd places instead of halves.
                values = tensor.view(heads, 2, 8, 48).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_complete_config_says_what_transformers_says(name: str, family_models: dict[str, Path]) -> None:
    """Also each of its numbers; scaled ropes are left to transformers."""
    from transformers import AutoConfig

    folder = family_models[name]
    own = complete_config(json.loads((folder / "config.json").read_bytes()))
    if name in {"llama-llama3-rope", "llama-linear-rope", "llama-yarn-rope"}:
        assert own is None
        return
    assert own is not None, "its import would cost every start seconds"
    theirs = describe(AutoConfig.from_pretrained(folder), torch.float32)
    ours = describe(own, torch.float32)
    assert ours.shape == theirs.shape
    for mine, reference in zip(ours.ropes, theirs.ropes, strict=True):
        assert torch.equal(mine.inverse_frequencies, reference.inverse_frequencies)
        assert mine.scale == reference.scale
    flags = ("family", "qkv_bias", "output_bias", "tied")
    assert [getattr(ours, flag) for flag in flags] == [getattr(theirs, flag) for flag in flags]


@pytest.mark.parametrize("missing", ["num_key_value_heads", "rope_parameters", "rms_norm_eps", "layer_types"])
def test_an_incomplete_config_is_left_to_transformers(missing: str, family_models: dict[str, Path]) -> None:
    content = json.loads((family_models["qwen2"] / "config.json").read_bytes())
    del content[missing]
    assert complete_config(content) is None
