"""How the native library comes to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.inference.engine.native import build as native_build
from services.inference.engine.native.build import NativeUnavailable, build
from services.inference.engine.native.library import Library

ROOT = Path(__file__).parents[3]
BUILDS = """
import sys
from pathlib import Path
from services.inference.engine.native import build
build.FLAGS = (*build.FLAGS, "-O1")
build.X86_VARIANTS = {}
print(build.build(Path(sys.argv[1]), lambda text: print("progress", text)))
"""


def test_two_processes_build_at_once(tmp_path):
    folder = tmp_path / "new" / "cache"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDS, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert said[0][-1] == said[1][-1]
    assert sum(len(lines) - 1 for lines in said) == 1, "one of them compiled"
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


def test_without_a_compiler_it_says_so(tmp_path):
    with pytest.raises(NativeUnavailable, match=r"no C compiler \(no-such-cc\)"):
        build(tmp_path, print, compiler="no-such-cc")


def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no space left on device >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    with pytest.raises(NativeUnavailable, match="no space left"):
        build(tmp_path / "cache", print, compiler=str(compiler))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["native.lock"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeUnavailable, match="cannot be built in"):
        build(tmp_path / "file", print)


def test_a_prebuilt_library_needs_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "PREBUILT", tmp_path / "prebuilt")
    name = native_build._file_name(native_build._sources_digest())
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "prebuilt" / name).write_bytes(b"")
    assert build(tmp_path, print, compiler="no-such-cc") == tmp_path / "prebuilt" / name


def test_what_is_no_library_is_refused(tmp_path):
    (tmp_path / "native.so").write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
        Library(tmp_path / "native.so")
