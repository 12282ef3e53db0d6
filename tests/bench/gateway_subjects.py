"""The gateways that are measured, each in processes of its own, and what stands behind and before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from llmos.auth.v1 import policy_pb2, token_service_pb2, token_service_pb2_grpc
from llmos.gateway.v1 import policy_service_pb2

from deploy.dev import readiness
from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST
from deploy.dev.processes import Process
from services.mesh.channel import IDENTITY_KEY, pack_identity
from services.mesh.context import Identity
from tests.bench.gateway_load import MODEL, PIECES, Job, Target
from tests.bench.subject import send
from tests.bench.work import CannotMeasure
from tests.framework.identities import Account, Identities
from tests.framework.mesh import MeshHarness
from tests.framework.ports import PortReservations

START_TIMEOUT_S = 120.0
TENANT = "bench"
LIMITS = policy_pb2.Plan(
    id="bench",
    limits=[
        policy_pb2.PlanLimit(
            unit=policy_service_pb2.LIMIT_UNIT_REQUESTS_PER_MINUTE,
            scope=policy_service_pb2.LIMIT_SCOPE_KEY,
            limit=10**12,
        ),
        policy_pb2.PlanLimit(
            unit=policy_service_pb2.LIMIT_UNIT_TOKENS_PER_MINUTE,
            scope=policy_service_pb2.LIMIT_SCOPE_TENANT,
            limit=10**12,
        ),
        policy_pb2.PlanLimit(
            unit=policy_service_pb2.LIMIT_UNIT_CONCURRENT_REQUESTS,
            scope=policy_service_pb2.LIMIT_SCOPE_CLIENT,
            limit=10**6,
        ),
        policy_pb2.PlanLimit(
            unit=policy_service_pb2.LIMIT_UNIT_BUDGET_TOKENS,
            scope=policy_service_pb2.LIMIT_SCOPE_TENANT,
            limit=10**15,
            period=policy_pb2.BUDGET_PERIOD_DAY,
        ),
    ],
)
"""Limits of each kind, which are counted and never reached."""
ENVIRONMENT = ROOT / ".tools" / "bench-gateway"
"""`make bench-gateway` makes it."""
MASTER_KEY = "sk-bench-gateway"  # of a proxy that lives for minutes on loopback


class Load:
    """The process that sends requests."""

    def __init__(self, log_file: Path) -> None:
        self._log_file = log_file
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.bench.gateway_load"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
            )

    async def run(self, job: Job) -> dict[str, Any]:
        """Raises CannotMeasure where a request fails."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(job.line())
        line = await self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._log_file.read_text()[-2000:]}
        if "error" in answer:
            raise CannotMeasure(f"{job.target.protocol} {job.target.address}: {answer['error']}")
        return answer

    async def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


class Subject:
    """A gateway that runs. Who derives from it says what is asked, and what stands behind it."""

    name: str
    process: Process
    streamed_model = MODEL

    async def start(self) -> None:
        """Returns when it answers. Raises CannotMeasure."""
        raise NotImplementedError

    async def target(self) -> Target:
        raise NotImplementedError

    async def behind(self) -> Target:
        """The upstream, asked directly."""
        raise NotImplementedError

    def processes(self) -> dict[str, psutil.Process]:
        if not self.process.running:
            return {}
        first = psutil.Process(self.process.pid)
        return {str(each.pid): each for each in (first, *first.children(recursive=True))}

    def rest(self) -> None:
        """Takes no CPU until `wake`."""
        send(self.processes(), signal.SIGSTOP)

    def wake(self) -> None:
        send(self.processes(), signal.SIGCONT)

    async def stop(self) -> None:
        self.wake()
        await self.process.stop(10)


class Upstream:
    """An echo behind the gateways of others."""

    def __init__(self, protocol: str, ports: PortReservations, folder: Path) -> None:
        port = ports.take([f"upstream {protocol}"])[f"upstream {protocol}"]
        self.target = Target(protocol, f"{HOST}:{port}")
        self._process = Process(
            f"upstream-{protocol}",
            [sys.executable, "-m", "tests.bench.gateway_upstream", protocol, str(port)],
            env=os.environ,
            cwd=ROOT,
            log_file=folder / f"upstream-{protocol}.log",
        )

    async def start(self) -> None:
        self._process.start()
        await listening(self._process, self.target.address)

    async def stop(self) -> None:
        self._process.end_group()


