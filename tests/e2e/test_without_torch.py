"""gateway, auth and logging run where torch and its like are not installed."""

from __future__ import annotations

from pathlib import Path

from deploy.dev.environment import ROOT
from deploy.dev.processes import Process
from tests.framework.calls import Caller
from tests.framework.mesh import MeshHarness

ABSENT = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "accelerate", "gguf")
HIDE = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


async def test_gateway_auth_and_logging_serve_without_torch(mesh: MeshHarness, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE)
    probe = Process(
        "probe",
        [mesh.plan.command("gateway")[0], "-c", "import torch"],
        env=mesh.plan.environment("gateway") | {"PYTHONPATH": str(hidden)},
        cwd=ROOT,
        log_file=tmp_path / "probe.log",
    )
    probe.start()
    assert await probe.wait_ended(30) == 1
    assert "No module named 'torch'" in probe.tail()

    mesh.spawn("inference")
    for name in ("auth", "logging", "gateway"):
        process = Process(
            name,
            mesh.plan.command(name),
            env=mesh.plan.environment(name) | {"PYTHONPATH": str(hidden)},
            cwd=ROOT,
            log_file=mesh.state.logs / f"{name}.log",
        )
        mesh.processes[name] = process
        process.start()
    for name in ("auth", "logging", "inference", "gateway"):
        await mesh.wait_ready(name)
    stream = await Caller(mesh).stream("nothing of torch")
    assert stream.finished, stream.error
    assert set(await Caller(mesh).outcomes({stream.request_id})) == {stream.request_id}
