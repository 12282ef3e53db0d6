"""The harness does to processes what it says, and each mesh is alone."""

from __future__ import annotations

import asyncio
import signal

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.dev.processes import TAIL_LINES
from deploy.dev.state import CannotStart
from tests.conftest import MeshFactory
from tests.framework.forks import SUPPORTED, Forks
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually


@pytest.fixture
def lone_mesh(make_mesh: MeshFactory) -> MeshHarness:
    """Without a broker: auth needs none."""
    return make_mesh(None)


async def serves(mesh: MeshHarness, name: str) -> bool:
    stub = health_pb2_grpc.HealthStub(mesh.channel(name))
    response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
    return response.status == health_pb2.HealthCheckResponse.SERVING


async def test_starts_kills_and_restarts_on_the_same_port(lone_mesh: MeshHarness) -> None:
    await lone_mesh.start("auth")
    assert await serves(lone_mesh, "auth")
    target, key, pid = lone_mesh.target("auth"), lone_mesh.admin_key, lone_mesh.processes["auth"].pid

    lone_mesh.kill("auth")
    assert lone_mesh.processes["auth"].exit_code == -signal.SIGKILL
    await lone_mesh.wait_not_serving("auth")

    await lone_mesh.restart("auth")
    assert await serves(lone_mesh, "auth")
    assert lone_mesh.target("auth") == target
    assert lone_mesh.admin_key == key
    assert lone_mesh.processes["auth"].pid != pid


async def test_stops_with_exit_code_0(lone_mesh: MeshHarness) -> None:
    await lone_mesh.start("auth")
    assert await lone_mesh.stop("auth") == 0


async def test_freezes_and_thaws(lone_mesh: MeshHarness) -> None:
    await lone_mesh.start("auth")
    channel = lone_mesh.channel("auth")
    stub = health_pb2_grpc.HealthStub(channel)
    await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    lone_mesh.freeze("auth")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    lone_mesh.thaw("auth")
    await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)


async def test_meshes_do_not_meet(make_mesh: MeshFactory) -> None:
    one, two = make_mesh(None), make_mesh(None)
    await asyncio.gather(one.start("auth"), two.start("auth"))
    assert one.target("auth") != two.target("auth")
    assert one.admin_key != two.admin_key
    assert one.plan.topic_prefix != two.plan.topic_prefix


async def test_says_why_a_process_does_not_start(lone_mesh: MeshHarness) -> None:
    lone_mesh.configure("auth", access_token_ttl_s="no number")
    with pytest.raises(CannotStart, match=r"exit code 2.*(?s:.*)ACCESS_TOKEN_TTL_S"):
        await lone_mesh.start("auth")


@pytest.mark.skipif(not SUPPORTED, reason="stacks are asked of forks, which need Linux")
async def test_writes_down_where_everybody_stands_when_one_is_not_ready(lone_mesh: MeshHarness) -> None:
    await lone_mesh.start("auth")
    lone_mesh.configure("gateway", auth_target="127.0.0.1:1")
    with pytest.raises(CannotStart, match="does not serve"):
        await lone_mesh.start("gateway", timeout_s=3)
    for name in ("auth", "gateway"):
        process = lone_mesh.processes[name]
        for stack in ("Current thread", "Stack for <Task"):
            await eventually(lambda p=process, s=stack: s in p.tail(TAIL_LINES), what=stack)
    assert await serves(lone_mesh, "auth"), "it goes on"


async def test_leaves_nothing_behind(make_mesh: MeshFactory) -> None:
    mesh = make_mesh(None)
    async with mesh:
        await mesh.start("auth")
        pid = mesh.processes["auth"].pid
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


@pytest.mark.skipif(not SUPPORTED, reason="services are forked on Linux only")
async def test_a_fork_ends_with_what_it_was_forked_from(make_mesh: MeshFactory) -> None:
    forks = Forks()
    mesh = make_mesh(None, forks=forks)
    await mesh.start("auth")
    forks.close()
    assert await mesh.processes["auth"].wait_ended(10) == -signal.SIGKILL
    await mesh.wait_not_serving("auth")
