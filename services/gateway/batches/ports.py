"""What batches speak of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from msgspec import Struct

from services.gateway.batches.lines import InputError
from services.gateway.generation import Usage

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
BATCH_PREFIX, FINISHER_PREFIX = "batch_", "batchend_"
METHOD = "/llmos.gateway.v1.JobService/SubmitJobs"
"""What a batch does, for policy: it hands in jobs."""


@dataclass(frozen=True, slots=True)
class BatchWork:
    """What a job of kind BATCH holds."""

    input_file_id: str
    endpoint: str
    window_s: int
    line_key: bytes = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    source_address: str = ""
    output_ttl_s: int = 0
    """0: as files are kept."""
    finishes_batch_id: str = ""
    """Of a job that writes what there is of a cancelled batch."""


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What became of a batch."""

    output_file_id: str = ""
    error_file_id: str = ""
    input_errors: tuple[InputError, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    expired: bool = False
    in_progress_time: datetime | None = None
    finalizing_time: datetime | None = None
    usage: Usage = field(default_factory=Usage)


class Progress(Struct):
    """How far a batch has come: a note in the file store, so that another worker can go on."""

    total: int
    """Requests of the input."""
    in_progress_s: float
    submitted: int = 0
    """Lines that were gone through."""
    jobs: int = 0
    """Those of them that became jobs; the others are no valid requests."""
    line: int = 0
    """The number of the last of them."""
    offset: int = 0
    """Where the next one begins, in bytes."""
    finalizing_s: float = 0
    output_file_id: str = ""
    error_file_id: str = ""
