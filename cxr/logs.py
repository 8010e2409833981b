"""Log lines of a serving process: as text or as JSON, with the request that a line belongs to."""

import logging
from enum import StrEnum
from typing import Any

from cxr import context


class LogFormat(StrEnum):
    """What a line of the log looks like."""

    TEXT = "text"
    JSON = "json"


def configure(log_format: LogFormat) -> None:
    """Log to standard error.

    Args:
        log_format: of a line.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_add_context)
    handler.setFormatter(_json() if log_format is LogFormat.JSON else _Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    # No line says where in the code, in which thread or which process it was made; looking for
    # that is half of what a line costs. Python's "Logging HOWTO" names these switches.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def _add_context(record: logging.LogRecord) -> bool:
    """A filter that drops nothing: it runs where the record is made, in the request's own task."""
    request = context.current()
    if request is not None:
        record.request_id = request.request_id
        if request.trace_id:
            record.trace_id = request.trace_id
    return True


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the request's names behind it."""
        names = ("request_id", "trace_id")
        known = [f" {name}={getattr(record, name)}" for name in names if hasattr(record, name)]
        return "".join((super().format(record), *known))


def _json() -> logging.Formatter:
    from pythonjsonlogger.orjson import OrjsonFormatter  # noqa: PLC0415 - only where it is wanted

    fields: dict[str, Any] = {"levelname": "level", "name": "logger", "message": "message"}
    return OrjsonFormatter(list(fields), rename_fields=fields, timestamp="time")
