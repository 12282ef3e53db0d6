"""What computes a step: as the settings say, and where it cannot be had, something else or an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from services.inference.engine.choosing import make_step
from services.inference.engine.native.step import NativeStep
from services.inference.engine.step import Step, StepRow
from services.inference.models import ModelUnusable
from tests.framework.engines import embedded_config
from tests.framework.models import ROOT, make_family_model
from tests.framework.native import native_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def choose(folder: Path, models_dir: Path = ROOT / ".state", **settings: object) -> Step:
    configure = embedded_config(folder, "model", models_dir=models_dir, **settings).configure()
    return make_step(configure, folder, print)


@pytest.mark.parametrize("instruction_set", ["auto", "portable", "avx2", "avx512"])
def test_an_instruction_set_can_be_forbidden(folder: Path, instruction_set: str) -> None:
    available = native_library().instruction_sets()
    if instruction_set not in ("auto", *available):
        with pytest.raises(ModelUnusable, match=f"cannot run {instruction_set}"):
            choose(folder, kernels="native", instruction_set=instruction_set)
        return
    step = choose(folder, instruction_set=instruction_set)
    assert isinstance(step, NativeStep)
    assert step.numerics.endswith(available[0] if instruction_set == "auto" else instruction_set)
    assert step.run([StepRow([1, 2], 0, [0], 1)]).shape == (1, step.vocab_tokens)


def test_without_a_compiler_torch_computes_and_it_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        step = choose(folder, tmp_path)
    assert not isinstance(step, NativeStep)
    (said,) = [record.getMessage() for record in caplog.records if "torch computes" in record.getMessage()]
    assert "no C compiler" in said
    with pytest.raises(ModelUnusable, match="no C compiler"):
        choose(folder, tmp_path, kernels="native")


def test_stored_weights_need_the_native_step(folder: Path, tmp_path: Path) -> None:
    assert isinstance(choose(folder, dtype="stored"), NativeStep)
    with pytest.raises(ModelUnusable, match="stored blocks"):
        choose(folder, dtype="stored", kernels="torch")
