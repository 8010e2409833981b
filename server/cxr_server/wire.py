"""HTTP/1.1 for the REST endpoints: Uvicorn's, but an answer leaves in one piece.

And a request can learn at once that its client has left, without a task that waits for it.
"""

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Where a request's scope has what to call when its client leaves.
_LEAVING = "cxr.leaving"


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


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(  # type: ignore[override]  # as Uvicorn narrows it
        self, transport: asyncio.Transport
    ) -> None:
        """Begin with a new connection."""
        super().connection_made(cast("asyncio.Transport", _Gathering(transport, self.loop)))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or the answer to its last request is sent."""
        super().connection_lost(exc)
        scope = cast("dict[str, Any]", self.cycle.scope if self.cycle else {})
        if call := scope.get(_LEAVING):
            call()
