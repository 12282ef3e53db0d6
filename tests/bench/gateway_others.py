"""The gateways of others that ours is measured beside, and the least that a gateway can be."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import httpx

from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST, PortReservations
from deploy.dev.processes import Process
from tests.bench.gateway_load import Target
from tests.bench.gateway_processes import START_TIMEOUT_S, Subject, Upstream, listening
from tests.bench.work import CannotMeasure

ENVIRONMENT = ROOT / ".tools" / "bench-gateway"
"""`make bench-gateway` makes it."""
MASTER_KEY = "sk-bench-gateway"  # of a proxy that lives for minutes on loopback


def versions() -> dict[str, str]:
    """Of what is installed there."""
    folders = [str(folder) for folder in ENVIRONMENT.glob("lib/python*/site-packages")]
    found = {each.name: each.version for each in importlib.metadata.distributions(path=folders)}
    return {name: found[name] for name in ("litellm", "granian", "smg") if name in found}


class Bare(Subject):
    """The proxy without any policy."""

    name = "bare"

    def __init__(self, upstream: Upstream, ports: PortReservations, folder: Path) -> None:
        port = ports.take(["bare"])["bare"]
        self._upstream, self._address = upstream, f"{HOST}:{port}"
        command = ["-m", "tests.bench.gateway_proxy", str(port), upstream.target.address]
        self.process = Process(
            "bare", [sys.executable, *command], env=os.environ, cwd=ROOT, log_file=folder / "bare.log"
        )

    async def start(self) -> None:
        self.process.start()
        await listening(self.process, self._address)

    async def target(self) -> Target:
        return Target("grpc", self._address)

    async def behind(self) -> Target:
        return self._upstream.target


class OfOthers(Subject):
    """A gateway of others over HTTP, from an environment of its own."""

    def __init__(
        self,
        upstream: Upstream,
        ports: PortReservations,
        folder: Path,
        command: Sequence[str],
        env: Mapping[str, str],
    ) -> None:
        """`PORT` in the command is replaced."""
        port = ports.take([self.name])[self.name]
        self._upstream, self._address = upstream, f"{HOST}:{port}"
        self._headers = (("authorization", f"Bearer {MASTER_KEY}"),)
        program, *arguments = (each.replace("PORT", str(port)) for each in command)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.process = Process(
            self.name,
            [str(ENVIRONMENT / "bin" / program), *arguments],
            env=kept | dict(env),
            cwd=folder,
            log_file=folder / f"{self.name}.log",
        )

    async def start(self) -> None:
        if not (ENVIRONMENT / ".installed").exists():
            raise CannotMeasure(f"{ENVIRONMENT} is missing: `make bench-gateway` makes it")
        self.process.start()
        body = {"model": "echo", "messages": [{"role": "user", "content": "a #00000000"}]}
        deadline_s = time.monotonic() + START_TIMEOUT_S
        async with httpx.AsyncClient(trust_env=False, headers=dict(self._headers)) as client:
            while time.monotonic() < deadline_s and self.process.running:
                with contextlib.suppress(httpx.HTTPError):
                    url = f"http://{self._address}/v1/chat/completions"
                    if (await client.post(url, json=body, timeout=10)).status_code == 200:
                        return
                await asyncio.sleep(0.25)
        raise CannotMeasure(f"{self.name} does not start. Its last lines:\n{self.process.tail(15)}")

    async def target(self) -> Target:
        return Target("http", self._address, self._headers)

    async def behind(self) -> Target:
        return replace(self._upstream.target, metadata=self._headers)


class LiteLlm(OfOthers):
    """LiteLLM's proxy: one worker of its fastest server, its key check on, no database, nothing logged."""

    name = "litellm"

    def __init__(self, upstream: Upstream, ports: PortReservations, folder: Path) -> None:
        config = folder / "litellm.yaml"
        model = {
            "model": "openai/echo",
            "api_base": f"http://{upstream.target.address}/v1",
            "api_key": "none",
        }
        config.write_text(  # JSON is YAML
            json.dumps(
                {
                    "model_list": [{"model_name": "echo", "litellm_params": model}],
                    "general_settings": {"master_key": MASTER_KEY},
                    "litellm_settings": {"set_verbose": False, "num_retries": 0, "request_timeout": 60},
                }
            )
        )
        command = ["litellm", "--config", str(config), "--host", HOST, "--port", "PORT", "--num_workers", "1"]
        command.append("--run_granian")  # less CPU for a request than uvicorn, its default
        env = {
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # nothing is fetched
            "LITELLM_TELEMETRY": "False",
            "DISABLE_ADMIN_UI": "True",
            "NO_DOCS": "True",
        }
        super().__init__(upstream, ports, folder, command, env)


class Smg(OfOthers):
    """The Rust router, with the policy that chooses least, without its disk log and retries."""

    name = "smg"

    def __init__(self, upstream: Upstream, ports: PortReservations, folder: Path) -> None:
        metrics = ports.take(["smg metrics"])["smg metrics"]
        command = [
            *("smg", "launch", "--host", HOST, "--port", "PORT", "--backend", "openai"),
            *("--worker-urls", f"http://{upstream.target.address}", "--policy", "round_robin"),
            *("--log-level", "error", "--prometheus-port", str(metrics), "--disable-retries"),
        ]
        super().__init__(upstream, ports, folder, command, {})
