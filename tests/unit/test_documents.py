"""README, CONTRIBUTING and the guides name only what is there: files, targets, modules, options, settings."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main
from llmos_client.cli.app import app as llmos

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "clients/examples").glob("*/README.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *EXAMPLES, *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SERVICES = ("gateway", "auth", "inference", "logging")
# What is made here, and so is not in the tree.
MADE = (".venv/", ".state", ".tools", "gen/", "bin/", "protos/gen", "dist")


def shell_lines(document: Path) -> list[str]:
    """The commands of the document's blocks, a continued one in one line."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in link:
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_targets_exist(document: Path) -> None:
    named = re.findall(r"(?:`|^|&& )make ([a-z][a-z0-9-]*)", document.read_text(), re.MULTILINE)
    assert set(named) <= TARGETS


def test_every_target_explains_itself() -> None:
    text = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z0-9-]+):.*## .+", text, re.MULTILINE))
    phony = {name for line in re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE) for name in line.split()}
    assert phony - explained == {"run-env", "dev-env"}


def service_settings(service: str) -> set[str]:
    module = importlib.import_module(f"services.{service}.settings")
    return set(getattr(module, f"{service.capitalize()}Settings").model_fields)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_are_there(document: Path) -> None:
    tops = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    named = re.findall(rf"(?<![\w/.-])((?:\./)?(?:{tops})/[\w./-]+)", document.read_text())
    for name in (name.replace("SERVICE", service) for name in named for service in SERVICES):
        if not any(made in name for made in MADE):
            assert (ROOT / name).exists() or (document.parent / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_that_are_run_are_there(document: Path) -> None:
    for name in re.findall(r"python -m ((?:services|deploy|protos|tests)[\w.]*)", document.read_text()):
        assert importlib.util.find_spec(name) is not None, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_the_client_have_these_options(document: Path) -> None:
    """Parses them, without doing what they say."""
    for line in shell_lines(document):
        command = re.search(r"(?:^|[ /])llmos (?=\w)([^|]*)$", line)
        if command is None:
            continue
        found: click.Command = typer.main.get_command(llmos)
        words = shlex.split(command[1])
        while isinstance(found, click.Group):
            context = click.Context(found)
            chosen = found.get_command(context, words.pop(0))
            assert chosen is not None, line
            found = chosen
        found.make_context("llmos", words, resilient_parsing=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_are_read_somewhere(document: Path) -> None:
    others = "".join(
        path.read_text()
        for folder in ("clients", "deploy/dev", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".go") and path != Path(__file__)
    )
    for name in set(re.findall(r"\bLLMOS_[A-Z0-9_]+[A-Z0-9]\b", document.read_text())):
        service, _, setting = name.removeprefix("LLMOS_").lower().partition("_")
        assert (service in SERVICES and setting in service_settings(service)) or name in others, name


@pytest.mark.parametrize("service", SERVICES)
def test_settings_of_a_guide_are_settings_of_its_service(service: str) -> None:
    """Those in the tables, which are written without their beginning."""
    guide = ROOT / "docs" / ("audit.md" if service == "logging" else f"{service}.md")
    known = service_settings(service) | (service_settings("gateway") if service == "logging" else set())
    cells = [line.split(" | ") for line in guide.read_text().splitlines() if line.startswith("| ")]
    reasons = set(
        re.findall(r"\bERROR_REASON_(\w+)", (ROOT / "protos/llmos/common/v1/error_reason.proto").read_text())
    )
    named = {
        name for row in cells for cell in row[:2] for name in re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", cell)
    }
    assert {name.lower() for name in named - reasons} <= known
