"""Keeps the layout's rules, by reading the code: who may import whom, and where the world is touched."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("services", "clients/python", "deploy", "protos", "tests")
SERVICES = ("gateway", "auth", "inference", "logging")
MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc", "shared"}

WIRE = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "llmos", "protovalidate"}
"""gRPC and generated messages."""
WIRE_FILES = {"servicer.py", "http.py", "request.py", "clients.py", "app.py"}
HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "accelerate", "gguf"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"}
TIME = {
    "asyncio.sleep",
    "datetime.datetime.now",
    "datetime.datetime.today",
    "datetime.datetime.utcnow",
    "datetime.date.today",
    "time.monotonic",
    "time.monotonic_ns",
    "time.perf_counter",
    "time.perf_counter_ns",
    "time.sleep",
    "time.time",
    "time.time_ns",
}

ALLOWED: dict[tuple[str, str], str] = {
    ("services/mesh/clock.py", "time"): "the clock itself",
}
"""Exceptions: (file, rule) with the reason."""


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` of an expression that is one."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def package_of(path: PurePosixPath) -> list[str]:
    return list(path.parent.parts)


def imports(tree: ast.Module, path: PurePosixPath) -> Iterator[tuple[str, str]]:
    """(local name, what it stands for in full) for each import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name
                yield (alias.asname, full) if alias.asname else (full.split(".")[0], full.split(".")[0])
                if not alias.asname:
                    yield full, full
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package_of(path)
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield alias.asname or alias.name, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield "", argument.value


