"""What the parts of the OpenAPI document have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

REFS = "#/components/schemas/{name}"


def reads(summary: str, name: str, answer: type) -> Json:
    return {
        "summary": summary,
        "operationId": name,
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {"application/json": {"schema": ref(answer)}},
            },
            **refs(400, 401, 403, 404, 405, 429, 431, 500, 503, 504),
        },
    }


def ref(kind: type) -> Json:
    return {"$ref": REFS.format(name=kind.__name__)}


def refs(*codes: int) -> Json:
    return {str(code): {"$ref": f"#/components/responses/{code}"} for code in codes}


def headers(texts: Mapping[str, str]) -> Json:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in texts.items()}
