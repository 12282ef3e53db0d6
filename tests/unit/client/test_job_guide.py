"""What the guide tells a receiver of webhooks to do with a signature."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.gateway.jobs.working import webhooks

GUIDE = Path(__file__).resolve().parents[3] / "docs/jobs.md"
BODY = b'{"test": 2432232314}'
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"


@pytest.fixture(scope="module")
def is_genuine() -> Callable[..., bool]:
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "def is_genuine" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    found: Callable[..., bool] = names["is_genuine"]
    return found


def test_it_knows_the_example_of_the_standard(is_genuine: Callable[..., bool]) -> None:
    headers = {
        "webhook-id": ID,
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,AAAA v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    ever = time.time()
    assert is_genuine(SECRET, headers, BODY, tolerance_s=ever)
    assert not is_genuine(SECRET, headers, BODY + b" ", tolerance_s=ever)
    assert not is_genuine(SECRET, headers | {"webhook-id": "msg_other"}, BODY, tolerance_s=ever)
    assert not is_genuine("whsec_" + "AAAA" * 8, headers, BODY, tolerance_s=ever)
    assert not is_genuine(SECRET, headers, BODY), "it is years old"


def test_it_knows_what_a_gateway_signs(is_genuine: Callable[..., bool]) -> None:
    headers = webhooks.signature(SECRET, ID, datetime.now(UTC), BODY)
    assert is_genuine(SECRET, headers, BODY)
    assert not is_genuine(SECRET, headers, BODY[:-1])
