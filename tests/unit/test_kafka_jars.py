"""Kafka's jars are fetched once, from where jgo is told to look, and only if they are what the lock says."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.dev import kafka_jars
from deploy.dev.state import CannotStart

JARS = {"one": b"first jar", "two": b"second jar"}


class Repository:
    """A Maven repository on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        for name, content in JARS.items():
            self.put(name, content)
        seen = self.requests

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                seen.append(self.path)

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, name: str, content: bytes) -> None:
        file = self.folder / "org" / "example" / name / "1.0" / f"{name}-1.0.jar"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    @property
    def downloads(self) -> list[str]:
        return [path for path in self.requests if path.endswith(".jar")]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    repository = Repository(tmp_path / "repository")
    home = tmp_path / "home"
    (home / ".config").mkdir(parents=True)
    port = repository.server.server_address[1]
    (home / ".config" / "jgo.conf").write_text(f"[repositories]\nmirror = http://127.0.0.1:{port}\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    lock = tmp_path / "jgo.lock.toml"
    lock.write_text(
        "\n".join(
            f'[[dependencies]]\ngroupId = "org.example"\nartifactId = "{name}"\nversion = "1.0"\n'
            f'packaging = "jar"\nsha256 = "{hashlib.sha256(content).hexdigest()}"\n'
            for name, content in JARS.items()
        )
    )
    monkeypatch.setattr(kafka_jars, "LOCK_FILE", lock)
    yield repository
    repository.server.shutdown()
    repository.server.server_close()


def test_are_fetched_once(repository: Repository, tmp_path: Path) -> None:
    said: list[str] = []
    folder = kafka_jars.fetch(tmp_path / "dist", said.append)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        f"{name}-1.0.jar": content for name, content in JARS.items()
    }
    assert said == ["Fetching Kafka: 2 jars"]
    assert kafka_jars.fetch(tmp_path / "dist", said.append) == folder
    assert len(repository.downloads) == 2


def test_are_fetched_by_one_of_several_at_once(repository: Repository, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: kafka_jars.fetch(tmp_path / "dist", lambda _: None), range(4)))
    assert len(folders) == 1
    assert len(repository.downloads) == 2


def test_another_file_is_refused_and_leaves_nothing_to_be_used(
    repository: Repository, tmp_path: Path
) -> None:
    repository.put("two", b"something else")
    with pytest.raises(CannotStart, match=r"two-1\.0\.jar is not the file"):
        kafka_jars.fetch(tmp_path / "dist", lambda _: None)
    repository.put("two", JARS["two"])
    assert len(list(kafka_jars.fetch(tmp_path / "dist", lambda _: None).iterdir())) == 2


def test_a_missing_jar_is_a_sentence(repository: Repository, tmp_path: Path) -> None:
    (repository.folder / "org" / "example" / "one" / "1.0" / "one-1.0.jar").unlink()
    with pytest.raises(CannotStart, match="could not be fetched"):
        kafka_jars.fetch(tmp_path / "dist", lambda _: None)
