"""Checks the contracts: `lint` their style, `breaking` that no client of another version is broken.

Both read descriptor images, as protos/generate.py makes them, so that the protos of installed packages
need no copy here. Rules stand in buf.yaml; buf comes from the package buf-bin.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REPOSITORY = ROOT.parent
DEFAULT_REFS = ("origin/main", "main")


def find_buf() -> str:
    """The buf of this environment, or else the one on PATH."""
    path = shutil.which("buf", path=sysconfig.get_path("scripts")) or shutil.which("buf")
    if path is None:
        sys.exit("buf is not installed; install requirements/proto.txt")
    return path


def make_image(root: Path, image: Path) -> None:
    command = [sys.executable, str(ROOT / "generate.py"), "--root", str(root), "--image", str(image)]
    subprocess.run(command, check=True)


def run_buf(*args: str) -> int:
    return subprocess.run(
        [find_buf(), *args, "--config", str(REPOSITORY / "buf.yaml")], check=False
    ).returncode


def git(*args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(REPOSITORY), *args], check=False, capture_output=True)


def default_ref() -> str | None:
    for ref in DEFAULT_REFS:
        if git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").returncode == 0:
            return ref
    return None


def extract(ref: str, folder: Path) -> bool:
    """Writes the protos at a git ref into `folder`; False where the ref has none."""
    listing = git("ls-tree", "-r", "--name-only", ref, "protos/llmos")
    if listing.returncode != 0:
        sys.exit(f"there is no git ref {ref}")
    if not listing.stdout:
        return False
    archive = git("archive", "--format=tar", ref, "protos/llmos")
    if archive.returncode != 0:
        sys.exit(f"git archive: {archive.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return True


def lint(root: Path, work: Path) -> int:
    image = work / "new.binpb"
    make_image(root, image)
    code = run_buf("lint", str(image))
    if code == 0:
        print("protos: lint found nothing")
    return code


def breaking(root: Path, work: Path, against: str | None) -> int:
    ref = against or default_ref()
    if ref is None:
        print(f"protos: nothing to compare with, since there is no {' or '.join(DEFAULT_REFS)}")
        return 0
    old = work / "old"
    if not extract(ref, old):
        print(f"protos: nothing to compare with, since {ref} has no protos")
        return 0
    make_image(old / "protos", work / "old.binpb")
    make_image(root, work / "new.binpb")
    code = run_buf("breaking", str(work / "new.binpb"), "--against", str(work / "old.binpb"))
    if code == 0:
        print(f"protos: nothing breaks a client of {ref}")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("check", choices=("lint", "breaking"), nargs="?", help="which (default: both)")
    parser.add_argument("--against", metavar="REF", help=f"git ref (default: {', else '.join(DEFAULT_REFS)})")
    parser.add_argument("--root", type=Path, default=ROOT, help="what holds llmos/ (default: protos)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        linted = lint(args.root, work) if args.check != "breaking" else 0
        broken = breaking(args.root, work, args.against) if args.check != "lint" else 0
    sys.exit(linted or broken)


if __name__ == "__main__":
    main()
