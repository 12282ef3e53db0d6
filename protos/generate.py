"""Compiles protos/llmos into protos/gen: messages, stubs, their types, and one descriptor image.

`buf/validate/validate.proto` and `google/rpc/*` come from installed packages, so nothing of theirs
stands in this tree. The image (`llmos.binpb`, with comments) is what lint, the breaking-change check
and the API reference read. Nothing is done when the inputs are those of the last run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate.validate_pb import FieldRules

ROOT = Path(__file__).resolve().parent
IMAGE = "llmos.binpb"
TOOLS = ("grpcio-tools", "mypy-protobuf", "protovalidate", "protobuf")


def sources(root: Path) -> list[Path]:
    return sorted((root / "llmos").rglob("*.proto"))


def digest(root: Path) -> str:
    """A digest of everything that the generated code depends on."""
    sha = hashlib.sha256(Path(__file__).read_bytes())
    for tool in TOOLS:
        sha.update(f"{tool}=={importlib.metadata.version(tool)}\n".encode())
    for path in sources(root):
        sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()


def write_validate_descriptor(path: Path) -> None:
    """protovalidate's wheel carries its proto as a descriptor only; hand that to protoc."""
    file = descriptor_pb2.FileDescriptorProto.FromString(FieldRules.desc().file.proto.to_binary())
    path.write_bytes(descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString())


def run_protoc(root: Path, validate: Path, *args: str) -> None:
    files = [str(path.relative_to(root)) for path in sources(root)]
    wellknown = Path(grpc_tools.__file__).parent / "_proto"
    # protoc finds its plug-ins on PATH; ours stand beside this interpreter, which need not be on it.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = ["protoc", f"--descriptor_set_in={validate}", f"-I{root}", f"-I{wellknown}", *args, *files]
    if protoc.main(command) != 0:
        sys.exit("protoc failed; its messages stand above")


def generate(root: Path, out: Path) -> bool:
    """Fills `out`; returns False where it was up to date."""
    want = digest(root)
    stamp = out / ".digest"
    if stamp.exists() and stamp.read_text() == want:
        return False
    fresh = out.with_name(f"{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    validate = fresh / "validate.binpb"
    write_validate_descriptor(validate)
    run_protoc(
        root,
        validate,
        f"--python_out={fresh}",
        f"--mypy_out=quiet:{fresh}",
        f"--grpc_python_out={fresh}",
        f"--mypy_grpc_out=quiet:{fresh}",
        "buf/validate/validate.proto",
    )
    write_image(root, fresh / IMAGE, validate)
    for folder in (fresh / "llmos").rglob("*"):
        if folder.is_dir() and any(folder.glob("*_pb2.py")):
            (folder / "py.typed").touch()
    (fresh / ".digest").write_text(want)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return True


def write_image(root: Path, image: Path, validate: Path) -> None:
    run_protoc(root, validate, f"--descriptor_set_out={image}", "--include_imports", "--include_source_info")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the folder that holds llmos/ (default: this one)"
    )
    parser.add_argument("--image", type=Path, help="write only the descriptor image, here")
    args = parser.parse_args()
    if args.image:
        args.image.parent.mkdir(parents=True, exist_ok=True)
        validate = args.image.with_suffix(".validate")
        write_validate_descriptor(validate)
        write_image(args.root, args.image, validate)
        validate.unlink()
        return
    made = generate(args.root, ROOT / "gen")
    print("protos: generated into protos/gen" if made else "protos: up to date")


if __name__ == "__main__":
    main()
