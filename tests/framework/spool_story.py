"""What a spool holds, as a story that a test can compare."""

from __future__ import annotations

from llmos.events.v1 import events_pb2

from services.mesh import event_codec
from services.mesh.audit_protocol import START, Place
from services.mesh.event_codec import IntentRead, OtherRead, OutcomeRead
from services.mesh.events import Outcome
from services.mesh.spool import Spool


async def events(spool: Spool) -> list[event_codec.EventRead]:
    """All that the spool holds, as it would be published."""
    held = await spool.read_after(START, 100_000, 1 << 30)
    return [
        event_codec.read(
            event_codec.complete(
                each.body, spool.producer, each.place, spool.ledger.floor(each.place.epoch), each.outcome_of
            )
        )
        for each in held
    ]


def story(found: list[event_codec.EventRead]) -> list[tuple[Place, str]]:
    """Places, and what happened there."""
    told = []
    for event in found:
        match event.record:
            case IntentRead(request_id=request_id):
                told.append((event.place, f"{request_id} started"))
            case OutcomeRead(request_id=request_id, outcome=outcome):
                told.append((event.place, f"{request_id} {Outcome(outcome).name}"))
            case OtherRead(kind=kind):
                told.append((event.place, kind))
    return told


def gaps(found: list[event_codec.EventRead]) -> list[tuple[int, int]]:
    """(dropped, refused) of each gap record."""
    others = [event.record for event in found if isinstance(event.record, OtherRead)]
    records = [events_pb2.AuditRecorded.FromString(other.body) for other in others if other.kind == "gap"]
    return [(record.gap.dropped, record.gap.refused) for record in records]
