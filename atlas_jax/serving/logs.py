"""The server's log: one JSON object a line on stderr."""

import datetime
import json
import logging
import traceback
from typing import Any

LOG = logging.getLogger("atlas_jax.serving")


class JsonLines(logging.Formatter):
    """Formats a record as a line of JSON; fields given by `event` are fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def event(name: str, level: int = logging.INFO, exc_info: Any = None, **fields: Any) -> None:
    """Write one line about what happened."""
    LOG.log(level, name, exc_info=exc_info, extra={"fields": fields})


def failed(request_id: str, error: BaseException) -> None:
    """Write about a fault of ours, with its traceback."""
    event("failed", logging.ERROR, error, id=request_id)


def start_logging() -> None:
    """Write this package's log and the HTTP server's warnings to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in (("atlas_jax.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
