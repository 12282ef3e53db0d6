"""Generates the Go code of the public API into gen/, with the protoc of grpcio-tools.

Run by build.sh with the project's Python. The protos say nothing about Go; the `M` options give each file its
import path. protovalidate's own types come as a Go module.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate.validate_pb import FieldRules

HERE = Path(__file__).resolve().parent
PROTOS = HERE.parents[2] / "protos"
MODULE = "llmos-example"
VALIDATE = "buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
PACKAGES = ("llmos/common/v1", "llmos/gateway/v1")


def main() -> None:
    plugins = Path(sys.argv[1])
    sources = [
        str(path.relative_to(PROTOS)) for package in PACKAGES for path in (PROTOS / package).glob("*.proto")
    ]
    mappings = [f"Mbuf/validate/validate.proto={VALIDATE}"]
    mappings += [f"M{source}={MODULE}/gen/{Path(source).parent}" for source in sources]
    options = ",".join([f"module={MODULE}", *mappings])
    shutil.rmtree(HERE / "gen", ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        validate = Path(scratch) / "validate.binpb"
        file = descriptor_pb2.FileDescriptorProto.FromString(FieldRules.desc().file.proto.to_binary())
        validate.write_bytes(descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString())
        code = protoc.main(
            [
                "protoc",
                f"--descriptor_set_in={validate}",
                f"-I{PROTOS}",
                f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
                f"--plugin=protoc-gen-go={plugins / 'protoc-gen-go'}",
                f"--plugin=protoc-gen-go-grpc={plugins / 'protoc-gen-go-grpc'}",
                f"--go_out={HERE}",
                f"--go_opt={options}",
                f"--go-grpc_out={HERE}",
                f"--go-grpc_opt={options}",
                *sources,
            ]
        )
    sys.exit(code)


if __name__ == "__main__":
    main()
