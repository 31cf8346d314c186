"""Structured logs: one JSON object a line on stderr."""

from __future__ import annotations

import datetime
import logging
import sys
from typing import Any

import orjson

_logger = logging.getLogger("skimtvm.serve")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.name != _logger.name:
            entry["logger"] = record.name
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(entry, default=str).decode()


def configure(level: str) -> None:
    """Send this package's, uvicorn's and asyncio's records of ``level`` and above to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its life cycle is logged here, with the address; what a client did wrong is that client's answer.
    logging.getLogger("uvicorn.error").setLevel(max(logging.ERROR, logging.getLevelName(level.upper())))


def log(event: str, *, level: int = logging.INFO, exc_info: BaseException | None = None, **fields: Any) -> None:
    """One record; ``fields`` become members of the object."""
    _logger.log(level, event, extra={"fields": fields}, exc_info=exc_info)
