"""What protects does not hang on `assert`, which `python -O` leaves out; pytest keeps the tests' own.

`make test-optimised` runs all of these rows so, with the services; this is the part that starts no process.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = (
    *(f"tests/unit/auth/test_{name}.py" for name in ("access", "authority", "exchange", "token_exchange")),
    *("tests/unit/gateway/test_keys.py", "tests/unit/mesh/test_revocation.py", "tests/unit/test_tokens.py"),
)


def test_the_security_rows_hold_under_python_o() -> None:
    rows = re.search(r"^SECURITY_ROWS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rows is not None
    options = ("-q", "-p", "no:cacheprovider", "-k", rows[1])
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pytest", *options, *PARTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 400
