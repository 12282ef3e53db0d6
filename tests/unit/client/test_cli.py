"""The command `llmos` as a real process, against a server that answers by a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from llmos_client.cli import app, terminal
from typer.testing import CliRunner

from tests.framework import scripted_gateway as script
from tests.framework.scripted_gateway import Fail, Hang, ScriptedGateway, answer, delta, started
from tests.framework.terminals import Terminal

COMMAND = [sys.executable, "-m", "llmos_client.cli"]
DEADLINE_S = 20.0


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as server:
        yield server


@pytest.fixture
def environment(gateway: ScriptedGateway) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
    return own | {"LLMOS_TARGET": gateway.target, "LLMOS_MODEL": "echo", "TERM": "dumb", "COLUMNS": "200"}


class Llmos:
    """Runs the command with pipes."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment = environment
        self.folder = folder

    def __call__(self, *arguments: str, question: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            input=question,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


@pytest.fixture
def llmos(environment: dict[str, str], tmp_path: Path) -> Llmos:
    return Llmos(environment, tmp_path)


def test_one_question_and_its_answer_alone_on_stdout(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(*answer("Blue", " \x1b[31msky"))
    done = llmos(
        *("chat", "why?", "--system", "be brief", "--max-tokens", "9", "--temperature", "0", "--seed", "5")
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Blue \x1b[31msky\n", "")
    spec = gateway.calls[0].request.spec
    assert [m.content[0].text for m in spec.prompt.chat.messages] == ["be brief", "why?"]
    assert (spec.max_tokens, spec.sampling.temperature, spec.sampling.seed) == (9, 0.0, 5)


def test_a_piped_question_the_first_ready_model_and_stats(gateway: ScriptedGateway, llmos: Llmos) -> None:
    del llmos.environment["LLMOS_MODEL"]
    gateway.will(script.models("first", "second"))
    gateway.will(*answer("yes"))
    done = llmos("chat", "--stats", question="is it?\n")
    assert (done.returncode, done.stdout) == (0, "yes\n")
    assert gateway.calls[1].request.spec.model == "first"
    trace_id = str(gateway.calls[1].metadata["traceparent"]).split("-")[1]
    for part in ("3 of prompt", "1 of answer", "req_1", trace_id):
        assert part in done.stderr


def test_an_error_is_one_sentence_with_hint_and_request_id(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(
        Fail(
            grpc.StatusCode.INVALID_ARGUMENT,
            "REQUEST_INVALID",
            message="A field is wrong.",
            hint="Correct it.",
            violations=(("spec.n", "at most 8"),),
        )
    )
    done = llmos("chat", "q")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "error: A field is wrong (REQUEST_INVALID). Correct it. [request req_failed]\n  spec.n: at most 8\n"
    )


def test_a_broken_stream_fails_after_what_was_shown(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(started(), delta(1, "half"))
    done = llmos("chat", "q")
    assert (done.returncode, done.stdout) == (1, "half\n")
    assert "STREAM_INCOMPLETE" in done.stderr


def test_wrong_use_is_2(llmos: Llmos, environment: dict[str, str]) -> None:
    for arguments in (
        ["chat", "q", "--target", "http://localhost"],
        ["chat", "q", "--api-key-file", "nowhere"],
        ["chat", "q", "--cert", "alone"],
    ):
        done = llmos(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_usage_is_checked_before_anything_is_sent() -> None:
    runner = CliRunner()
    for arguments in (
        ["nothing"],
        ["chat", "q", "--temperature", "9"],
        ["chat", "q", "--max-tokens", "0"],
        ["audit", "tail", "--last", "2000"],
        ["audit", "search", "--since", "yesterday"],
    ):
        assert runner.invoke(app, arguments).exit_code == 2, arguments
    assert runner.invoke(app, ["--version"]).output.strip()
    assert "--api-key " not in runner.invoke(app, ["chat", "--help"]).output


def test_models_as_lines_and_as_json(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(script.models("a", "b"))
    lines = llmos("models").stdout.splitlines()
    assert lines[1].split("\t")[:3] == ["a", "yes", "2048"]
    gateway.will(script.models("a", "b"))
    assert [json.loads(line)["id"] for line in llmos("models", "--json").stdout.splitlines()] == ["a", "b"]


def test_audit_search(gateway: ScriptedGateway, llmos: Llmos) -> None:
    page = script.audit_service_pb2.SearchResponse
    gateway.will(page(records=[script.record(2), script.record(1)]))
    done = llmos("audit", "search", "--outcome", "succeeded", "--since", "10m", "--limit", "7")
    received, outcome, method, *_, request = done.stdout.splitlines()[1].split("\t")
    assert (received, outcome, method, request) == (
        "2023-11-14T22:13:20.000Z",
        "succeeded",
        "StreamGenerate",
        "req_2",
    )
    asked = gateway.calls[0].request
    assert (asked.filter.outcome, asked.page_size) == (1, 7)
    assert asked.filter.HasField("receive_time_from")


def test_audit_tail_as_json_until_it_may_not(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(
        script.tailed(1), script.tailed(2), Fail(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIAL_REVOKED")
    )
    done = llmos("audit", "tail", "--json", "--last", "5")
    assert [json.loads(line)["request_id"] for line in done.stdout.splitlines()] == ["req_1", "req_2"]
    assert done.returncode == 1
    assert gateway.calls[0].request.last == 5


def test_the_key_of_a_mesh_started_here_is_found_and_told(gateway: ScriptedGateway, llmos: Llmos) -> None:
    key = llmos.folder / ".state" / "auth" / "admin-key"
    key.parent.mkdir(parents=True)
    key.write_text("llmos_dev\n")
    gateway.will(script.models("a"))
    done = llmos("models")
    assert gateway.calls[0].metadata["authorization"] == "Bearer llmos_dev"
    assert ".state/auth/admin-key" in done.stderr
    assert "llmos_dev" not in done.stderr + done.stdout

    gateway.will(script.models("a"))
    llmos.environment["LLMOS_API_KEY"] = "llmos_mine"
    assert llmos("models").stderr == ""
    assert gateway.calls[1].metadata["authorization"] == "Bearer llmos_mine"

    del llmos.environment["LLMOS_API_KEY"]
    done = llmos("models", "--target", "192.0.2.1:50050", "--allow-plaintext", "--tls", "--ca", "nowhere")
    assert "admin-key" not in done.stderr, "it must not leave this machine"


def test_a_closed_pipe_is_quiet(gateway: ScriptedGateway, llmos: Llmos) -> None:
    steps = [started(), *(delta(seq, "x" * 60_000) for seq in range(1, 20)), Hang]
    gateway.will(*steps)
    process = subprocess.Popen(
        [*COMMAND, "chat", "q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=llmos.environment,
        cwd=llmos.folder,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
    assert gateway.calls[0].ended.wait(DEADLINE_S), "the work must end with its reader"


def test_ctrl_c_ends_one_question_with_130(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(started(), delta(1, "begun"), Hang)
    with Terminal([*COMMAND, "chat", "q"], llmos.environment, llmos.folder) as screen:
        screen.expect("begun")
        screen.interrupt()
        assert screen.exit_code() == 130
    assert gateway.calls[0].ended.wait(DEADLINE_S)
    assert not gateway.calls[0].answered
    assert "Traceback" not in screen.shown


def test_ctrl_c_in_a_conversation_ends_the_answer_then_the_chat(
    gateway: ScriptedGateway, llmos: Llmos
) -> None:
    gateway.will(started(), delta(1, "begun"), Hang)
    gateway.will(*answer("se", "cond"))
    gateway.will(Fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", retry_after_s=2))
    with Terminal([*COMMAND, "chat", "--system", "be kind"], llmos.environment, llmos.folder) as screen:
        screen.expect("> ")
        screen.type("one\n")
        screen.expect("begun")
        screen.interrupt()
        screen.expect("(cancelled)")
        assert gateway.calls[0].ended.wait(DEADLINE_S)
        assert not gateway.calls[0].answered
        screen.expect("> ")
        screen.type("two\n")
        screen.expect("second")
        screen.expect("> ")
        screen.type("three\n")
        screen.expect("OVERLOADED")
        screen.expect("> ")
        assert screen.interrupt_the_prompt() == 130
    contents = [m.content[0].text for m in gateway.calls[1].request.spec.prompt.chat.messages]
    assert contents == ["be kind", "one", "begun", "two"]
    assert "Traceback" not in screen.shown


def test_leaving_a_conversation(gateway: ScriptedGateway, llmos: Llmos) -> None:
    for farewell in ("/exit\n", "\x04"):
        gateway.will(*answer("a", "\x1b]0;evil\x07"))
        gateway.will(*answer("b"))
        first = len(gateway.calls)
        with Terminal([*COMMAND, "chat"], llmos.environment, llmos.folder) as screen:
            screen.expect("> ")
            screen.type("one\n")
            screen.expect("evil")
            screen.expect("> ")
            screen.type("/reset\n")
            screen.expect("> ")
            screen.type("two\n")
            screen.expect("b\r\n")
            screen.expect("> ")
            screen.type(farewell)
            assert screen.exit_code() == 0
        assert "\x1b]0;" not in screen.shown, "a model must not send escape sequences to a terminal"
        assert len(gateway.calls[first + 1].request.spec.prompt.chat.messages) == 1


def test_ctrl_c_ends_a_tail_quietly(gateway: ScriptedGateway, llmos: Llmos) -> None:
    gateway.will(script.tailed(1), Hang)
    with Terminal([*COMMAND, "audit", "tail"], llmos.environment, llmos.folder) as screen:
        screen.expect("REQUEST")
        screen.expect("req_1")
        screen.interrupt()
        assert screen.exit_code() == 130
    assert gateway.calls[0].ended.wait(DEADLINE_S)
    assert "Traceback" not in screen.shown


def test_control_characters_are_taken_out() -> None:
    assert terminal.printable("a\tb\nc") == "a\tb\nc"
    assert terminal.printable("\x1b[2J\x07\x9b\r\x7f") == "\ufffd[2J\ufffd\ufffd\ufffd\ufffd"
