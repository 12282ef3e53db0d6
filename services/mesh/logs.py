"""Log lines: one JSON object a line (or text for people), each with request and trace id."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from services.mesh import context
from services.mesh.settings import ServiceSettings

MAX_MESSAGE_CHARACTERS = 8_192


class _Json(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage()[:MAX_MESSAGE_CHARACTERS],
        }
        request = context.current()
        if request is not None:
            line["request_id"] = request.request_id
            if request.trace_id:
                line["trace_id"] = request.trace_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-MAX_MESSAGE_CHARACTERS:]
        return json.dumps(line, ensure_ascii=False)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s%(request)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        request = context.current()
        record.request = f" [{request.request_id}]" if request else ""
        return super().format(record)


def configure(settings: ServiceSettings) -> None:
    """Sends all logging of the process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(settings.service) if settings.log_format == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for noisy in ("aiokafka", "kafka", "grpc", "asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(max(root.level, logging.WARNING))
