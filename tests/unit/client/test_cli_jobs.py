"""`llmos jobs` as a real process, against a server that answers by a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmos.gateway.v1 import job_service_pb2 as pb
from llmos_client.cli import app, job_files
from typer.testing import CliRunner

from tests.framework import scripted_gateway, scripted_jobs
from tests.framework.scripted_gateway import Fail, Hang, ScriptedGateway
from tests.framework.scripted_jobs import CANCELLED, FAILED, RUNNING, SUCCEEDED, WAITING
from tests.framework.terminals import Terminal
from tests.framework.warm_command import WarmCommand

COMMAND = [sys.executable, "-m", "llmos_client.cli", "jobs"]
DEADLINE_S = 20.0


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as server:
        yield server


@dataclass(frozen=True)
class Jobs:
    """Runs the command with files for its streams."""

    command: WarmCommand
    environment: dict[str, str]
    folder: Path

    def __call__(self, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        return self.command("jobs", *arguments, environment=self.environment, folder=self.folder, given=given)


@pytest.fixture(scope="module")
def command() -> Iterator[WarmCommand]:
    with WarmCommand() as started:
        yield started


@pytest.fixture
def jobs(gateway: ScriptedGateway, command: WarmCommand, tmp_path: Path) -> Jobs:
    own = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    told = {"LLMOS_TARGET": gateway.target, "LLMOS_MODEL": "echo", "TERM": "dumb", "COLUMNS": "200"}
    return Jobs(command, own | told, tmp_path)


def test_one_job_with_options_and_its_id_alone_on_stdout(gateway: ScriptedGateway, jobs: Jobs) -> None:
    (jobs.folder / "secret").write_text("whsec_abc\n")
    gateway.will(scripted_jobs.submitted("job_7"))
    done = jobs(
        *("submit", "why?", "--system", "be brief", "--max-tokens", "9", "--temperature", "0"),
        *("--not-before", "10m", "--max-attempts", "3", "--give-up-after", "2h", "--priority", "low"),
        *("--label", "team=a", "--webhook-url", "https://example.com", "--webhook-secret-file", "secret"),
        *("--idempotency-key", "mine", "--result-ttl", "7d"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "job_7\n", "")
    request = gateway.calls[0].request
    spec = request.work.generate
    assert (spec.max_tokens, spec.sampling.HasField("temperature")) == (9, True)
    assert (request.max_attempts, request.give_up_after.seconds) == (3, 7200)
    assert (request.priority, request.result_ttl.seconds) == (pb.JOB_PRIORITY_LOW, 7 * 86_400)
    assert (request.webhook.secret, request.idempotency_key) == ("whsec_abc", "mine")
    assert request.HasField("not_before_time")
    assert dict(request.labels) == {"team": "a"}


def test_a_piped_prompt_and_the_first_ready_model(gateway: ScriptedGateway, jobs: Jobs) -> None:
    del jobs.environment["LLMOS_MODEL"]
    gateway.will(scripted_gateway.models("first"))
    gateway.will(scripted_jobs.submitted())
    done = jobs("submit", "--json", given="why?")
    assert json.loads(done.stdout)["id"] == "job_1"
    assert gateway.calls[1].request.work.generate.model == "first"


def test_a_file_of_jobs_and_the_lines_that_were_refused(gateway: ScriptedGateway, jobs: Jobs) -> None:
    (jobs.folder / "prompts.jsonl").write_text(
        "plain text\n\n"
        '{"prompt": "a", "max_tokens": 3, "priority": "high", "idempotency_key": "own"}\n'
        '{"messages": [{"role": "user", "content": "b"}], "model": "small", "labels": {"x": "y"}}\n'
    )
    refusal = pb.SubmitJobsResponse.Refusal(index=1, error=scripted_jobs.error("REQUEST_INVALID", "Bad."))
    answer = pb.SubmitJobsResponse(batch_id="jobs_1", job_ids=["job_1", "job_3"], refusals=[refusal])
    gateway.will(answer)
    done = jobs("submit", "--file", "prompts.jsonl", "--max-tokens", "5", "--idempotency-key", "monday")
    assert (done.returncode, done.stdout) == (1, "job_1\njob_3\n")
    assert "line 3 was refused: Bad. (REQUEST_INVALID)" in done.stderr
    assert "2 jobs were taken, as batch jobs_1" in done.stderr
    sent = [one.job for one in gateway.calls[0].request]
    assert [job.idempotency_key for job in sent] == ["monday-0", "own", "monday-2"]
    assert [job.work.generate.max_tokens for job in sent] == [5, 3, 5]
    assert [job.work.generate.model for job in sent] == ["echo", "echo", "small"]

    gateway.will(answer)
    done = jobs("submit", "--file", "prompts.jsonl", "--json")
    told = json.loads(done.stdout)
    assert (told["batch_id"], told["refusals"][0]["line"]) == ("jobs_1", 3)


def test_bad_lines_are_named_and_nothing_is_sent(gateway: ScriptedGateway, jobs: Jobs) -> None:
    (jobs.folder / "bad").write_bytes(
        b'fine\n{"prompt": 1}\n{"promt": "a", "prompt": "b"}\n{broken\n\xff\n{"messages": []}\n'
        b'{"prompt": "a", "max_tokens": true}\n{"prompt": "a", "prompt": "b"}\n{}\n'
    )
    done = jobs("submit", "--file", "bad")
    assert done.returncode == 2
    for number in range(2, 10):
        assert f"bad, line {number}: " in done.stderr
    assert "8 of 9 lines" in done.stderr
    assert not gateway.calls
    assert jobs("submit", "--file", "nowhere").returncode == 2
    (jobs.folder / "many").write_text("q\n" * 10_001)
    assert "split -l 10000" in jobs("submit", "--file", "many").stderr


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_whatever_a_file_holds_each_line_is_a_job_or_a_fault(lines: list[bytes]) -> None:
    found = job_files.read(lines)
    assert all((line.job is None) == bool(line.fault) for line in found)
    numbers = [line.number for line in found]
    assert numbers == [number for number, line in enumerate(lines, 1) if line.strip()]


def test_list_show_stats_and_cancel(gateway: ScriptedGateway, jobs: Jobs) -> None:
    gateway.will(scripted_jobs.listed("job_2", "job_1"))
    lines = jobs("list", "--state", "succeeded", "--label", "a=b", "--batch", "jobs_1").stdout.splitlines()
    assert [line.split("\t")[6] for line in lines] == ["JOB", "job_2", "job_1"]
    asked = gateway.calls[-1].request
    assert (list(asked.states), dict(asked.labels), asked.batch_id) == ([SUCCEEDED], {"a": "b"}, "jobs_1")

    page = scripted_jobs.listed("job_2", "job_1")
    page.results.extend([scripted_jobs.got(text="two").result, pb.JobResult()])
    gateway.will(page)
    first, second = map(json.loads, jobs("list", "--results", "--json").stdout.splitlines())
    assert first["result"]["choices"][0]["text"] == "two"
    assert "result" not in second
    assert "--json" in jobs("list", "--results").stderr

    gateway.will(scripted_jobs.got(FAILED, None, 5))
    shown = jobs("show", "job_1").stdout
    assert "state\tfailed, attempt 5 of 5 (NO_REPLICA)\n" in shown
    assert "No replica can serve." in shown
    gateway.will(scripted_jobs.got(FAILED, None, 5))
    assert json.loads(jobs("show", "job_1", "--json").stdout)["failed_attempts"][0]["request_id"] == "req_9"

    gateway.will(pb.CountJobsResponse(waiting=3, failed=1))
    assert jobs("stats").stdout.splitlines()[1] == "3\t0\t0\t1\t0"
    gateway.will(pb.CountJobsResponse(waiting=3))
    assert json.loads(jobs("stats", "--json").stdout)["waiting"] == 3

    gateway.will(pb.CancelJobResponse(job=scripted_jobs.job(CANCELLED)))
    assert jobs("cancel", "job_1").stderr == "job job_1: cancelled\n"


def test_a_result_is_waited_for_and_failure_is_1(gateway: ScriptedGateway, jobs: Jobs) -> None:
    gateway.will(scripted_jobs.update(RUNNING), Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING"))
    gateway.will(scripted_jobs.update(SUCCEEDED, text="yes"))
    done = jobs("result", "job_1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "yes\n", "waiting\n" if done.stderr else "")
    gateway.will(scripted_jobs.got(text="yes"))
    assert json.loads(jobs("result", "job_1", "--wait", "0", "--json").stdout)["choices"][0]["text"] == "yes"
    gateway.will(scripted_jobs.update(FAILED))
    done = jobs("result", "job_1")
    assert done.returncode == 1
    assert "NO_REPLICA" in done.stderr
    assert "[request req_9]" in done.stderr
    gateway.will(scripted_jobs.got(WAITING, None, 0))
    done = jobs("result", "job_1", "--wait", "0")
    assert (done.returncode, "has not ended" in done.stderr) == (1, True)


def test_a_watch_into_a_pipe_is_a_line_for_each_change(gateway: ScriptedGateway, jobs: Jobs) -> None:
    steps = (
        scripted_jobs.update(WAITING, attempts=0),
        scripted_jobs.update(RUNNING, partial="one"),
        scripted_jobs.update(SUCCEEDED, text="one two"),
    )
    gateway.will(*steps)
    done = jobs("watch", "job_1")
    assert done.returncode == 0
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [
        "STATE",
        "waiting",
        "running",
        "succeeded",
    ]
    gateway.will(*steps)
    assert len(jobs("watch", "job_1", "--json").stdout.splitlines()) == 3
    gateway.will(scripted_jobs.update(FAILED))
    assert jobs("watch", "job_1").returncode == 1


def test_a_batch_is_watched_until_it_has_ended(gateway: ScriptedGateway, jobs: Jobs) -> None:
    gateway.will(pb.CountJobsResponse(running=2))
    gateway.will(scripted_jobs.listed("job_1"))
    gateway.will(pb.CountJobsResponse(succeeded=1, failed=1))
    gateway.will(pb.ListJobsResponse())
    done = jobs("watch", "--batch", "jobs_1")
    assert done.stdout.splitlines()[1:] == ["0\t2\t0\t0\t0", "0\t0\t1\t1\t0"]
    assert (done.returncode, "dead-letters list" in done.stderr) == (1, True)
    assert gateway.calls[0].request.batch_id == "jobs_1"
    gateway.will(pb.CountJobsResponse())
    gateway.will(pb.ListJobsResponse())
    assert "no job of batch nothing" in jobs("watch", "--batch", "nothing").stderr


def test_ctrl_c_ends_a_watch_on_a_terminal_quietly(gateway: ScriptedGateway, jobs: Jobs) -> None:
    gateway.will(scripted_jobs.update(RUNNING, partial="begun \x1b]0;evil\x07"), Hang)
    environment = jobs.environment | {"TERM": "xterm"}
    with Terminal([*COMMAND, "watch", "job_1"], environment, jobs.folder) as screen:
        screen.expect("begun")
        screen.interrupt()
        assert screen.exit_code() == 130
    assert gateway.calls[0].ended.wait(DEADLINE_S)
    assert "Traceback" not in screen.shown
    assert "\x1b]0;" not in screen.shown


def test_dead_letters_are_listed_and_shown(gateway: ScriptedGateway, jobs: Jobs) -> None:
    letters = scripted_jobs.dead_letters(scripted_jobs.dead_letter("dl_1"), scripted_jobs.unreadable("dl_2"))
    gateway.will(letters)
    lines = jobs("dead-letters", "list", "--reason", "NO_REPLICA", "--since", "1h").stdout.splitlines()
    assert [line.split("\t")[5] for line in lines] == ["ID", "dl_1", "dl_2"]
    assert gateway.calls[0].request.filter.error_reason == 40
    gateway.will(letters)
    assert len(jobs("dead-letters", "list", "--json").stdout.splitlines()) == 2
    gateway.will(letters)
    assert "No replica can serve. (NO_REPLICA)" in jobs("dead-letters", "show", "dl_1").stdout
    gateway.will(letters)
    assert "place\t0/42" in jobs("dead-letters", "show", "dl_2").stdout
    gateway.will(letters)
    assert jobs("dead-letters", "show", "dl_3").returncode == 1


def test_dead_letters_are_replayed_and_discarded(gateway: ScriptedGateway, jobs: Jobs) -> None:
    gateway.will(pb.ReplayDeadLetterResponse(job=scripted_jobs.job(job_id="job_n")))
    assert jobs("dead-letters", "replay", "dl_1", "--model", "small").stdout == "job_n\n"
    assert gateway.calls[0].request.override.model == "small"

    gateway.will(scripted_jobs.replayed("dl_1", "job_a"), scripted_jobs.replayed("dl_2"))
    narrow = ("--reason", "NO_REPLICA", "--model-was", "big", "--since", "1h", "--max-tokens", "4")
    done = jobs("dead-letters", "replay", "--all", *narrow)
    assert (done.returncode, done.stdout) == (1, "job_a\n")
    assert "dl_2 cannot be replayed" in done.stderr
    assert "1 replayed, 1 could not be" in done.stderr
    request = gateway.calls[1].request
    assert (request.filter.model, request.override.max_tokens) == ("big", 4)

    gateway.will(pb.DiscardDeadLetterResponse())
    assert jobs("dead-letters", "discard", "dl_1").returncode == 0


def test_wrong_use_is_2() -> None:
    runner = CliRunner()
    for arguments in (
        ["submit", "q", "--file", "f"],
        ["submit", "q", "--priority", "first"],
        ["submit", "q", "--not-before", "soon"],
        ["submit", "q", "--label", "x"],
        ["submit", "q", "--max-attempts", "21"],
        ["watch", "job_1", "--batch", "b"],
        ["dead-letters", "replay"],
        ["dead-letters", "replay", "dl_1", "--all"],
        ["dead-letters", "replay", "dl_1", "--reason", "NO_REPLICA"],
    ):
        assert runner.invoke(app, ["jobs", *arguments]).exit_code == 2, arguments
    assert "--webhook-secret " not in runner.invoke(app, ["jobs", "submit", "--help"]).output
