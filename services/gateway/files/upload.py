"""Reads the form of an upload as it comes (RFC 7578): the file goes to the store while the rest is still on
its way. Fields may stand before the file or after it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser

from services.gateway.files.store import FileStore, Purpose, StoredFile, checked_filename
from services.gateway.openai.parsing import refuse
from services.mesh.errors import MessageTooLarge, RequestInvalid

MIN_TTL_S, MAX_TTL_S = 3600, 30 * 86400
MAX_FIELD_BYTES = 256
MAX_FIELDS = 8
FORM_MAX_BYTES = 64 * 1024
"""What a form may have beside the file."""
_BOUNDARY = re.compile(
    r'multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE
)
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


def boundary_of(content_type: str) -> str:
    """Empty where it is no such form."""
    found = _BOUNDARY.match(content_type)
    return (found.group(1) or found.group(2)) if found else ""


class Upload:
    """One form, read once."""

    def __init__(self, boundary: str, body: AsyncIterator[bytes], max_file_bytes: int) -> None:
        self._parser = PushMultipartParser(
            boundary, max_segment_size=max_file_bytes, max_segment_count=MAX_FIELDS
        )
        self._max_file_bytes = max_file_bytes
        self._body = body
        self._fields: dict[str, str] = {}
        self._events = self._read()

    async def store(self, files: FileStore, tenant_id: str) -> StoredFile:
        """Raises RequestInvalid, MessageTooLarge, what `FileStore.create` raises or the body does."""
        filename = await self._find_file()
        if filename is None:
            self._check()
            raise refuse("file", "is required")
        file_id = files.new_id(Purpose.BATCH)
        file = await files.create(tenant_id, file_id, filename, self._content())
        ttl_s = self._ttl_s()
        return file if ttl_s is None else await files.keep_for(tenant_id, file, ttl_s)

    async def _find_file(self) -> str | None:
        """Reads on to the file; None where there is none."""
        async for event in self._events:
            if isinstance(event, MultipartSegment) and event.name == "file":
                return checked_filename(event.filename or "")
            await self._field(event)
        return None

    async def _content(self) -> AsyncIterator[bytes]:
        """The file's content. Reads the form to its end, so that one that is wrong further on leaves no
        file."""
        async for event in self._events:
            if event is None:
                break
            if not isinstance(event, MultipartSegment):
                yield bytes(event)
        async for event in self._events:
            if isinstance(event, MultipartSegment) and event.name == "file":
                raise refuse("file", "must be given once")
            await self._field(event)
        self._check()

    async def _field(self, segment: MultipartSegment | bytes | bytearray | None) -> None:
        if not isinstance(segment, MultipartSegment):
            return
        value = bytearray()
        async for event in self._events:
            if event is None:
                break
            value += event
            if len(value) > MAX_FIELD_BYTES:
                raise refuse(segment.name, f"has more than {MAX_FIELD_BYTES} bytes")
        if segment.name not in _FIELDS:
            raise refuse(segment.name, "is not a known parameter")
        try:
            self._fields[segment.name] = value.decode()
        except UnicodeDecodeError:
            raise refuse(segment.name, "is not valid text") from None

    def _check(self) -> None:
        purpose = self._fields.get("purpose")
        if purpose is None:
            raise refuse("purpose", "is required")
        if purpose != Purpose.BATCH.word:
            raise refuse("purpose", "must be `batch`: this server keeps files for batches only")
        self._ttl_s()

    def _ttl_s(self) -> int | None:
        anchor = self._fields.get("expires_after[anchor]")
        seconds = self._fields.get("expires_after[seconds]")
        if anchor is None and seconds is None:
            return None
        if anchor != "created_at":
            raise refuse("expires_after.anchor", "must be `created_at`")
        if not re.fullmatch(r"[0-9]{1,9}", seconds or "") or not MIN_TTL_S <= int(seconds or 0) <= MAX_TTL_S:
            raise refuse("expires_after.seconds", f"must be a number from {MIN_TTL_S} to {MAX_TTL_S}")
        return int(seconds or 0)

    async def _read(self) -> AsyncIterator[MultipartSegment | bytes | bytearray | None]:
        try:
            async for part in self._body:
                for event in self._parser.parse(part):
                    yield event
            self._parser.close()
        except ParserLimitReached as error:
            if "segment size" in str(error):
                raise MessageTooLarge(f"A file may have {self._max_file_bytes} bytes.") from None
            raise RequestInvalid("The form has too many fields, or one whose head is too long.") from None
        except MultipartError as error:
            raise RequestInvalid(f"The body is not a valid form: {error}.") from None
