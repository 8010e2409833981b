"""What a request is known by: its id, and the trace that it belongs to."""

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, replace

# HTTP header and gRPC metadata, read from requests and set on answers.
REQUEST_ID = "x-request-id"
# HTTP header and gRPC metadata of W3C Trace Context.
TRACEPARENT = "traceparent"

# Methods of any protocol that are asked for an answer. The others are probes and metadata.
INFERENCE = frozenset({"predict", "infer", "explain"})

# What can stand in a log, a header and a shell without quotes.
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Version, trace, parent and flags, of which none may be a certain value. A version after 00 may
# have more behind them.
_TRACE = re.compile(
    r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a request is known by.

    Attributes:
        request_id: the client's own where it sent a sane one, else a fresh one.
        trace_id: 32 hexadecimal digits; empty where the request belongs to no trace.
    """

    request_id: str
    trace_id: str


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


def enter(request_id: str, traceparent: str) -> RequestContext:
    """Make a request the one that this task works on.

    Args:
        request_id: what the client calls it; letters, digits, `.`, `_` and `-`, at most 128, or it
            is not used.
        traceparent: the client's header, used where it is valid.
    """
    trace = _TRACE.fullmatch(traceparent)
    context = RequestContext(
        request_id if _SANE_ID.fullmatch(request_id) else str(uuid.uuid4()),
        trace[1] if trace else "",
    )
    _current.set(context)
    return context


def join(trace_id: str) -> None:
    """Say to which trace the request that this task works on belongs."""
    entered = _current.get()
    if entered is not None:
        _current.set(replace(entered, trace_id=trace_id))


def current() -> RequestContext | None:
    """The request that this task works on, if it works on one."""
    return _current.get()
