"""Files and batches in the edge's OpenAPI document."""

from __future__ import annotations

from services.gateway.batches.answers import BatchList, BatchObject
from services.gateway.batches.http import MAX_PAGE as MAX_BATCHES
from services.gateway.batches.http import BatchRequest
from services.gateway.batches.ports import ENDPOINTS
from services.gateway.files.http import MAX_PAGE as MAX_FILES
from services.gateway.files.http import FileDeleted, FileList, FileObject
from services.gateway.files.store import Purpose
from services.gateway.files.upload import MAX_TTL_S, MIN_TTL_S
from services.gateway.openai.document_parts import Json, reads, ref, refs

TYPES = (FileObject, FileList, FileDeleted, BatchRequest, BatchObject, BatchList)
_ID: Json = {"parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]}
_WRITES = (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 431, 499, 500, 503, 504)


def paths() -> Json:
    """By path."""
    return {
        "/v1/files": {
            "post": _uploads(),
            "get": reads("Lists files, the newest first.", "list_files", FileList)
            | _asks(
                _query("after", {"type": "string"}),
                _query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_FILES}),
                _query("order", {"type": "string", "enum": ["asc", "desc"]}),
                _query("purpose", {"type": "string"}),
            ),
        },
        "/v1/files/{id}": _ID
        | {
            "get": _kept(reads("Describes a file.", "get_file", FileObject)),
            "delete": _kept(reads("Deletes a file.", "delete_file", FileDeleted)),
        },
        "/v1/files/{id}/content": _ID | {"get": _downloads()},
        "/v1/batches": {
            "post": _creates(),
            "get": _kept(reads("Lists batches, the newest first.", "list_batches", BatchList))
            | _asks(
                _query("after", {"type": "string"}),
                _query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_BATCHES}),
            ),
        },
        "/v1/batches/{id}": _ID | {"get": _kept(reads("Describes a batch.", "get_batch", BatchObject))},
        "/v1/batches/{id}/cancel": _ID
        | {"post": _writes("Ends a batch; what is done of it is kept.", "cancel_batch", BatchObject)},
    }


def _uploads() -> Json:
    fields = {
        # Bytes have no type (OpenAPI 3.1): a part that looks like a number is as good as any.
        "file": {"contentMediaType": "application/octet-stream"},
        "purpose": {"type": "string", "enum": [Purpose.BATCH.word]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_TTL_S, "maximum": MAX_TTL_S},
    }
    form: Json = {
        "type": "object",
        "properties": fields,
        "required": ["file", "purpose"],
        "additionalProperties": False,
    }
    body = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    return _writes("Keeps a file.", "create_file", FileObject) | {"requestBody": body}


def _creates() -> Json:
    example = {
        "input_file_id": "file-0000",
        "endpoint": ENDPOINTS[0],
        "completion_window": "24h",
        "metadata": {"team": "blue"},
    }
    content = {"application/json": {"schema": ref(BatchRequest), "x-example": example}}
    body = {"required": True, "content": content}
    return _writes("Runs a file of requests.", "create_batch", BatchObject) | {"requestBody": body}


def _downloads() -> Json:
    content = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    found = _kept(reads("What a file holds.", "get_file_content", FileObject))
    found["responses"]["200"] = {"description": "The bytes.", "content": content}
    return found


def _writes(summary: str, name: str, answer: type) -> Json:
    found = reads(summary, name, answer)
    found["responses"] |= refs(*_WRITES)
    return found


def _kept(operation: Json) -> Json:
    """Without a store of files or a key there is none: 422."""
    operation["responses"] |= refs(422)
    return operation


def _asks(*parameters: Json) -> Json:
    return {"parameters": list(parameters)}


def _query(name: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "schema": schema}
