"""HTTP/1.1 for the REST endpoints: Uvicorn's, but an answer leaves in one piece.

And a request can learn at once that its client has left, without a task that waits for it.
"""

import asyncio
import re
from collections.abc import Callable, MutableMapping
from enum import Enum, auto
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Where a request's scope has what to call when its client leaves.
_LEAVING = "cxr.leaving"
_UPGRADE = re.compile(rb"(?<=\n)upgrade(?=[ \t]*:)", re.IGNORECASE)


def on_leaving(scope: MutableMapping[str, Any], call: Callable[[], None] | None) -> None:
    """Have something called when the client of this request leaves; None takes it back."""
    scope[_LEAVING] = call


class _Gathering:
    """A transport that writes once per turn of the event loop.

    Uvicorn writes the head and the body of an answer one after the other, and uvloop sends each at
    once: two system calls, two packets, and a client that is woken twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send these bytes by the end of this turn."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Send what is left, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))


class _Part(Enum):
    """Where a connection is in a request."""

    NONE = auto()
    HEAD = auto()
    BODY = auto()


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    A request that offers another protocol, as clients do that would like HTTP/2, is answered in
    this one (RFC 9110, 7.8): httptools would take its body for that protocol's bytes. And a head
    must be there as soon as the next request on an idle connection must.
    """

    _part = _Part.NONE
    _late: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as Uvicorn narrows it
        self, transport: asyncio.Transport
    ) -> None:
        """Begin with a new connection."""
        super().connection_made(cast("asyncio.Transport", _Gathering(transport, self.loop)))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or the answer to its last request is sent."""
        self._have_head()
        super().connection_lost(exc)
        scope = cast("dict[str, Any]", self.cycle.scope if self.cycle else {})
        if call := scope.get(_LEAVING):
            call()

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client's."""
        if self._part is not _Part.BODY:
            end = data.find(b"\r\n\r\n")
            end = len(data) if end < 0 else end
            if _UPGRADE.search(data, 0, end):
                data = _UPGRADE.sub(b"x-ignored", data[:end]) + data[end:]
        super().data_received(data)
        if self._part is _Part.HEAD and self._late is None:
            self._expect_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._part = _Part.HEAD
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._part = _Part.BODY
        self._have_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is."""
        self._part = _Part.NONE
        super().on_message_complete()

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _have_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
