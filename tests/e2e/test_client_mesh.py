"""The Python client and the command `llmos` against the whole mesh."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llmos_client as sdk
import pytest
from llmos_client import AsyncClient, AuditFilter, AuditRecord, Client, Outcome

from deploy.dev.broker import Broker
from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations
from tests.conftest import MeshFactory
from tests.framework.forks import Forks
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

TIMEOUT_S = 30.0
COMMAND = ("-m", "llmos_client.cli")


def options(mesh: MeshHarness) -> sdk.ClientOptions:
    given = sdk.ClientOptions(api_key_file=mesh.state.admin_key, model="echo")
    if certs := mesh.plan.certs:
        given["tls_ca_file"] = certs / "ca.crt"
        given["tls_cert_file"] = certs / "client.crt"
        given["tls_key_file"] = certs / "client.key"
    return given


@asynccontextmanager
async def connected(mesh: MeshHarness) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(mesh.target(), **options(mesh)) as client:
        yield client


@pytest.fixture(scope="module")
async def shared(
    tmp_path_factory: pytest.TempPathFactory,
    broker: Broker,
    reservations: PortReservations,
    forks: Forks | None,
) -> AsyncIterator[MeshHarness]:
    """One mesh for the tests that do it no harm."""
    async with MeshHarness(tmp_path_factory.mktemp("mesh"), broker, reservations, forks=forks) as mesh:
        await start(mesh)
        yield mesh


async def start(mesh: MeshHarness, *names: str) -> None:
    """Starts services, and waits until the gateway has found its replica."""
    await mesh.start(*names)
    async with connected(mesh) as client:
        await eventually(lambda: ready(client), timeout_s=TIMEOUT_S, what="the model is ready")


async def ready(client: AsyncClient) -> bool:
    return any(model.ready for model in await client.models())


async def outcome_of(client: AsyncClient, request_id: str) -> AuditRecord:
    async with (
        asyncio.timeout(TIMEOUT_S),
        client.audit.tail(AuditFilter(request_id=request_id), last=10) as tail,
    ):
        async for record in tail:
            if record.outcome is not None:
                return record
    raise AssertionError("the tail ended")


async def test_every_operation_and_the_audit_record_of_a_stream(shared: MeshHarness) -> None:
    async with connected(shared) as client:
        (model,) = await client.models()
        assert (model.id, model.ready) == ("echo", True)

        counted = await client.count_tokens("one two three")
        assert 0 < counted.prompt_tokens < counted.context_tokens

        completion = await client.generate("one two three")
        assert completion.text == "one two three"

        async with client.stream("one two three", labels={"team": "a"}) as stream:
            texts = [delta.text async for delta in stream]
        assert "".join(texts) == "one two three"
        assert stream.usage is not None
        assert stream.usage.prompt_tokens == counted.prompt_tokens
        assert stream.usage.completion_tokens > 0

        record = await outcome_of(client, stream.request_id)
        assert record.outcome is Outcome.SUCCEEDED
        assert record.usage == stream.usage
        assert record.trace_id == stream.trace_id
        assert record.model == "echo"
        assert record.method.endswith("/StreamGenerate")

        (found,) = await client.audit.search(AuditFilter(request_id=completion.request_id), limit=5)
        assert found.trace_id == completion.trace_id

    def in_a_thread() -> tuple[str, str]:
        with Client(shared.target(), **options(shared)) as client:
            with client.stream("four five") as stream:
                text = "".join(delta.text for delta in stream)
            return text, client.generate("six").text

    assert await asyncio.to_thread(in_a_thread) == ("four five", "six")


async def test_refusals_have_their_class(shared: MeshHarness) -> None:
    async with AsyncClient(shared.target(), model="echo") as anonymous:
        with pytest.raises(sdk.AuthenticationError) as missing:
            await anonymous.models()
        assert missing.value.reason == "CREDENTIAL_MISSING"
        assert missing.value.request_id
        assert missing.value.hint
    async with AsyncClient(shared.target(), model="echo", api_key="llmos_wrong") as stranger:
        with pytest.raises(sdk.AuthenticationError) as invalid:
            await stranger.generate("q")
        assert invalid.value.reason == "CREDENTIAL_INVALID"
    async with connected(shared) as client:
        with pytest.raises(sdk.NotFound) as unknown:
            await client.generate("q", model="no-such-model")
        assert unknown.value.reason == "MODEL_NOT_FOUND"
        with pytest.raises(sdk.InvalidRequest) as bad:
            await client.generate("q", temperature=9.0)
        assert [violation.field for violation in bad.value.violations] == ["spec.sampling.temperature"]
        with pytest.raises(sdk.NotImplementedByServer):
            await client.stream("q", resumable=True).result()


async def test_a_cancelled_stream_ends_as_cancelled(shared: MeshHarness) -> None:
    async with connected(shared) as client:
        async with client.stream("[[hang_after=1]] one two") as stream:
            async for _ in stream:
                break
        assert (await outcome_of(client, stream.request_id)).outcome is Outcome.CANCELLED


async def test_calls_and_a_tail_ride_out_the_loss_of_the_gateway(mesh: MeshHarness) -> None:
    await start(mesh)
    async with connected(mesh) as client, asyncio.timeout(2 * TIMEOUT_S):
        first = await client.generate("one")
        await outcome_of(client, first.request_id)
        positions: list[int] = []
        seen: set[str] = set()
        second = ""
        async with client.audit.tail(last=100) as tail:
            async for record in tail:
                positions.append(record.position)
                if record.outcome is not None:
                    seen.add(record.request_id)
                if first.request_id in seen and not second:
                    mesh.kill("gateway")
                    await mesh.restart("gateway")
                    second = (await client.generate("two")).request_id
                if second in seen:
                    break
        assert positions == sorted(set(positions)), "none twice, and in order"


async def test_over_mtls(make_mesh: MeshFactory, broker: Broker) -> None:
    mesh = make_mesh(broker, tls=True)
    await start(mesh, "auth", "inference", "gateway")
    async with connected(mesh) as client:
        assert (await client.generate("one two")).text == "one two"
    async with AsyncClient(
        mesh.target(), api_key_file=mesh.state.admin_key, model="echo", retry=sdk.RetryPolicy(max_attempts=1)
    ) as plain:
        with pytest.raises(sdk.Unavailable):
            await plain.generate("one")
    done = await llmos(mesh, "chat", "one two")
    assert (done.code, done.stdout) == (0, "one two\n")


async def test_the_examples_of_the_guide_run(shared: MeshHarness) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "client.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 4
    for block in blocks:
        program = block.replace("127.0.0.1:50050", shared.target()).replace("smollm2-135m-instruct", "echo")
        program = program.replace(".state/auth/admin-key", str(shared.state.admin_key))
        done = await finished(await begin(shared, "-c", program))
        assert (done.code, done.stderr) == (0, ""), block
        assert done.stdout


# ---- the command ------------------------------------------------------------------------------------


class Done:
    def __init__(self, code: int | None, stdout: bytes, stderr: bytes) -> None:
        self.code = code
        self.stdout = stdout.decode()
        self.stderr = stderr.decode()


async def begin(mesh: MeshHarness, *arguments: str, **changes: str) -> asyncio.subprocess.Process:
    own = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    given: dict[str, Any] = own | mesh.plan.client_environment() | changes
    return await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=given,
        cwd=Path("/"),
    )


async def finished(process: asyncio.subprocess.Process) -> Done:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return Done(process.returncode, stdout, stderr)


async def llmos(mesh: MeshHarness, *arguments: str, **changes: str) -> Done:
    return await finished(await begin(mesh, *COMMAND, *arguments, **changes))


async def test_the_command_from_a_question_to_its_audit_record(shared: MeshHarness) -> None:
    listed = await llmos(shared, "models")
    assert listed.stdout.splitlines()[1].startswith("echo\tyes\t"), listed.stderr

    answered = await llmos(shared, "chat", "one two three", "--stats")
    assert (answered.code, answered.stdout) == (0, "one two three\n"), answered.stderr
    facts = dict(line.split(maxsplit=1) for line in answered.stderr.splitlines())
    async with connected(shared) as client:
        await outcome_of(client, facts["request"])

    searched = await llmos(shared, "audit", "search", "--request-id", facts["request"], "--json")
    record = json.loads(searched.stdout)
    assert record["ended"]["outcome"] == "OUTCOME_SUCCEEDED"
    assert record["ended"]["facts"]["trace_id"] == facts["trace"]

    refused = await llmos(shared, "chat", "one", LLMOS_API_KEY_FILE="")
    assert (refused.code, refused.stdout) == (1, "")
    assert "CREDENTIAL_MISSING" in refused.stderr


async def test_ctrl_c_in_the_command_cancels_at_the_server(shared: MeshHarness) -> None:
    begun = datetime.now(UTC)
    process = await begin(shared, *COMMAND, "chat", "[[hang_after=1]] one two", "--model", "echo")
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        assert await process.stdout.readexactly(3) == b"one"
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 130
    wanted = AuditFilter(outcome=Outcome.CANCELLED, since=begun)
    async with (
        connected(shared) as client,
        asyncio.timeout(TIMEOUT_S),
        client.audit.tail(wanted, last=10) as tail,
    ):
        async for record in tail:
            assert record.method.endswith("/StreamGenerate")
            break
