"""The OpenAPI document that the HTTP edge serves is valid, whole and true; who follows it breaks nothing."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from services.gateway import http_errors
from services.gateway.openai.document import EXAMPLES
from services.mesh import errors
from tests.framework.access_matrix import ROUTES
from tests.framework.gateway_fakes import MODEL, Bench, FakeReplica
from tests.framework.gateway_http import KEY, serving

MINUTES = float(os.environ.get("LLMOS_FUZZ_MINUTES", "0"))
SHORT_S = 12
AUTH = {"authorization": f"Bearer {KEY}"}
EXCLUDED = (
    # The document cannot say all that the rules do: whether a model exists, and how parameters go together.
    "positive_data_acceptance",
)


async def served(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{url}/openapi.json")
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()
    return found


async def test_it_is_valid_and_names_every_route() -> None:
    async with serving(Bench([FakeReplica()])) as http:
        document = await served(http.url)
    schemathesis.openapi.from_dict(document).validate()
    named = {
        (method.upper(), path.replace("{id}", "none"))
        for path, item in document["paths"].items()
        for method in item.keys() - {"parameters"}
    }
    # OAuth2's routes are described by their own metadata (RFC 8414).
    assert named == {route for route in ROUTES if "oauth" not in route[1]}


def test_a_broken_one_would_be_found() -> None:
    with pytest.raises(Exception, match="required"):
        schemathesis.openapi.from_dict({"openapi": "3.1.0", "paths": {}, "info": {}}).validate()


async def test_its_examples_are_answered() -> None:
    bench = Bench([FakeReplica()])
    sent = 0
    async with serving(bench) as http, httpx.AsyncClient(headers=AUTH) as client:
        document = await served(http.url)
        for path, item in document["paths"].items():
            content = item.get("post", {}).get("requestBody", {}).get("content", {})
            for example in content.get("application/json", {}).get("examples", {}).values():
                body = example["value"] | {"model": MODEL.id, "n": example["value"].get("n")}
                if path == "/v1/responses" or body["n"] is None:
                    del body["n"]
                else:
                    body["n"] = 1  # as the fake answers
                response = await client.post(http.url + path, json=body)
                assert response.status_code == 200, response.text
                sent += 1
    assert sent == sum(map(len, EXAMPLES.values()))


async def test_every_error_has_a_documented_status() -> None:
    async with serving(Bench([FakeReplica()])) as http:
        document = await served(http.url)
    documented = set(document["paths"]["/v1/chat/completions"]["post"]["responses"])
    for cls in errors.leaves():
        assert str(http_errors.status(cls("x"))) in documented, cls


async def test_r34_schemathesis_finds_no_fault(tmp_path: Path) -> None:
    """No 5xx, no INTERNAL, and each answer as it is documented. `LLMOS_FUZZ_MINUTES` makes it long."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    bench = Bench([FakeReplica()])
    limit_s = MINUTES * 60 or SHORT_S
    async with serving(bench) as http:
        await http.health.started()
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{http.url}/openapi.json"),
            # A deadline that has passed is a 504, as is the method that is not there yet a 501.
            *("--header", "x-request-timeout-ms: 60000", "--exclude-path", "/v1/embeddings"),
            *("--header", f"Authorization: Bearer {KEY}", "--seed", str(seed), "--no-color"),
            *("--exclude-checks", ",".join(EXCLUDED), "--phases", "examples,coverage,fuzzing"),
            *("--max-time", str(int(limit_s)), "--generation-database", "none", "--warnings", "off"),
            *(("--max-examples", "100000") if MINUTES else ("--no-shrink",)),
        ]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path
        )
        said, _ = await asyncio.wait_for(process.communicate(), limit_s + 120)
    assert process.returncode == 0, said.decode()
    reasons = {event.error_reason for event in bench.audit.ended}
    assert "REQUEST_INVALID" in reasons
    assert not reasons & {"INTERNAL", "DATA_CORRUPT", "ENGINE_FAULT"}
    print(f"{len(bench.audit.ended)} requests")
