"""Batches with the official `openai` packages, for Python and for Node, on real processes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch

from deploy.dev.broker import Broker
from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations
from tests.framework import guides
from tests.framework.batches import line
from tests.framework.mesh import MeshHarness
from tests.framework.node_packages import NodeUnavailable, installed
from tests.framework.waiting import eventually

NODE_FOLDER = Path(__file__).parent / "openai_clients"
ENDED_S = 60.0
TIMEOUT_S = 120.0
FINAL = ("completed", "failed", "expired", "cancelled")
INPUT = b"".join(
    (
        line("one", "[[tokens=3]] first"),
        line("two", "second", max_tokens=10**9),
        line("three", "[[fail]] third"),
        line("four", "fourth", model="no-such-model"),
        line("five", "[[tokens=3]] fifth", n=2),
    )
)
WRONG = line("one") + b"{\n" + line("one") + line("two", endpoint="/v1/completions")


@pytest.fixture(scope="module")
async def mesh(
    tmp_path_factory: pytest.TempPathFactory, broker: Broker, reservations: PortReservations
) -> AsyncIterator[MeshHarness]:
    async with MeshHarness(tmp_path_factory.mktemp("batches"), broker, reservations) as mesh:
        mesh.configure("logging", first_backoff_s=0.05, lease_grace_s=1)
        mesh.configure("gateway", job_lease_s=5)
        await mesh.start("auth", "inference", "logging", "gateway")
        yield mesh


@pytest.fixture
async def client(mesh: MeshHarness) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{mesh.http_url()}/v1", api_key=mesh.admin_key, max_retries=0, timeout=20
    ) as client:
        yield client


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Batch:
    """Polls, as its guide says."""

    async def over() -> Batch | None:
        batch = await client.batches.retrieve(batch_id)
        return batch if batch.status in FINAL else None

    batch: Batch | None = await eventually(over, timeout_s=ENDED_S, what="the batch has ended")
    assert batch is not None
    return batch


async def begun(client: openai.AsyncOpenAI, content: bytes, endpoint: Any = "/v1/chat/completions") -> Batch:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"from": "python"}
    )


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(each) for each in (await client.files.content(file_id)).text.splitlines()]


def judge(batch: dict[str, Any], output: list[dict[str, Any]], errors: list[dict[str, Any]]) -> None:
    """What must become of INPUT."""
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    times = [batch[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
    assert times == sorted(times)
    assert [each["custom_id"] for each in output] == ["one", "five"]
    assert [len(each["response"]["body"]["choices"]) for each in output] == [1, 2]
    assert all(each["response"]["body"]["object"] == "chat.completion" for each in output)
    assert [each["custom_id"] for each in errors] == ["two", "three", "four"]
    assert [each["response"]["status_code"] for each in errors] == [400, 500, 404]
    assert errors[0]["response"]["body"]["error"]["param"] == "max_tokens"
    assert errors[2]["response"]["body"]["error"]["code"] == "model_not_found"
    assert batch["usage"]["output_tokens"] > 0


def judge_wrong(batch: dict[str, Any]) -> None:
    """What must become of WRONG."""
    assert batch["status"] == "failed"
    told = [(error["line"], error["code"]) for error in batch["errors"]["data"]]
    assert told == [(2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_url")]
    assert not batch.get("output_file_id")


async def test_the_package_for_python(client: openai.AsyncOpenAI) -> None:
    made = await begun(client, INPUT)
    batch = await ended(client, made.id)
    output, errors = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)
    judge(batch.model_dump(), output, errors)
    assert made.id in [each.id async for each in client.batches.list(limit=2)]
    wrong = await begun(client, WRONG)
    judge_wrong((await ended(client, wrong.id)).model_dump())
    file = await client.files.retrieve(batch.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/responses"])
async def test_the_other_endpoints(client: openai.AsyncOpenAI, endpoint: str) -> None:
    batch = await ended(client, (await begun(client, line("a", "[[tokens=2]]", endpoint), endpoint)).id)
    (found,) = await lines_of(client, batch.output_file_id)
    assert found["response"]["body"]["object"] == {"/v1/completions": "text_completion"}.get(
        endpoint, "response"
    )


async def test_a_batch_that_is_cancelled_gives_what_is_done(
    mesh: MeshHarness, client: openai.AsyncOpenAI
) -> None:
    slow = b"".join(line(f"slow-{n}", "[[delay_ms=1000]] [[tokens=120]]", max_tokens=120) for n in range(200))
    made = await begun(client, line("quick", "[[tokens=1]]") + slow)

    async def some_done() -> bool:
        counts = (await client.batches.retrieve(made.id)).request_counts
        return counts is not None and counts.completed > 0

    await eventually(some_done, timeout_s=ENDED_S, what="a first answer")
    assert (await client.batches.cancel(made.id)).status in ("cancelling", "cancelled")
    batch = await ended(client, made.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    output, errors = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)
    assert "quick" in [each["custom_id"] for each in output]
    assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
    assert len(output) + len(errors) == 201


async def test_r38_a_gateway_that_is_killed_goes_on_with_the_batch(
    mesh: MeshHarness, client: openai.AsyncOpenAI
) -> None:
    texts = [f"number {n}" for n in range(40)]
    made = await begun(client, b"".join(line(text, f"[[delay_ms=20]] [[tokens=4]] {text}") for text in texts))
    mesh.kill("gateway")
    await mesh.start("gateway")
    batch = await ended(client, made.id)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    assert [each["custom_id"] for each in await lines_of(client, batch.output_file_id)] == texts


async def test_the_guide(mesh: MeshHarness) -> None:
    env = {
        "LLMOS_URL": mesh.http_url(),
        "LLMOS_API_KEY": mesh.admin_key,
        "LLMOS_MODEL": "echo",
    }
    first = "".join(f"export {name}={value}\n" for name, value in env.items())
    text = (ROOT / "docs" / "batches.md").read_text()
    (shell,) = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    said = await guides.run(mesh, first + shell)
    assert "completed" in said
    assert '"custom_id":"sea"' in said
    said = await guides.run(mesh, f"{first}python - <<'PROGRAM'\n{program}PROGRAM\n")
    assert '"custom_id":"sky"' in said


async def test_the_package_for_node(mesh: MeshHarness) -> None:
    try:
        folder = installed(NODE_FOLDER)
    except NodeUnavailable as error:
        pytest.skip(str(error))
    given = {"url": mesh.http_url(), "key": mesh.admin_key, "input": INPUT.decode(), "wrong": WRONG.decode()}
    done = await asyncio.to_thread(
        subprocess.run,
        ["node", "batches.mjs"],
        cwd=folder,
        env=dict(os.environ),
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout)
    judge(seen["batch"], seen["output"], seen["errors"])
    judge_wrong(seen["wrong"])
    assert (seen["listed"], seen["deleted"], seen["gone"]) == (True, True, "NotFoundError")
    assert seen["conflict"] == "ConflictError"
