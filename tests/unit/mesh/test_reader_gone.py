"""A reader who leaves while grpc writes to it: grpc may say so before it cancels the call."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from services.mesh.context import RequestContext
from services.mesh.errors import Cancelled, Overloaded
from services.mesh.interceptors import Call
from services.mesh.server import _abort
from services.mesh.stalling import writing


class Gone:
    """grpc's context of a call whose reader has left."""

    async def write(self, response: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


async def test_it_is_its_leaving_and_no_fault_of_ours() -> None:
    with pytest.raises(Cancelled):
        async with writing(Gone(), timeout_s=10) as write:
            await write(b"token")


async def test_it_is_not_told_the_status() -> None:
    call = Call(RequestContext("req_1", "/llmos.Test/Stream"), {}, None)
    with pytest.raises(asyncio.CancelledError):
        await _abort(Gone(), Overloaded("Too much."), call)
