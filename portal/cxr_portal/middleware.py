"""What goes round every request: its id and trace, limits, headers, metrics and the access log."""

import asyncio
import logging
import time
import traceback
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxr import context
from cxr_portal.metrics import Metrics
from cxr_portal.model import Caller
from cxr_portal.problems import ProblemError, busy
from cxr_portal.settings import Settings

if TYPE_CHECKING:
    from cxr_portal.tracing import Tracing

log = logging.getLogger(__name__)
_access = logging.getLogger("cxr_portal.access")

_TRACESTATE = "tracestate"
_LONGEST_TRACESTATE = 512
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_METHODS = (*_SAFE_METHODS, "POST", "DELETE")
_JOBS = "/v1/jobs"
# Everything that the page needs comes from here; `blob:` is the pictures that it makes itself.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_HSTS = "max-age=31536000"


class RequestMiddleware:
    """The outermost layer. Nothing of a request's content or path reaches a log or metric."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, metrics: Metrics, tracing: "Tracing | None"
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        # Bytes of the bodies of requests in progress.
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; anything else is passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        entered = context.enter(
            headers.get(context.REQUEST_ID, ""), headers.get(context.TRACEPARENT, "")
        )
        trace = _trace(headers, known=bool(entered.trace_id))
        if self._tracing is None:
            await self._handle(scope, receive, send, trace)
            return
        with self._tracing.request(_method(scope), trace) as span:
            status = await self._handle(scope, receive, send, trace)
            span.end(_route(scope), status)

    async def _handle(
        self, scope: Scope, receive: Receive, send: Send, trace: dict[str, str]
    ) -> int:
        entered = context.current()
        assert entered is not None  # noqa: S101 - entered above
        caller = Caller(request_id=entered.request_id, trace=trace)
        scope.setdefault("state", {})["caller"] = caller
        status = 0
        start = time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _finish_headers(scope, message, entered.request_id)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._limited(scope, receive), answer)
        except ProblemError as problem:
            await problem.response()(scope, receive, answer)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:
            # Not its text, which might quote the request.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("%s: unexpected %s at\n%s", _route(scope), type(error).__name__, where)
            if not status:
                failure = ProblemError(
                    HTTPStatus.INTERNAL_SERVER_ERROR,
                    "failed",
                    "The gateway failed; try again later.",
                )
                await failure.response()(scope, receive, answer)
        finally:
            self._held -= scope["state"].pop("received", 0)
            self._count(scope, status, time.perf_counter() - start)
        return status

    def _check(self, scope: Scope) -> None:
        """Refuse what should not even be looked at."""
        headers = Headers(scope=scope)
        allowed = self._settings.allowed_hosts
        host = headers.get("host", "")
        if allowed and (_split(f"//{host}").hostname or "") not in allowed:
            raise ProblemError(
                HTTPStatus.MISDIRECTED_REQUEST, "wrong-host", "There is no such host here."
            )
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in _SAFE_METHODS:
            own = bool(host) and _split(origin).netloc == host
            if not own and origin not in self._settings.cors_origins:
                raise ProblemError(
                    HTTPStatus.FORBIDDEN, "wrong-origin", "Other web pages may not call this one."
                )
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:18]) > self._limit(scope):
            raise self._too_large(scope)

    def _limit(self, scope: Scope) -> int:
        jobs = scope["path"] == _JOBS
        return self._settings.max_job_bytes if jobs else self._settings.max_request_bytes

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """The same, up to as many bytes as a body, and all bodies together, may have.

        And without the pauses of one that never arrives, which would hold what others need.
        """
        scope["state"]["received"] = 0
        whole = False

        async def limited() -> Message:
            nonlocal whole
            try:
                async with asyncio.timeout(None if whole else self._settings.timeout):
                    message = await receive()
            except TimeoutError:
                raise ProblemError(
                    HTTPStatus.REQUEST_TIMEOUT,
                    "too-slow",
                    f"Nothing of the request came for {self._settings.timeout:g} s.",
                    headers={"Connection": "close"},
                ) from None
            whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            scope["state"]["received"] += size
            self._held += size
            if scope["state"]["received"] > self._limit(scope):
                raise self._too_large(scope)
            if self._held > self._settings.max_held_bytes:
                raise busy(close=True)
            return message

        return limited

    def _too_large(self, scope: Scope) -> ProblemError:
        return ProblemError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "too-large",
            f"The request has more than {self._limit(scope)} bytes, the limit.",
            headers={"Connection": "close"},
        )

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        known, route = _method(scope), _route(scope)
        code = str(status) if status else "gone"
        self._metrics.requests.labels(known, route, code).inc()
        if not route.endswith("/events"):
            self._metrics.duration.labels(known, route).observe(seconds)
        if route.startswith("/v1/"):
            _access.info(
                "%s %s %s %.1f ms",
                known,
                route,
                code,
                1000 * seconds,
                extra={
                    "method": known,
                    "route": route,
                    "code": code,
                    "duration_seconds": round(seconds, 6),
                },
            )


def _split(url: str) -> SplitResult:
    """The parts of a URL; none of what is no URL."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _method(scope: Scope) -> str:
    """The method, if it is one that routes have."""
    method: str = scope["method"]
    return method if method in _METHODS else "other"


def _route(scope: Scope) -> str:
    """The route's template, never the path."""
    return str(getattr(scope.get("route"), "path", "") or "other")


def _trace(headers: Headers, *, known: bool) -> dict[str, str]:
    """The client's W3C trace context, where it is valid."""
    if not known:
        return {}
    trace = {context.TRACEPARENT: headers[context.TRACEPARENT]}
    state = headers.get(_TRACESTATE, "")
    if state and len(state) <= _LONGEST_TRACESTATE and state.isascii() and state.isprintable():
        trace[_TRACESTATE] = state
    return trace


def _finish_headers(scope: Scope, message: Message, request_id: str) -> None:
    headers = MutableHeaders(scope=message)
    headers[context.REQUEST_ID] = request_id
    for name, value in SECURITY_HEADERS.items():
        headers[name] = value
    if scope.get("scheme") == "https":
        headers["strict-transport-security"] = _HSTS
    headers.setdefault("cache-control", "no-store")
