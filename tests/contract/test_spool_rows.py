"""Events that are written in groups are what they are one by one."""

from __future__ import annotations

import sqlite3
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from services.mesh.audit_protocol import START, Place
from services.mesh.spool_file import Append, SpoolFile
from services.mesh.spool_rows import MAX_ROWS

NOW = datetime(2030, 1, 1, tzinfo=UTC)
EVENTS = st.lists(
    st.tuples(st.sampled_from(["intent", "outcome", "other"]), st.integers(0, 25)), max_size=3 * MAX_ROWS
)


def written(path: Path, groups: list[list[Append]]) -> tuple[list[Place | None], list[object], list[object]]:
    """The places, what is in the file, and which requests are open."""
    file = SpoolFile(path, source="test", instance="test", durable=False)
    file.open(NOW)
    places = [place for group in groups for place in file.append(group)]
    held: list[object] = list(file.read_after(START, 1_000, 1 << 20))
    file.close()
    with sqlite3.connect(path) as db:
        opened = db.execute("SELECT * FROM open_intents ORDER BY request_id").fetchall()
    return places, held, opened


@given(events=EVENTS, size=st.integers(1, 3 * MAX_ROWS))
@settings(max_examples=60, deadline=None)
def test_a_group_is_what_its_events_are_alone(events: list[tuple[str, int]], size: int) -> None:
    appends: list[Append] = []
    begun: set[int] = set()
    ended: set[int] = set()
    for number, (kind, request) in enumerate(events):
        body, name = f"body {number}".encode(), f"req_{request}"
        if kind == "intent" and request not in begun | ended:
            begun.add(request)
            appends.append(Append(body, float(number), intent_of=name))
        elif kind == "outcome":
            ended.add(request)
            appends.append(Append(body, float(number), outcome_of=name))
        else:
            appends.append(Append(body, float(number)))
    with tempfile.TemporaryDirectory() as folder:
        alone = written(Path(folder) / "alone.db", [[each] for each in appends])
        groups = [appends[start : start + size] for start in range(0, len(appends), size)]
        together = written(Path(folder) / "together.db", groups)
    assert together == alone
