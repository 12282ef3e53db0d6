"""`llmos quantize` hands over to the inference service, where that is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from llmos_client.cli import app, quantize
from typer.testing import CliRunner

DEADLINE_S = 120.0
"""The service's libraries take seconds to import, more where other tests run beside."""


def test_arguments_and_exit_code_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        return 7

    monkeypatch.setattr(quantize, "_run", run)
    done = CliRunner().invoke(app, ["quantize", "model", "--to", "Q4_1", "target", "--text", "a text.md"])
    assert done.exit_code == 7
    rest = ["--to", "Q4_1", "--text", "a text.md", "--", "model", "target"]
    assert commands == [[sys.executable, "-P", "-m", "services.inference.quantise", *rest]]
    assert CliRunner().invoke(app, ["quantize", "model", "target", "--to", "Q6_K"]).exit_code == 2
    assert CliRunner().invoke(app, ["quantize", "model"]).exit_code == 2
    assert len(commands) == 1


@pytest.mark.parametrize("lacking", ["services", "torch", "gguf"])
def test_without_the_inference_service_a_sentence_says_so(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        return None if name == lacking else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    done = CliRunner().invoke(app, ["quantize", "model", "target"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: Quantising needs the inference service")
    assert "requirements/inference.txt" in done.stderr


def test_the_service_answers_from_any_folder(tmp_path: Path) -> None:
    """What lies there is not run, whatever it is called."""
    (tmp_path / "services").mkdir()
    (tmp_path / "services/__init__.py").write_text("raise SystemExit('hijacked')")
    llmos = Path(sys.executable).with_name("llmos")
    done = subprocess.run(
        [llmos, "quantize", "nowhere", "target", "--to", "Q8_0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no folder nowhere\n"


def test_the_command_itself_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'gguf', 'safetensors', 'transformers', 'services'}"
    code = f"import sys, llmos_client.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert done.stdout == "set()\n"
