"""The state folder of the development mesh: what stands in the way is said in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deploy.dev import ports
from deploy.dev.broker import Broker
from deploy.dev.environment import Plan
from deploy.dev.mesh import Mesh
from deploy.dev.state import CannotStart, State
from services.gateway.jobs.seals import load


def test_secrets_are_private_and_stay(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    state.prepare()
    files = sorted(state.secrets.iterdir())
    assert [file.name for file in files] == ["auth", "gateway", "gateway-payload-key", "inference", "logging"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    before = {file: file.read_text() for file in files}
    assert len(set(before.values())) == 5
    load(state.payload_key)
    state.prepare()
    assert {file: file.read_text() for file in files} == before


def test_a_half_made_folder_is_refused(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.prepare()
    (tmp_path / "auth").mkdir()
    (tmp_path / "format").unlink()
    with pytest.raises(CannotStart, match=r"half-made.*rm -r"):
        state.prepare()


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.prepare()
    (tmp_path / "format").write_text("99")
    with pytest.raises(CannotStart, match="another version"):
        state.prepare()


def test_a_second_mesh_is_kept_out(tmp_path: Path) -> None:
    first, second = State(tmp_path), State(tmp_path)
    first.lock()
    first.record({})
    with pytest.raises(CannotStart, match=r"runs already.*make down"):
        second.lock()
    second.forget()  # what did not get the lock leaves the record alone
    assert (tmp_path / "run" / "mesh.json").exists()


async def test_a_mesh_that_was_refused_stops_nothing_and_says_nothing(tmp_path: Path) -> None:
    first = State(tmp_path)
    first.lock()
    said: list[str] = []
    second = Mesh(
        State(tmp_path),
        mesh_ports=ports.with_offset(0),
        bootstrap=None,
        dist=tmp_path,
        models=tmp_path,
        tls=False,
        settings={},
        say=said.append,
        on_line=None,
    )
    with pytest.raises(CannotStart, match="runs already"):
        await second.start()
    await second.drain()
    assert said == []


def test_what_a_killed_mesh_has_left_is_named_and_can_be_ended(tmp_path: Path) -> None:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    state = State(tmp_path)
    state.lock()
    state.record({"gateway": left.pid})
    record = json.loads((tmp_path / "run" / "mesh.json").read_text())
    record["mesh"]["started"] += 1  # the number of the mesh's process now belongs to somebody else
    (tmp_path / "run" / "mesh.json").write_text(json.dumps(record))
    later = State(tmp_path)
    state._lock = None  # as if that process had ended
    with pytest.raises(CannotStart, match=rf"gateway \({left.pid}\).*make down"):
        later.lock()
    assert State(tmp_path).stop_recorded(5)
    left.wait(5)
    State(tmp_path).lock()


def test_down_without_a_mesh_does_nothing(tmp_path: Path) -> None:
    assert not State(tmp_path).stop_recorded(1)


def test_used_ports_are_named() -> None:
    with socket.socket() as listener:
        listener.bind((ports.HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(CannotStart, match=rf"{port} \(auth\)"):
            ports.require_free({"auth": port})
    ports.require_free({"auth": port})


def test_ports_in_hand_are_given_to_nobody_else() -> None:
    """Nobody listens on them yet: looking alone would give some twice."""
    ours, theirs = ports.PortReservations(), ports.PortReservations()
    try:
        names = [str(number) for number in range(300)]
        taken = ours.take(names)
        assert len({*taken.values(), *theirs.take(names).values()}) == 600
    finally:
        ours.release()
        theirs.release()


def test_a_folder_of_marks_that_is_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"llmos-ports-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CannotStart, match="TMPDIR"):
        ports.PortReservations().take(["auth"])


def test_clients_are_told(tmp_path: Path) -> None:
    state = State(tmp_path / "a folder")
    state.prepare()
    with pytest.raises(CannotStart, match="make up"):
        state.client_variables()
    plan = Plan(
        state=state, ports={"gateway": 50050}, bootstrap="", models=tmp_path, certs=tmp_path / "certs"
    )
    state.tell_clients(plan.client_environment())
    assert state.client_variables() == plan.client_environment()
    shell = subprocess.run(
        ["sh", "-c", f". '{state.client_env}'; echo $LLMOS_API_KEY_FILE"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout.strip() == str(state.admin_key)


def test_a_half_made_broker_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = shutil.which("true")
    assert java is not None
    monkeypatch.setenv("LLMOS_JAVA", java)
    monkeypatch.setattr("deploy.dev.kafka_jars.fetch", lambda dist, say: dist)
    (tmp_path / "data").mkdir()
    broker = Broker(tmp_path, port=1, controller_port=2, dist=tmp_path, log_file=tmp_path / "log")
    with pytest.raises(CannotStart, match=r"meta\.properties.*rm -r"):
        broker.prepare()