def uses(tree: ast.Module, names: dict[str, str]) -> Iterator[str]:
    """The full names that the code reads, by way of its imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = dotted(node)
            if name is not None:
                first, _, rest = name.partition(".")
                if first in names:
                    yield f"{names[first]}.{rest}" if rest else names[first]


def broken_rules(file: str, source: str) -> Iterator[tuple[str, str]]:
    """(rule, sentence) for everything that a file does against the rules."""
    path = PurePosixPath(file)
    lines = source.count("\n") + 1
    if lines > MAX_LINES + 1:
        yield "length", f"has {lines} lines; split it"
    if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES:
        yield "name", "has a name that says nothing"
    tree = ast.parse(source)
    bound = list(imports(tree, path))
    targets = {full for _, full in bound}
    roots = {full.split(".")[0] for full in targets}
    if roots & PICKLES:
        yield "pickle", "unpickling runs code; use protobuf or JSON"
    if path.parts[0] == "services":
        yield from broken_service_rules(path, tree, bound, targets, roots)
    if path.parts[0] == "clients" and roots & {"services", "deploy", "tests"}:
        yield "client", "the client knows the contract, not our code"


def broken_service_rules(
    path: PurePosixPath, tree: ast.Module, bound: list[tuple[str, str]], targets: set[str], roots: set[str]
) -> Iterator[tuple[str, str]]:
    own = path.parts[1]
    others = {full.split(".")[1] for full in targets if full.startswith("services.")} & set(SERVICES) - {own}
    if others:
        yield "service", f"imports the service {', '.join(sorted(others))}; talk to it over gRPC"
    if roots & {"deploy", "tests", "llmos_client"}:
        yield "service", "a service knows nothing of its deployment, tests and clients"
    if own != "mesh" and path.name not in WIRE_FILES and roots & WIRE:
        yield "wire", f"only {', '.join(sorted(WIRE_FILES))} know gRPC and generated messages"
    if own != "inference" and roots & HEAVY:
        yield "heavy", f"only inference imports {', '.join(sorted(roots & HEAVY))}"
    used = set(uses(tree, dict(bound))) | targets
    if path.name != "settings.py" and any(name.startswith(tuple(ENVIRONMENT)) for name in used):
        yield "environment", "only settings.py reads the environment"
    if used & TIME:
        yield "time", f"{', '.join(sorted(used & TIME))}: time comes from the injected clock"


def files() -> list[str]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = [path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts]
    return sorted(name for name in names if not name.startswith("protos/gen"))


def test_the_tree_keeps_the_rules() -> None:
    complaints, needed = [], set()
    for file in files():
        for rule, sentence in broken_rules(file, (ROOT / file).read_text()):
            if (file, rule) in ALLOWED:
                needed.add((file, rule))
            else:
                complaints.append(f"{file}: {sentence}")
    assert not complaints, "\n".join(complaints)
    assert needed == set(ALLOWED), "ALLOWED lists exceptions that nothing needs"


def test_services_is_a_package_and_the_generated_tree_is_not() -> None:
    assert (ROOT / "services/__init__.py").exists(), "without it services.logging could shadow logging"
    assert not (ROOT / "protos/__init__.py").exists()


@pytest.mark.parametrize(
    ("rule", "file", "source"),
    [
        ("service", "services/gateway/routing.py", "from services.inference.engine import step"),
        ("service", "services/gateway/routing.py", "from services import auth"),
        ("service", "services/gateway/routing.py", "import services.auth.credentials.keys as k"),
        ("service", "services/gateway/tasks/sentiment.py", "from ...auth import keys"),
        (
            "service",
            "services/gateway/routing.py",
            "import importlib\nimportlib.import_module('services.auth')",
        ),
        ("service", "services/mesh/server.py", "def f():\n    from services.gateway import admission"),
        ("service", "services/auth/app.py", "import llmos_client"),
        ("wire", "services/gateway/admission.py", "import grpc"),
        ("wire", "services/auth/policy.py", "import grpc.aio as g"),
        ("wire", "services/auth/policy.py", "from llmos.auth.v1 import token_service_pb2"),
        ("wire", "services/logging/store.py", "from google.protobuf.message import Message"),
        ("heavy", "services/gateway/app.py", "import torch.nn.functional as F"),
        ("heavy", "services/mesh/telemetry.py", "from numpy import array"),
        ("environment", "services/auth/keys.py", "import os\nx = os.environ['A']"),
        ("environment", "services/auth/keys.py", "from os import getenv"),
        ("environment", "services/auth/app.py", "import os as o\nx = o.getenv('A')"),
        ("time", "services/auth/keys.py", "import time\nx = time.time()"),
        ("time", "services/auth/keys.py", "from time import monotonic as m\nx = m()"),
        ("time", "services/auth/keys.py", "from datetime import UTC, datetime\nx = datetime.now(UTC)"),
        ("time", "services/auth/keys.py", "import datetime as d\nx = d.datetime.now(d.UTC)"),
        ("time", "services/gateway/app.py", "import asyncio\nasync def f():\n    await asyncio.sleep(1)"),
        ("time", "services/gateway/app.py", "import time\nf = dict(clock=time.monotonic)"),
        ("pickle", "services/inference/engine/child.py", "import pickle"),
        ("pickle", "tests/framework/x.py", "def f():\n    from pickle import loads"),
        ("client", "clients/python/llmos_client/channel.py", "from services.mesh import channel"),
        ("length", "services/auth/keys.py", "x = 1\n" * 401),
        ("name", "services/auth/utils.py", ""),
        ("name", "services/auth/common/keys.py", ""),
    ],
)
def test_the_check_sees_what_is_broken(rule: str, file: str, source: str) -> None:
    assert [found for found, _ in broken_rules(file, source)] == [rule]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("services/gateway/servicer.py", "import grpc\nfrom llmos.gateway.v1 import generation_pb2"),
        ("services/mesh/channel.py", "import grpc"),
        (
            "services/gateway/routing.py",
            "from services.mesh import errors\nfrom services.gateway import admission",
        ),
        ("services/gateway/tasks/sentiment.py", "from .. import routing"),
        ("services/inference/engine/step.py", "import torch"),
        ("services/auth/settings.py", "import os\nx = os.environ"),
        ("services/auth/keys.py", "import logging\nimport os\nx = os.path.join('a', 'b')"),
        ("services/auth/keys.py", "from datetime import UTC, datetime\nx = datetime.fromtimestamp(0, UTC)"),
        ("services/auth/keys.py", "def f(clock):\n    return clock.monotonic(), clock.now()"),
        ("services/auth/keys.py", "x = 1\n" * 400),
        ("deploy/dev/mesh.py", "import asyncio\nimport os\nx = os.environ, asyncio.sleep"),
    ],
)
def test_the_check_lets_pass_what_is_right(file: str, source: str) -> None:
    assert list(broken_rules(file, source)) == []
