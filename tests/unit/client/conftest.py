"""A scripted gateway, and each client in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.framework.both_clients import Both, Connect
from tests.framework.scripted_gateway import ScriptedGateway


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
async def connect(request: pytest.FixtureRequest, gateway: ScriptedGateway) -> AsyncIterator[Connect]:
    opened: list[Both] = []

    def make(target: str | None = None, **options: Any) -> Both:
        opened.append(Both(request.param, target or gateway.target, **options))
        return opened[-1]

    yield make
    for both in opened:
        await both.close()


@pytest.fixture
def both(connect: Connect) -> Both:
    return connect()
