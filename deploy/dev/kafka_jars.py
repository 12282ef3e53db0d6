"""Kafka's jars: fetched once, checked against the digests in jgo.lock.toml, kept in one folder per lock.

jgo knows where a Maven repository is, mirrors in its own settings file included; no address stands here. The
lock is a flat list, so nothing is resolved at this point and every byte is known beforehand.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.dev.state import CannotStart

LOCK_FILE = Path(__file__).with_name("jgo.lock.toml")
PARALLEL_DOWNLOADS = 8
TIMEOUT_S = 60


def fetch(dist: Path, say: Callable[[str], None]) -> Path:
    """The folder that holds the jars, below `dist`; it is filled first where it has to be.

    Several processes may ask at once; one fetches and the others wait.

    Raises:
        CannotStart: a jar cannot be had, or is not the one that the lock names.
    """
    lock = LOCK_FILE.read_bytes()
    jars = list(tomllib.loads(lock.decode())["dependencies"])
    # The lock's time of making is no part of what it says.
    digest = hashlib.sha256("\n".join(sorted(jar["sha256"] for jar in jars)).encode()).hexdigest()[:16]
    folder = dist / digest
    if folder.exists():
        return folder
    dist.mkdir(parents=True, exist_ok=True)
    with _exclusive(dist / ".lock", say):
        if not folder.exists():
            say(f"Fetching Kafka: {len(jars)} jars")
            fresh = dist / f"{digest}.new"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            _fetch_all(jars, dist / "repository", fresh, say)
            fresh.rename(folder)
            shutil.rmtree(dist / "repository", ignore_errors=True)
    return folder


def _fetch_all(jars: list[dict[str, str]], repository: Path, into: Path, say: Callable[[str], None]) -> None:
    from jgo.config import GlobalSettings  # takes a while to load, and is not needed once the jars are here
    from jgo.maven import MavenContext

    mirrors = GlobalSettings.load().repositories or None
    context = MavenContext(repo_cache=repository, remote_repos=mirrors, timeout=TIMEOUT_S)

    def fetch_one(jar: dict[str, str]) -> Path:
        project = context.project(jar["groupId"], jar["artifactId"])
        artifact = project.at_version(jar["version"]).artifact(packaging=jar["packaging"])
        for _ in range(3):
            path = Path(artifact.resolve())
            if hashlib.sha256(path.read_bytes()).hexdigest() == jar["sha256"]:
                return path
            path.unlink()  # cut off, by an interruption of an earlier run for instance
        raise CannotStart(f"{artifact.filename} is not the file that deploy/dev/jgo.lock.toml names.")

    with concurrent.futures.ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        futures = [pool.submit(fetch_one, jar) for jar in jars]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                path = future.result()
                path.rename(into / path.name)
                if done % 10 == 0:
                    say(f"Fetching Kafka: {done} of {len(jars)} jars")
        except CannotStart:
            raise
        except Exception as error:
            raise CannotStart(
                f"Kafka's jars could not be fetched ({error}). Try again; what is here is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _exclusive(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another process that fetches Kafka")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
