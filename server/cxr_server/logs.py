"""Logs: as text or as JSON, with the request that a line belongs to, and a line per inference."""

import logging
from typing import Any

from pythonjsonlogger.orjson import OrjsonFormatter

from cxr import context
from cxr_server.settings import LogFormat

_access = logging.getLogger("cxr_server.access")


def configure(log_format: LogFormat, *, access: bool) -> None:
    """Log to standard error.

    Args:
        log_format: of a line.
        access: whether each request for an answer gets one.
    """
    handler = logging.StreamHandler()
    handler.addFilter(_add_context)
    handler.setFormatter(_json() if log_format is LogFormat.JSON else _Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    _access.disabled = not access


def log_access(protocol: str, method: str, code: str, seconds: float) -> None:
    """Log that a request has its answer; other methods than those that ask for one are left out.

    Args:
        protocol: as the metrics name it.
        method: as the metrics name it.
        code: HTTP status, or the name of the gRPC one.
        seconds: that the answer took.
    """
    if method in context.INFERENCE:
        _access.info(
            "%s %s %s %.1f ms",
            protocol,
            method,
            code,
            1000 * seconds,
            extra={
                "protocol": protocol,
                "method": method,
                "code": code,
                "duration_seconds": round(seconds, 6),
            },
        )


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
    fields: dict[str, Any] = {"levelname": "level", "name": "logger", "message": "message"}
    return OrjsonFormatter(list(fields), rename_fields=fields, timestamp="time")
