"""Which requests have one answer, and the name of that answer."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec.structs import replace

from services.gateway.generation import ValidGeneration

FORMAT = 1
"""One more whenever the same request would be written differently, or answered differently by the gateway."""

_encoder = msgspec.msgpack.Encoder()


def has_one_answer(request: ValidGeneration) -> bool:
    """Greedy, or with a seed of the caller's own. A temperature that is left to the model is not known to be
    0, and a seed that the gateway assigned is another one each time."""
    sampling = request.sampling
    return not sampling.seed_is_assigned or sampling.temperature == 0


def answer_key(tenant_id: str, request: ValidGeneration) -> bytes:
    """SHA-256 over the tenant and everything in the request that reaches an engine.

    The request is written out whole, with lengths and types, so a field that is added to it counts by itself.
    What cannot change the answer is taken out by name: a seed that was assigned (the request is greedy
    then), the end user, the labels, and whether it is a
    job.
    """
    sampling = request.sampling
    if sampling.seed_is_assigned:
        sampling = replace(sampling, seed=0)
    if sampling is not request.sampling or request.end_user or request.labels or request.is_job:
        request = replace(request, sampling=sampling, end_user="", labels={}, is_job=False)
    return hashlib.sha256(_encoder.encode((FORMAT, tenant_id, request))).digest()
