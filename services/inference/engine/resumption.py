"""What every backend asks of a request that goes on where another replica was lost."""

from __future__ import annotations

from services.inference.engine.port import GenerationRequest
from services.mesh.errors import RequestInvalid, Violation


def check_delivered(request: GenerationRequest) -> None:
    """Raises RequestInvalid. A choice may be complete already: another of the request may not be."""
    delivered = request.delivered
    if not delivered:
        return
    what = ""
    if len(delivered) != request.n:
        what = f"{len(delivered)} entries for {request.n} choices"
    elif request.max_tokens is not None and max(map(len, delivered)) > request.max_tokens:
        what = f"a choice has more tokens than max_tokens, {request.max_tokens}"
    if what:
        raise RequestInvalid(f"`delivered`: {what}.", violations=[Violation("delivered", what)])
