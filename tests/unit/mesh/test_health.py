"""What the process says of itself."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2

from services.mesh.health import LIVENESS, Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def status(health: Health, name: str) -> Any:
    answer = await health.servicer.Check(health_pb2.HealthCheckRequest(service=name), None)
    return answer.status


async def test_a_process_that_waits_for_a_part_lives_and_is_not_ready() -> None:
    health = Health(parts=["auth"])
    await health.add_service("llmos.gateway.v1.GenerationService")
    await health.started()
    assert (await status(health, ""), await status(health, LIVENESS)) == (NOT_SERVING, SERVING)
    assert health.waiting_for == ["auth"]
    await health.set_part("auth", True)
    assert (await status(health, ""), await status(health, LIVENESS)) == (SERVING, SERVING)
    assert await status(health, "llmos.gateway.v1.GenerationService") == SERVING
    await health.set_part("auth", False)
    assert (await status(health, ""), await status(health, LIVENESS)) == (NOT_SERVING, SERVING)


async def test_nothing_makes_a_draining_process_ready_again() -> None:
    health = Health(parts=["auth"])
    await health.started()
    await health.drain()
    await health.set_part("auth", True)
    assert not health.ready
    assert await status(health, "") == NOT_SERVING
    assert health.waiting_for == ["draining"]
