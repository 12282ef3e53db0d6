"""The locks: everything by digest, no address of any index, and torch only where it belongs."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
GROUPS = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]


def pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", lock.read_text(), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_requirement_has_digests_and_no_address(lock: Path) -> None:
    text = lock.read_text()
    requirements = [entry for entry in re.split(r"\n(?=[a-z0-9])", text) if "==" in entry]
    assert requirements
    assert all("--hash=sha256:" in entry for entry in requirements)
    assert "://" not in text


def test_each_group_that_is_installed_has_a_lock_that_agrees_with_dev() -> None:
    for lock in LOCKS:
        assert lock.stem in GROUPS
    dev = pins(ROOT / "requirements" / "dev.txt")
    for name in ("run", "gateway", "auth", "inference", "logging", "client", "proto"):
        group = pins(ROOT / "requirements" / f"{name}.txt")
        assert group.items() <= dev.items(), name


@pytest.mark.parametrize("name", ["gateway", "auth", "logging", "client"])
def test_these_never_see_torch(name: str) -> None:
    group = pins(ROOT / "requirements" / f"{name}.txt")
    assert not {"torch", "transformers", "numpy"} & group.keys()


SERVED = {name: ["services/mesh", f"services/{name}"] for name in ("gateway", "auth", "inference", "logging")}
SERVED["client"] = ["clients/python"]
OURS = {"services", "llmos", "llmos_client", "buf"}


@pytest.mark.parametrize("name", SERVED)
def test_what_is_imported_is_in_the_lock(name: str) -> None:
    group = pins(ROOT / "requirements" / f"{name}.txt")
    files = [file for folder in SERVED[name] for file in (ROOT / folder).rglob("*.py")]
    modules = {module for file in files for module in imported(ast.parse(file.read_text()))}
    distributions = metadata.packages_distributions()
    for module in sorted(modules - OURS - sys.stdlib_module_names):
        # A module may come from any of several distributions, as google does.
        names = {found.lower().replace("_", "-") for found in distributions[module]}
        assert names & group.keys(), module


def imported(tree: ast.AST) -> Iterator[str]:
    """The outermost modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_the_brokers_jars_are_locked_by_digest() -> None:
    text = (ROOT / "deploy" / "dev" / "jgo.lock.toml").read_text()
    assert "://" not in text
    jars = tomllib.loads(text)["dependencies"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", jar["sha256"]) for jar in jars)
    wanted = tomllib.loads((ROOT / "deploy" / "dev" / "jgo.toml").read_text())["dependencies"]["coordinates"]
    locked = {f"{jar['groupId']}:{jar['artifactId']}:{jar['version']}" for jar in jars}
    assert set(wanted) <= locked
