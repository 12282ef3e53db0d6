"""`python -m services.inference.quantise`: what it writes can be loaded, and means what it should."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from services.inference.engine.model.blocks import dequantise, quantise
from services.inference.engine.model.loader import load_stored, load_weights
from services.inference.engine.model.weights import Blocks, LayerWeights, ModelWeights
from services.inference.engine.native.build import NativeUnavailable
from services.inference.models import block_formats, read_config
from services.inference.quantise import comparison
from services.inference.quantise.__main__ import main, until_stopped
from services.inference.quantise.folder import FORMATS
from services.inference.quantise.precision import Predictions, agreement, predict, windows
from tests.framework.models import FAMILY_MODELS, make_family_model
from tests.unit.inference.test_gguf_model import write_gguf

SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_family_model(tmp_path_factory.mktemp("quantise") / "llama", "llama", **SIZES)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "unrelated.txt").write_text("stays")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "target"
    # Nothing half-made is left, whatever happened.
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def matrices(layer: LayerWeights) -> dict[str, object]:
    return {name: getattr(layer, name) for name in ("qkv", "output", "gate_up", "down")}


def assert_same_vectors(one: ModelWeights, other: ModelWeights) -> None:
    assert torch.equal(one.final_norm, other.final_norm)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for field in fields(mine):
            value, expected = getattr(mine, field.name), getattr(theirs, field.name)
            if field.name not in matrices(mine):
                assert (value is None and expected is None) or torch.equal(value, expected), field.name


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_every_family_is_loaded_with_blocks_and_nearly_its_numbers(
    tmp_path: Path, target: Path, family: str
) -> None:
    source = make_family_model(tmp_path / "source", family, **SIZES)
    assert main([str(source), str(target), "--to", "Q8_0"]) == 0
    stored, ours, expected = (
        load_stored(target),
        load_weights(target, "float32"),
        load_weights(source, "float32"),
    )
    for parts, layer, wanted in zip(stored.layers, ours.layers, expected.layers, strict=True):
        for name, matrix in matrices(wanted).items():
            assert all(isinstance(part, Blocks) and part.format == "Q8_0" for part in getattr(parts, name))
            error = (getattr(layer, name) - matrix).pow(2).mean().sqrt() / matrix.pow(2).mean().sqrt()
            assert 0 < error < 0.01
    assert all(isinstance(part, Blocks) for part in (*stored.embedding, *stored.head))
    assert ours.shape == expected.shape
    assert_same_vectors(ours, expected)


@pytest.mark.parametrize("to", FORMATS)
def test_blocks_are_those_of_the_numbers(llama: Path, target: Path, to: str) -> None:
    target.mkdir()
    assert main([str(llama), str(target), "--to", to]) == 0
    made, source = load_file(target / "model.safetensors"), load_file(llama / "model.safetensors")
    formats = block_formats(read_config(target))
    assert made.keys() == source.keys()
    assert set(formats) == {name for name, values in source.items() if values.dim() == 2}
    for name, values in source.items():
        if name in formats:
            assert formats[name] == ("Q8_0" if "embed" in name else to)
            assert torch.equal(made[name], quantise(values, formats[name]).data), name
        else:
            assert torch.equal(made[name], values), name
    names = {file.name for file in target.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    config = read_config(target)
    del config["quantization_config"]
    assert config == read_config(llama)


def test_a_matrix_is_written_in_pieces_as_in_one(
    llama: Path, tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(llama), str(tmp_path / "whole"), "--to", "Q4_0"]) == 0
    monkeypatch.setattr("services.inference.quantise.folder._NUMBERS_AT_ONCE", 200)
    assert main([str(llama), str(target), "--to", "Q4_0"]) == 0
    assert [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "target")] == [
        (target / "model.safetensors").read_bytes()
    ] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_of_half_precision(llama: Path, tmp_path: Path, target: Path, dtype: torch.dtype) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(llama / "config.json", source)
    tensors = {name: values.to(dtype) for name, values in load_file(llama / "model.safetensors").items()}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, source / f"model-{number:05}-of-00002.safetensors")
    assert main([str(source), str(target), "--to", "Q4_1"]) == 0
    made, formats = load_file(target / "model.safetensors"), block_formats(read_config(target))
    for name, values in tensors.items():
        expected = quantise(values, formats[name]).data if name in formats else values
        assert made[name].dtype is expected.dtype
        assert torch.equal(made[name], expected), name


def test_rows_that_are_no_multiple_stay_and_are_told(
    tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_family_model(tmp_path / "source", "llama", hidden_size=64, intermediate_size=80)
    assert main([str(source), str(target), "--to", "Q8_0"]) == 0
    said = capsys.readouterr()
    assert "4 matrices are plain numbers" in said.out
    assert "down_proj" in said.out
    (down,) = load_stored(target).layers[0].down
    assert torch.equal(down, load_weights(source, "float32").layers[0].down)


def test_what_is_beside_the_language_model_stays(llama: Path, tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors")
    eye = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {eye: torch.ones(64, 64)}, source / "model.safetensors", {"format": "pt"})
    assert main([str(source), str(target), "--to", "Q8_0"]) == 0
    assert torch.equal(load_file(target / "model.safetensors")[eye], torch.ones(64, 64))
    assert eye not in block_formats(read_config(target))


def test_sizes_and_errors_are_reported(llama: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(llama), str(target), "--to", "Q4_0"]) == 0
    said = capsys.readouterr()
    cells = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if line}
    made, formats = load_file(target / "model.safetensors"), block_formats(read_config(target))
    blocks = [name for name in formats if formats[name] == "Q4_0"]
    assert cells["Q4_0"][0] == str(len(blocks))
    assert cells["Q4_0"][2] == f"{sum(made[name].nbytes for name in blocks):,}"
    source = load_file(llama / "model.safetensors")
    errors = []
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        off = dequantise(quantise(source[name], "Q4_0")) - source[name]
        errors.append(float(off.pow(2).mean().sqrt() / source[name].pow(2).mean().sqrt()))
    assert cells["up_proj"][0] == "4"
    np.testing.assert_allclose(float(cells["up_proj"][1]), 100 * np.mean(errors), atol=6e-4)
    np.testing.assert_allclose(float(cells["up_proj"][3]), 100 * max(errors), atol=6e-4)
    assert f"model.layers.{np.argmax(errors)}.mlp.up_proj.weight" in said.out
    assert "100 % checking" in said.err


def test_a_gguf_file_keeps_its_blocks_or_gets_others(tmp_path: Path, target: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    assert main([str(file), str(tmp_path / "kept")]) == 0
    assert set(block_formats(read_config(tmp_path / "kept")).values()) == {"Q8_0"}
    assert main([str(file), str(target), "--to", "Q4_1"]) == 0
    formats = block_formats(read_config(target))
    assert (formats.pop("model.embed_tokens.weight"), set(formats.values())) == ("Q8_0", {"Q4_1"})
    kept, made = load_weights(tmp_path / "kept", "float32"), load_stored(target)
    (down,) = made.layers[1].down
    assert torch.equal(down.data, quantise(kept.layers[1].down, "Q4_1").data)
    assert (target / "tokenizer.json").read_bytes() == (tmp_path / "kept/tokenizer.json").read_bytes()
    assert_same_vectors(load_weights(target, "float32"), kept)


@pytest.mark.parametrize("natively", [True, False])
def test_a_text_compares_source_and_result(
    tmp_path: Path,
    target: Path,
    natively: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise NativeUnavailable("there is no C compiler")

    if not natively:
        monkeypatch.setattr(comparison, "load_native", refused)
    # Blocks of a file are a model like any other.
    file = write_gguf(tmp_path / "model.gguf")
    text = tmp_path / "text.txt"
    text.write_text("ab a c ab b a" * 30)
    for more in ([], ["--to", "Q8_0"]):
        place = target if more else tmp_path / "kept"
        assert main([str(file), str(place), "--text", str(text), *more]) == 0
        said = capsys.readouterr()
        assert f"tokens of {text}" in said.out
        assert ("torch" in said.out) is not natively
        share = float(said.out.partition("is the same ")[2].split(" ")[0])
        assert share > 90


def test_bad_input_is_told_in_a_sentence(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {name: tmp_path / name for name in ("full", "empty", "bare", "other", "blocks", "gptq", "odd")}
    for folder in folders.values():
        folder.mkdir()
    (folders["full"] / "file").write_text("mine")
    (folders["bare"] / "config.json").write_text("{}")
    config = json.loads((llama / "config.json").read_bytes())
    for name, more in (("other", {"model_type": "mamba"}), ("gptq", {"quantization_config": {"bits": 4}})):
        (folders[name] / "config.json").write_text(json.dumps(config | more))
        (folders[name] / "model.safetensors").touch()
    (folders["odd"] / "config.json").write_text(json.dumps(config))
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][5, 5] = torch.nan
    save_file(tensors, folders["odd"] / "model.safetensors")
    folders["blocks"].rmdir()
    assert main([str(llama), str(folders["blocks"]), "--to", "Q8_0"]) == 0
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no such thing")
    for source, arguments, said in (
        (llama, ["full", "--to", "Q8_0"], "is there already"),
        (llama, ["new"], "--to Q8_0"),
        (llama, ["new", "--to", "keep"], "only a .gguf file"),
        (llama, ["new", "--to", "Q8_0", "--text", "nowhere"], "nowhere cannot be read"),
        (llama, ["new", "--to", "Q8_0", "--text", str(broken)], "no tokenizer.json"),
        (tmp_path / "nowhere", ["new", "--to", "Q8_0"], "no folder"),
        (folders["empty"], ["new", "--to", "Q8_0"], "no config.json"),
        (folders["bare"], ["new", "--to", "Q8_0"], "no *.safetensors"),
        (folders["other"], ["new", "--to", "Q8_0"], "mamba"),
        (folders["gptq"], ["new", "--to", "Q8_0"], "quantised already"),
        (folders["odd"], ["new", "--to", "Q8_0"], "layers.2.mlp.up_proj.weight holds what is not a number"),
        (folders["blocks"], ["new", "--to", "Q4_0"], "in blocks already (Q8_0)"),
        (tmp_path / "nowhere.gguf", ["new"], "no file"),
        (broken, ["new"], "no GGUF file"),
        (write_gguf(tmp_path / "other.gguf", extra="output"), ["new"], "output"),
    ):
        assert main([str(source), str(tmp_path / arguments[0]), *arguments[1:]]) == 2, said
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.err.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert (folders["full"] / "file").read_text() == "mine"
    with pytest.raises(SystemExit) as ended:
        main([str(llama), str(tmp_path / "new"), "--to", "Q3_K"])
    assert ended.value.code == 2


def test_a_signal_ends_it_whatever_a_library_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Callable[[int, object], None]] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)

    def run() -> int:
        try:
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        except KeyboardInterrupt:
            raise ValueError("not what it was") from None
        return 0

    assert until_stopped(run) == 143
    assert until_stopped(lambda: 7) == 7


class _Bigram:
    """A step that holds the token after the last one for the likeliest, by a margin of 2."""

    vocab_tokens = 8
    context_tokens = 512
    pages = 32
    numerics = "bigram"
    exact_replay = True

    def run(self, rows):
        (row,) = rows
        logits = np.zeros((len(row.tokens), 8), np.float32)
        for index, token in enumerate(row.tokens):
            logits[index, (token + 1) % 8] = 2
        return logits


def test_perplexity_and_agreement_are_what_they_say() -> None:
    tokens = [*range(8)] * 50
    pieces = windows(tokens, size=300, before=[7])
    assert [len(piece) for piece in pieces] == [300, 102]
    assert [token for piece in pieces for token in piece[1:]] == tokens
    assert windows([1], 4) == []
    found = predict(_Bigram(), [tokens, [0, 5, 6]])
    assert len(found.likeliest) == 401
    right = np.log(np.exp(2) / (np.exp(2) + 7))
    np.testing.assert_allclose(found.log_probabilities.sum(), 400 * right + (right - 2), rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, np.exp(-found.log_probabilities.mean()))
    other = Predictions(np.where(np.arange(401) < 100, 9, found.likeliest), found.log_probabilities)
    assert agreement(found, other) == 301 / 401
    with pytest.raises(ValueError, match="two tokens"):
        predict(_Bigram(), [[3]])
