"""Logs: a line per request for an answer, beside what `cxr.logs` does."""

import logging

import cxr.logs
from cxr import context
from cxr.logs import LogFormat

_access = logging.getLogger("cxr_server.access")


def configure(log_format: LogFormat, *, access: bool) -> None:
    """Log to standard error.

    Args:
        log_format: of a line.
        access: whether each request for an answer gets one.
    """
    cxr.logs.configure(log_format)
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
