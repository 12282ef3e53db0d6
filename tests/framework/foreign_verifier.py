"""A verifier of access tokens in another language (Go), which is told no more than where the keys are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from deploy.dev.environment import ROOT

SOURCE = ROOT / "tests" / "e2e" / "oauth" / "verifier"
BUILD_TIMEOUT_S = 240.0
RUN_TIMEOUT_S = 60.0


class GoUnavailable(Exception):
    """Says in a sentence what is missing; a reason to skip."""


def built() -> Path:
    """The verifier, built once for each state of its source.

    Raises GoUnavailable where there is no Go, or its modules cannot be had.
    """
    if shutil.which("go") is None:
        raise GoUnavailable("go is not on PATH.")
    content = b"".join((SOURCE / name).read_bytes() for name in ("go.mod", "go.sum", "main.go"))
    folder = ROOT / ".tools" / "go"
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / f"verifier-{hashlib.sha256(content).hexdigest()[:12]}"
    if not binary.exists():
        fresh = binary.with_suffix(f".{os.getpid()}")
        command = ["go", "build", "-mod=readonly", "-o", str(fresh), "."]
        try:
            subprocess.run(command, cwd=SOURCE, capture_output=True, timeout=BUILD_TIMEOUT_S, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            raise GoUnavailable(f"The verifier in Go cannot be built ({type(error).__name__}).") from None
        fresh.rename(binary)
    return binary


def verdicts(tokens: Sequence[str], *, jwks_url: str, issuer: str, audience: str) -> list[str]:
    """`accepted SUBJECT` or `refused WHY`, for each token."""
    text = "".join(json.dumps(token) + "\n" for token in tokens)
    ran = subprocess.run(
        [built(), jwks_url, issuer, audience],
        input=text,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=True,
    )
    return ran.stdout.splitlines()


@contextmanager
def serving_jwks(jwks_json: str) -> Iterator[str]:
    """The URL of a JWK Set."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(jwks_json.encode())

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/jwks"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
