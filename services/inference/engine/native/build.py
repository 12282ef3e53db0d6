"""Compiles the native library with the machine's own compiler, once, into a cache.

`python -m services.inference.engine.native.build FOLDER` does it ahead of time, as images do.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
SOURCES = Path(__file__).parent
PREBUILT = SOURCES / "prebuilt"
"""Where a library that was built ahead of time is looked for first."""
COMPILER = "cc"
COMPILE_TIMEOUT_S = 300
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    # Every tile rounds alike: no multiply-add but those that are written.
    "-ffp-contract=off",
    "-fno-math-errno",
)
UNITS = ("pool.c", "model.c", "step.c")
X86_VARIANTS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
}

Progress = Callable[[str], None]


class NativeUnavailable(Exception):
    """The native step cannot be had here, or not for this model; the text says why."""


def build(folder: Path, progress: Progress, compiler: str = COMPILER) -> Path:
    """The library's path, after building it if it is not there. Safe in several processes at once.

    Raises NativeUnavailable where there is no compiler, or it fails, or the folder cannot be written.
    """
    prebuilt = PREBUILT / _file_name(_sources_digest())
    if prebuilt.is_file():
        return prebuilt
    return _build(folder, progress, compiler, _version(compiler))


def prebuild(folder: Path, progress: Progress) -> Path:
    """Builds for machines without a compiler: the name does not say by which one it was made."""
    return _build(folder, progress, COMPILER, version="")


def _build(folder: Path, progress: Progress, compiler: str, version: str) -> Path:
    target = folder / _file_name(_sources_digest() + version)
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "native.lock"):
            if not target.is_file():
                progress("compiling the native step, once for this machine")
                _compile(compiler, target)
    except OSError as error:
        raise NativeUnavailable(f"the native step cannot be built in {folder}: {error}") from error
    return target


def _file_name(key: str) -> str:
    digest = hashlib.sha256(f"{platform.system()}/{platform.machine()}/{key}".encode()).hexdigest()
    return f"native-{digest[:16]}.so"


def _sources_digest() -> str:
    digest = hashlib.sha256(repr((FLAGS, UNITS, _variants())).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        content = source.read_bytes()
        digest.update(f"{source.name}/{len(content)}/".encode() + content)
    return digest.hexdigest()


def _variants() -> dict[str, tuple[str, ...]]:
    x86 = X86_VARIANTS if platform.machine() in ("x86_64", "AMD64") else {}
    return {"portable": (), **x86}


def _version(compiler: str) -> str:
    """What the compiler says of itself: another one makes another library."""
    if shutil.which(compiler) is None:
        raise NativeUnavailable(f"there is no C compiler ({compiler}) to build the native step with")
    return _run([compiler, "--version"])


def _compile(compiler: str, target: Path) -> None:
    """Compiles each unit in a process of its own, links them, and puts the whole library in place at once."""
    units: list[tuple[str, tuple[str, ...], str]] = [(unit, (), Path(unit).stem) for unit in UNITS]
    units += [("variant.c", (f"-DVARIANT={name}", *flags), name) for name, flags in _variants().items()]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".native-") as folder:
        objects = [Path(folder, f"{name}.o") for _, _, name in units]

        def compile_unit(index: int) -> None:
            source, flags, _ = units[index]
            _run([compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", str(objects[index])])

        with ThreadPoolExecutor(max_workers=min(len(units), os.cpu_count() or 1)) as threads:
            # The longest first.
            list(threads.map(compile_unit, reversed(range(len(units)))))
        library = Path(folder, "native.so")
        _run([compiler, *FLAGS, "-shared", "-o", str(library), *map(str, objects), "-lm"])
        library.replace(target)


def _run(command: list[str]) -> str:
    """What the command prints. Raises NativeUnavailable."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"the native step cannot be compiled: {error}") from error
    if done.returncode:
        last = "; ".join(done.stderr.strip().splitlines()[-3:])
        raise NativeUnavailable(f"the native step cannot be compiled: {last or done.returncode}")
    return done.stdout


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PREBUILT
    logger.info("%s", prebuild(folder, logger.info))


if __name__ == "__main__":
    _main()
