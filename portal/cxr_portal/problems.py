"""Errors as `application/problem+json` (RFC 9457)."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

from cxr.context import current

MEDIA_TYPE = "application/problem+json"
_PREFIX = "urn:cxr:problem:"


class ProblemError(Exception):
    """A request that gets no answer.

    Attributes:
        status: the HTTP status.
        kind: what is wrong, in a stable word for programs.
        headers: of the answer.
        extra: further members of the body.

    The message is one sentence for the caller. It never quotes the request.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.headers = headers or {}
        self.extra = extra

    def response(self) -> Response:
        """The answer."""
        request = current()
        body = {
            "type": _PREFIX + self.kind,
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": str(self),
            "request_id": request.request_id if request else "",
        }
        return JSONResponse(
            body | self.extra, self.status, headers=dict(self.headers), media_type=MEDIA_TYPE
        )


def busy(*, close: bool = False) -> ProblemError:
    """503: too much is asked for at once.

    Args:
        close: the connection, where the rest of the request is left unread.
    """
    problem = unavailable("busy", "The gateway is busy; try again later.")
    if close:
        problem.headers = {**problem.headers, "Connection": "close"}
    return problem


def unavailable(kind: str, detail: str, retry_after: float = 1.0) -> ProblemError:
    """503: the same request may succeed later."""
    headers = {"Retry-After": str(max(1, round(retry_after)))}
    return ProblemError(HTTPStatus.SERVICE_UNAVAILABLE, kind, detail, headers=headers)
