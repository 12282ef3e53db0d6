#!/bin/sh
# Generates the code of the API and builds the example into bin/llmos-stream.
# PYTHON names a Python that has grpcio-tools and protovalidate; otherwise the project's own.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-../../../.venv/bin/python}
command -v go >/dev/null || { echo "The Go example needs Go 1.26 or newer on PATH." >&2; exit 2; }
command -v "$python" >/dev/null || { echo "There is no $python: run \`make proto\` first." >&2; exit 2; }
mkdir -p bin
GOBIN=$PWD/bin go install tool
"$python" generate.py bin
go build -o bin/llmos-stream .
