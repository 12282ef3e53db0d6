"""What the spool's files are made of: frames, one after another.

A frame is the length of its payload and the CRC-32 of that (little-endian, four bytes each), and the payload:
one of the classes below, in msgpack. It is there as a whole or not at all: a reader stops where one is not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import msgspec
from msgspec import Struct

from services.mesh.broker import Topic

MAGIC = b"llmosSP3"
"""What a file begins with; the digit is the version of the format."""
MAX_GROUP_BYTES = 1 << 20
"""Of the events in one frame, if there are more than one: so much is read at once."""
_PREFIX = struct.Struct("<II")


class Damaged(ValueError):
    """These are no frames of ours."""


class Torn(Damaged):
    """There is no whole frame where one should be."""


class Gap(Struct, array_like=True):
    """What could not be written, and is not yet recorded as an event."""

    dropped: int = 0
    refused: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.dropped or self.refused)


class Append(Struct, frozen=True, array_like=True):
    """An event to be written. At most one of `intent_of` and `outcome_of` is set, to a request's id."""

    body: bytes
    time_s: float
    """When it happened, in seconds since 1970."""
    traceparent: str = ""
    intent_of: str = ""
    outcome_of: str = ""
    gap: Gap | None = None
    """What is left to be recorded, once this event is written."""
    topic: Topic = Topic.AUDIT


class Head(Struct, frozen=True, array_like=True, tag=1):
    """The first frame of a file: all that the files before it said, but for the events that they hold."""

    producer: str
    epoch: int
    gap: Gap
    trimmed: dict[int, int]
    """By epoch: up to this sequence events are forgotten, wherever they stand."""
    open: list[Append]
    """Intents without an outcome, in order."""


class Group(Struct, frozen=True, array_like=True, tag=2):
    """Events whose sequences follow each other."""

    epoch: int
    first: int
    """The sequence of the first one."""
    events: Sequence[Append]


class Trimmed(Struct, frozen=True, array_like=True, tag=3):
    """Events were forgotten."""

    limits: dict[int, int]
    """As in `Head`."""


class Begun(Struct, frozen=True, array_like=True, tag=4):
    """What comes is of this epoch; what is open stays open."""

    epoch: int


class Left(Struct, frozen=True, array_like=True, tag=5):
    """What is left to be recorded."""

    gap: Gap


Frame = Head | Group | Trimmed | Begun | Left
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    payload = _encoder.encode(frame)
    return _PREFIX.pack(len(payload), zlib.crc32(payload)) + payload


def grouped(epoch: int, first: int, events: Sequence[Append]) -> Iterator[Group]:
    """Events as frames that are not too large."""
    start = size = 0
    for at, event in enumerate(events):
        size += len(event.body)
        if size > MAX_GROUP_BYTES and at > start:
            yield Group(epoch, first + start, events[start:at])
            start, size = at, len(event.body)
    if start < len(events):
        yield Group(epoch, first + start, events[start:])


def read(file: BinaryIO, offset: int, end: int) -> Iterator[tuple[Frame, int]]:
    """The frames between two offsets, each with the offset after it.

    Raises Torn where one is not whole, Damaged, and OSError.
    """
    file.seek(offset)
    while offset < end:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise Torn(f"a frame ends early, at byte {offset:,}")
        length, checksum = _PREFIX.unpack(prefix)
        offset += _PREFIX.size + length
        if length == 0 or offset > end:
            raise Torn(f"a frame of {length:,} bytes, of which there are fewer, ends at byte {end:,}")
        payload = file.read(length)
        if len(payload) < length or zlib.crc32(payload) != checksum:
            raise Torn(f"the frame before byte {offset:,} is not what was written")
        try:
            frame = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            raise Damaged(f"the frame before byte {offset:,} is of another version") from error
        yield frame, offset