class Platform:
    """Auth, logging and inference with the echo backend, for our own gateways; and whom they are asked by."""

    def __init__(self, mesh: MeshHarness, ports: PortReservations, folder: Path) -> None:
        self.mesh = mesh
        self.ports = ports
        self.pieces = Upstream("grpc", ports, folder)
        self.key = ""
        self._identity = Identity(TENANT, "bench", scopes=frozenset({"generate"}))
        self._account = Account("", "", "")
        self._identities: Identities | None = None

    async def start(self) -> None:
        # As many at once as any job has streams: the queue of the echo is not what is measured.
        self.mesh.configure("inference", max_running=256, echo_directives="false")
        await self.mesh.start("auth", "logging", "inference", timeout_s=START_TIMEOUT_S)
        await self.pieces.start()
        self._identities = Identities(self.mesh)
        await self._identities.plan(LIMITS)
        await self._identities.tenant(TENANT, LIMITS.id)
        self._account = await self._identities.client(TENANT, "bench")
        _, self.key = await self._identities.api_key("bench")

    async def token(self) -> str:
        """An access token of the same client."""
        assert self._identities is not None
        return await self._identities.token(self._account)

    async def inference(self) -> Target:
        """Inference itself, with what the gateway sends along."""
        secret = (self.mesh.state.secrets / "gateway").read_text().strip()
        stub = token_service_pb2_grpc.TokenServiceStub(self.mesh.channel("auth"))
        request = token_service_pb2.IssueTokenRequest(
            client_id="service:gateway",
            client_secret=secret,
            audience=token_service_pb2.AUDIENCE_INFERENCE,
        )
        issued = await stub.IssueToken(request, timeout=10)
        return Target(
            "inference",
            self.mesh.target("inference"),
            (
                ("authorization", f"Bearer {issued.access_token.token}"),
                (IDENTITY_KEY, pack_identity(self._identity).hex()),
            ),
        )

    async def stop(self) -> None:
        await self.pieces.stop()
        await self.mesh.close()


class OwnProcess:
    """A gateway of ours: the service itself, or with some of its parts left out (`gateway_pieces`)."""

    def __init__(
        self, platform: Platform, name: str, *, without: Sequence[str] = (), profile: Path | None = None
    ) -> None:
        taken = platform.ports.take([f"{name}", f"{name} http"])
        self.grpc, self.http = (f"{HOST}:{taken[each]}" for each in (name, f"{name} http"))
        full = f"gateway-{name}"
        self._platform = platform
        settings = {
            "GRPC_PORT": taken[name],
            "HTTP_PORT": taken[f"{name} http"],
            "METRICS_PORT": 0,
            "INFERENCE_TARGETS": f"{platform.mesh.target('inference')},{platform.pieces.target.address}",
        }
        env = platform.mesh.plan.environment(full) | {
            f"LLMOS_GATEWAY_{key}": str(value) for key, value in settings.items()
        }
        command = [sys.executable, "-m", "services.gateway"]
        if without or profile:
            command[-1] = "tests.bench.gateway_pieces"
            env |= {"BENCH_WITHOUT": ",".join(without), "BENCH_PROFILE": str(profile or "")}
        self.process = Process(
            full, command, env=env, cwd=ROOT, log_file=platform.mesh.state.logs / f"{full}.log"
        )

    async def start(self) -> None:
        if self.process.running:
            return
        self.process.start()
        await readiness.wait_ready(self.process, self.grpc, None, START_TIMEOUT_S)
        await self._both_models()

    async def _both_models(self) -> None:
        """Returns when it knows both replicas."""
        headers = {"authorization": f"Bearer {self._platform.key}"}
        async with httpx.AsyncClient(trust_env=False, headers=headers) as client, asyncio.timeout(10):
            while True:
                answer = (await client.get(f"http://{self.http}/v1/models")).json()
                if {MODEL, PIECES} <= {each["id"] for each in answer["data"]}:
                    return
                await asyncio.sleep(0.1)


class Own(Subject):
    """One edge of a gateway of ours. It never rests: its ties to the broker and to auth want to live."""

    streamed_model = PIECES

    def __init__(self, name: str, platform: Platform, own: OwnProcess, protocol: str, *, token: bool) -> None:
        """`token`: an access token is sent, and no API key. Two subjects may share one process."""
        self.name = name
        self.process = own.process
        self.own = own
        self._platform, self._protocol, self._token = platform, protocol, token

    async def start(self) -> None:
        await self.own.start()

    async def target(self) -> Target:
        credential = await self._platform.token() if self._token else self._platform.key
        address = self.own.http if self._protocol == "http" else self.own.grpc
        return Target(self._protocol, address, (("authorization", f"Bearer {credential}"),))

    async def behind(self) -> Target:
        return await self._platform.inference()

    def rest(self) -> None:
        """See the class."""

    def wake(self) -> None:
        """See the class."""


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
    """LiteLLM's proxy: one worker, its key check on, no database, nothing logged, as its guide to production
    has it."""

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


async def listening(process: Process, address: str) -> None:
    """Returns when somebody accepts connections there. Raises CannotMeasure."""
    host, _, port = address.rpartition(":")
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.running:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            return
        await asyncio.sleep(0.05)
    raise CannotMeasure(f"{process.name} does not start. Its last lines:\n{process.tail(15)}")
