"""An outage turns jobs into dead letters, which are replayed when it is over; and the guides, run."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import aiokafka
import httpx
import llmos_client as sdk
import pytest
from llmos_client import AsyncClient, AuditFilter, Job, JobState

from deploy.dev.broker import Broker
from deploy.dev.ports import PortReservations
from tests.framework.forks import Forks
from tests.framework.guides import PROGRAMS, ROOT, run
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

TIMEOUT_S = 120.0
REPLICAS = ("inference", "inference-1")
JOBS = 10


@pytest.fixture(scope="module")
async def mesh(
    tmp_path_factory: pytest.TempPathFactory,
    broker: Broker,
    reservations: PortReservations,
    forks: Forks | None,
) -> AsyncIterator[MeshHarness]:
    async with MeshHarness(
        tmp_path_factory.mktemp("mesh"), broker, reservations, replicas=REPLICAS, forks=forks
    ) as mesh:
        await mesh.start("auth", "logging", *REPLICAS, "gateway")
        async with connect(mesh) as client:
            await eventually(lambda: is_ready(client), timeout_s=TIMEOUT_S, what="the model is ready")
        yield mesh


def connect(mesh: MeshHarness) -> AsyncClient:
    return AsyncClient(mesh.target(), api_key_file=mesh.state.admin_key, model="echo")


async def is_ready(client: AsyncClient) -> bool:
    return any(model.ready for model in await client.models())


async def is_away(client: AsyncClient) -> bool:
    return not await is_ready(client)


def blocks(guide: str, language: str) -> list[str]:
    text = (ROOT / "docs" / guide).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


async def run_python(mesh: MeshHarness, block: str) -> str:
    """What the block prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        block.replace("smollm2-135m-instruct", "echo"),
        env={**os.environ, **mesh.plan.client_environment(), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_guide_for_callers_does_what_it_says(mesh: MeshHarness) -> None:
    said = await run(mesh, "\n".join(blocks("jobs.md", "sh")))
    assert "succeeded" in said
    assert "Why is the sky blue?" in said, "the echo of the result"
    python = [block for block in blocks("jobs.md", "python") if "Client(" in block]
    assert len(python) == 2
    first, second = [await run_python(mesh, block) for block in python]
    assert "succeeded" in first
    assert "Name three primes." in first
    assert "JobCounts(waiting=0, running=0, succeeded=2" in first
    assert "Name a colour." in second


async def test_a_repeat_of_many_finds_the_jobs_and_their_batch(mesh: MeshHarness) -> None:
    async with connect(mesh) as client:
        prompts = [f"the {number}th" for number in range(50)]
        first = await client.jobs.submit_many(prompts, idempotency_key="twice")
        second = await client.jobs.submit_many(prompts, idempotency_key="twice")
        assert len(set(first.job_ids)) == len(prompts)
        assert (first.batch_id, first.job_ids, first.refusals) == (
            second.batch_id,
            second.job_ids,
            second.refusals,
        )
        assert (await client.jobs.count(first.batch_id)).total == len(prompts)
        for job_id, prompt in zip(first.job_ids, prompts, strict=True):
            assert (await client.jobs.result(job_id, wait_s=TIMEOUT_S)).text == prompt


async def test_all_dead_letters_of_an_outage_are_replayed_once(mesh: MeshHarness) -> None:
    async with connect(mesh) as client:
        for replica in REPLICAS:
            mesh.kill(replica)
        await eventually(lambda: is_away(client), timeout_s=TIMEOUT_S, what="the replicas are away")
        many = await client.jobs.submit_many(
            # Slow enough that a watch comes in time to see them run.
            [f"the {number}th of them [[delay_ms=300]]" for number in range(JOBS)],
            max_attempts=2,
            labels={"outage": "yes"},
        )
        assert not many.refusals
        for job_id in many.job_ids:
            with pytest.raises(sdk.LlmosError) as given_up:
                await client.jobs.result(job_id, wait_s=TIMEOUT_S)
            assert given_up.value.job_id == job_id
            assert given_up.value.reason == "NO_REPLICA"
        letters = [letter async for letter in client.jobs.dead_letters.list()]
        assert {letter.job.id for letter in letters if letter.job} == set(many.job_ids)
        for letter in letters:
            assert letter.job is not None
            assert letter.error.reason == "NO_REPLICA"
            assert [attempt.number for attempt in letter.job.failed_attempts] == [1, 2]

        guide = await run(mesh, "\n".join(blocks("dead-letters.md", "sh")[1:3]))
        assert "NO_REPLICA" in guide
        assert guide.splitlines()[-1].split("\t")[-1].startswith("req_")

        await mesh.start(*REPLICAS)
        await eventually(lambda: is_ready(client), timeout_s=TIMEOUT_S, what="the model is ready again")

        # One by the guide, the others by what it says of all.
        await run(
            mesh, "\n".join(blocks("dead-letters.md", "sh")[1:2] + blocks("dead-letters.md", "sh")[3:4])
        )
        seen = await watched_while_replayed(client, many.batch_id, JOBS)
        assert JobState.RUNNING in seen, "live, not only the end"

        replayed = [job async for job in client.jobs.list(labels={"outage": "yes"})]
        assert Counter(job.state for job in replayed) == {JobState.SUCCEEDED: JOBS}
        assert not set(many.job_ids) & {job.id for job in replayed}
        assert [letter async for letter in client.jobs.dead_letters.list()] == []
        again = [one async for one in client.jobs.dead_letters.replay_all()]
        assert again == []
        assert [job async for job in client.jobs.list(labels={"outage": "yes"})] == replayed
        await one_success_each(client, replayed)


async def watched_while_replayed(client: AsyncClient, batch_id: str, jobs: int) -> set[JobState]:
    """Replays all that are left, and watches each from then to its end; the states that were seen."""

    async def watched(job_id: str) -> list[JobState]:
        async with client.jobs.watch(job_id, timeout_s=TIMEOUT_S) as updates:
            return [update.job.state async for update in updates]

    watches: list[asyncio.Task[list[JobState]]] = []
    async for one in client.jobs.dead_letters.replay_all(reason="NO_REPLICA", model_was="echo"):
        assert one.error is None
        assert one.job is not None
        watches.append(asyncio.create_task(watched(one.job.id)))
    seen = await asyncio.gather(*watches)
    assert [states[-1] for states in seen] == [JobState.SUCCEEDED] * (jobs - 1)
    counts = await client.jobs.count(batch_id)
    assert (counts.unfinished, counts.succeeded) == (0, jobs)
    return {state for states in seen for state in states}


async def one_success_each(client: AsyncClient, jobs: Iterable[Job]) -> None:
    """In the audit log too."""
    for job in jobs:
        assert job.attempts == 1

        async def recorded(request_id: str = job.last_request_id) -> bool:
            found = await client.audit.search(AuditFilter(request_id=request_id))
            return [(one.outcome, one.edge) for one in found] == [(sdk.Outcome.SUCCEEDED, "job")]

        await eventually(recorded, timeout_s=TIMEOUT_S, what=f"the success of {job.id} in the audit log")


async def test_the_guide_for_operators_does_what_it_says(
    mesh: MeshHarness, broker: Broker, tmp_path: Path
) -> None:
    async with connect(mesh) as client:
        await run(mesh, blocks("dead-letters.md", "sh")[0])
        await run(mesh, blocks("dead-letters.md", "sh")[4])
        await run(mesh, blocks("dead-letters.md", "sh")[5])

        job = await client.jobs.submit("never", model="old-model", max_attempts=1)
        with pytest.raises(sdk.NotFound):
            await client.jobs.result(job.id, wait_s=TIMEOUT_S)
        said = await run(mesh, in_this_mesh(mesh)(blocks("dead-letters.md", "sh")[6]))
        assert "1 replayed, 0 could not be" in said
        (new,) = re.findall(r"^job_\w+$", said, re.MULTILINE)
        assert (await client.jobs.result(new, wait_s=TIMEOUT_S)).text == "never"

        producer = aiokafka.AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
        await producer.start()
        await producer.send_and_wait(f"{mesh.plan.topic_prefix}.jobs.v1", b"\xffpoison")
        await producer.stop()

        async def buried() -> bool:
            return [one async for one in client.jobs.dead_letters.list(unreadable=True)] != []

        await eventually(buried, timeout_s=TIMEOUT_S, what="the poison event is a dead letter")
        said = await run(mesh, blocks("dead-letters.md", "sh")[7])
        assert "DATA_CORRUPT" in said
        (python,) = blocks("dead-letters.md", "python")
        for _ in range(3):  # the outbox may be a moment behind
            said = await run_python(mesh, in_this_mesh(mesh)(python))
            if "\\xffpoison" in said:
                break
        assert "\\xffpoison" in said
        assert job.id in said

        backup = in_this_mesh(mesh)(blocks("dead-letters.md", "sh")[8])
        await run(mesh, backup.replace("schedule-backup.db", str(tmp_path / "backup.db")))
        assert (tmp_path / "backup.db").stat().st_size > 0
    await the_alerts_name_metrics_that_are_there(mesh)


def in_this_mesh(mesh: MeshHarness) -> Callable[[str], str]:
    names = {
        "smollm2-135m-instruct": "echo",
        ".state/logging": str(mesh.state.of("logging")),
        "127.0.0.1:50092": mesh.plan.bootstrap,
        '"llmos.dead-letter.v1"': f'"{mesh.plan.topic_prefix}.dead-letter.v1"',
    }

    def replaced(block: str) -> str:
        for name, ours in names.items():
            block = block.replace(name, ours)
        return block

    return replaced


async def the_alerts_name_metrics_that_are_there(mesh: MeshHarness) -> None:
    (alerts,) = blocks("dead-letters.md", "promql")
    text = (ROOT / "docs/dead-letters.md").read_text()
    named = set(re.findall(r"\bllmos_\w+", alerts)) | set(re.findall(r"`(llmos_jobs\w+)`", text))
    async with httpx.AsyncClient() as http:
        shown = "".join([(await http.get(mesh.metrics_url(name))).text for name in ("gateway", "logging")])
    # A counter shows when it has first counted: no worker was lost here.
    missing = {name for name in named if not re.search(rf"^{name}[ {{]", shown, re.MULTILINE)}
    assert missing <= {"llmos_jobs_leases_lost_total"}
