"""Our own gateways, as processes, and the mesh behind them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
from llmos.auth.v1 import policy_pb2, token_service_pb2, token_service_pb2_grpc
from llmos.gateway.v1 import policy_service_pb2

from deploy.dev import readiness
from deploy.dev.environment import ROOT
from deploy.dev.ports import HOST, PortReservations
from deploy.dev.processes import Process
from services.mesh.channel import IDENTITY_KEY, pack_identity
from services.mesh.context import Identity
from tests.bench.gateway_load import MODEL, PIECES, Target
from tests.bench.gateway_processes import START_TIMEOUT_S, Subject, Upstream
from tests.framework.identities import Account, Identities
from tests.framework.mesh import MeshHarness

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
        async with httpx.AsyncClient(trust_env=False, headers=headers) as client, asyncio.timeout(30):
            while True:
                answer = (await client.get(f"http://{self.http}/v1/models")).json()
                if {MODEL, PIECES} <= {each["id"] for each in answer["data"]}:
                    return
                await asyncio.sleep(0.1)


class Own(Subject):
    """One edge of a gateway of ours. It never rests: its ties to the broker and to auth want to live."""

    light_model = PIECES

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
