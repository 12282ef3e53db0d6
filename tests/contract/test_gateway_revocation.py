"""Both edges end what runs with a revoked credential where the revocation asks for it, with one outcome."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from msgspec import structs

from services.gateway.generation import Delta, EngineStarted
from services.mesh.errors import CredentialRevoked
from services.mesh.events import Outcome
from services.mesh.policy import RevocationKind
from services.mesh.revocation import Revocation
from tests.contract.test_gateway_edges import HELLO, both, edge_of
from tests.framework.gateway_fakes import ALICE, Bench, FakeReplica, Gate, answer
from tests.framework.waiting import eventually

STARTED = EngineStarted("rev-1", 7, "replica-0")


def revoke(bench: Bench, kind: RevocationKind, subject_id: str, *, cut_streams: bool) -> None:
    now = bench.clock.now()
    revocation = Revocation(
        bench.revoked.version + 1, kind, subject_id, now, now + timedelta(minutes=5), cut_streams
    )
    bench.revoked.apply(False, revocation.version, [revocation])


@both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("kind_of", "subject_id"),
    [
        (RevocationKind.API_KEY, ALICE.key_id),
        (RevocationKind.CLIENT, ALICE.client_id),
        (RevocationKind.TENANT, ALICE.tenant_id),
    ],
)
async def test_r23_what_runs_is_cut_where_the_revocation_says_so(
    kind: str, stream: bool, kind_of: RevocationKind, subject_id: str, tmp_path: Path
) -> None:
    gate = Gate()
    replica = FakeReplica([STARTED, Delta(1, 0, "Hel", (1,)), gate])
    bench = Bench([replica])
    async with edge_of(kind, bench, tmp_path) as edge:
        call = asyncio.create_task(edge.generate(HELLO, stream=stream))
        await gate.reached.wait()
        revoke(bench, kind_of, subject_id, cut_streams=True)
        with pytest.raises(CredentialRevoked):
            await call
        await eventually(lambda: bench.audit.ended)
    (ended,) = bench.audit.ended
    assert ended.error_reason == "CREDENTIAL_REVOKED"
    assert ended.outcome in {Outcome.FAILED, Outcome.REJECTED}
    assert (replica.closed, len(bench.credentials)) == (1, 0)


@both
async def test_r23_what_runs_goes_on_where_the_revocation_cuts_nothing(kind: str, tmp_path: Path) -> None:
    gate = Gate()
    script = answer("Hel", "lo")
    bench = Bench([FakeReplica([*script[:2], gate, *script[2:]])])
    async with edge_of(kind, bench, tmp_path) as edge:
        call = asyncio.create_task(edge.generate(HELLO, stream=True))
        await gate.reached.wait()
        revoke(bench, RevocationKind.CLIENT, ALICE.client_id, cut_streams=False)
        gate.open.set()
        assert await call == "Hello"
    (ended,) = bench.audit.ended
    assert ended.outcome is Outcome.SUCCEEDED


@both
async def test_r23_others_are_not_cut(kind: str, tmp_path: Path) -> None:
    gate = Gate()
    script = answer("Hel", "lo")
    bench = Bench([FakeReplica([*script[:2], gate, *script[2:]])])
    async with edge_of(kind, bench, tmp_path) as edge:
        call = asyncio.create_task(edge.generate(HELLO, stream=True))
        await gate.reached.wait()
        revoke(bench, RevocationKind.CLIENT, "bob", cut_streams=True)
        revoke(bench, RevocationKind.TOKEN, "another", cut_streams=True)
        gate.open.set()
        assert await call == "Hello"


@both
async def test_r23_what_comes_after_the_revocation_is_refused(kind: str, tmp_path: Path) -> None:
    replica = FakeReplica()
    bench = Bench([replica])
    async with edge_of(kind, bench, tmp_path) as edge:
        revoke(bench, RevocationKind.CLIENT, ALICE.client_id, cut_streams=False)
        with pytest.raises(CredentialRevoked):
            await edge.generate(HELLO)
    assert replica.requests == []
    assert len(bench.credentials) == 0


async def test_r23_a_new_token_of_a_client_that_is_let_in_again_is_not_cut() -> None:
    bench = Bench([FakeReplica()])
    now_s = int(bench.clock.now().timestamp())
    revoke(bench, RevocationKind.CLIENT, ALICE.client_id, cut_streams=True)
    bench.revoked.check_identity(structs.replace(ALICE, issued_at_s=now_s + 1))
    with pytest.raises(CredentialRevoked):
        bench.revoked.check_identity(structs.replace(ALICE, issued_at_s=now_s - 1))
