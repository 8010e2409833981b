"""The load generator: clients that each send one image, wait for its answer, and send the next."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

_TIMEOUT = 60.0


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent: what is read here before the clock runs costs nothing then."""

    url: str
    body: bytes
    headers: dict[str, str]

    @cached_property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    @cached_property
    def encoded(self) -> bytes:
        """All of it as it is sent."""
        parts = urlsplit(self.url)
        headers = {"Host": parts.netloc, "Content-Length": str(len(self.body)), **self.headers}
        lines = [f"POST {parts.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        return "\r\n".join(lines).encode() + self.body


@dataclass
class Load:
    """What some clients saw.

    Attributes:
        latencies: seconds of each answered request.
        failures: requests that were not answered with 200.
        seconds: from the first request to the last answer.
        client_seconds: processor time of the clients themselves.
        server_seconds: processor time of all processes of the server.
        others: processor time that neither server nor clients have used.
    """

    latencies: list[float] = field(default_factory=list)
    failures: int = 0
    seconds: float = 0.0
    client_seconds: float = 0.0
    server_seconds: float = 0.0
    others: float = 0.0

    def add(self, other: "Load") -> None:
        """Pool the rounds of one subject."""
        self.latencies += other.latencies
        self.failures += other.failures
        self.seconds += other.seconds
        self.client_seconds += other.client_seconds
        self.server_seconds += other.server_seconds
        self.others += other.others

    @property
    def throughput(self) -> float:
        """Answered requests per second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0


def drive(requests: Sequence[Request], *, concurrency: int, seconds: float) -> Load:
    """Send requests from `concurrency` clients for a while, each over a connection of its own."""
    return uvloop.run(_drive(requests, concurrency, seconds))


def ask_each(requests: Sequence[Request]) -> list[bytes | None]:
    """Send every request once, one after the other; `None` where the answer was no 200."""
    return uvloop.run(_ask_each(requests))


async def _drive(requests: Sequence[Request], concurrency: int, seconds: float) -> Load:
    load = Load()
    for request in requests:
        _ = request.encoded, request.address
    # All clients go through one list, so that every image is asked about equally often.
    upcoming = itertools.cycle(requests)
    cpu, start = time.process_time(), time.perf_counter()

    async def client() -> None:
        asking = _Client()
        while time.perf_counter() - start < seconds:
            sent = time.perf_counter()
            if await asking.ask(next(upcoming)) is None:
                load.failures += 1
            else:
                load.latencies.append(time.perf_counter() - sent)
        asking.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    load.seconds = time.perf_counter() - start
    load.client_seconds = time.process_time() - cpu
    return load


async def _ask_each(requests: Sequence[Request]) -> list[bytes | None]:
    client = _Client()
    answers = [await client.ask(request) for request in requests]
    client.close()
    return answers


class _Client:
    """Asks one question after the other, over one connection as long as the server keeps it."""

    def __init__(self) -> None:
        self._connection: _Connection | None = None

    async def ask(self, request: Request) -> bytes | None:
        """The body of the answer; `None` where it was no 200, or there was none."""
        try:
            async with asyncio.timeout(_TIMEOUT):
                if self._connection is None or self._connection.closed:
                    loop = asyncio.get_running_loop()
                    _, self._connection = await loop.create_connection(
                        _Connection, *request.address
                    )
                return await self._connection.ask(request.encoded)
        except (OSError, TimeoutError, httptools.HttpParserError):
            self.close()
            return None

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.transport.abort()
        self._connection = None


class _Connection(asyncio.Protocol):
    """A connection that is parsed in C, as a client for all purposes would not be.

    The clients share the processors with what they measure: each millisecond of theirs is one that
    a server does not have.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.closed = False
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._answer: asyncio.Future[bytes | None] | None = None

    async def ask(self, encoded: bytes) -> bytes | None:
        """Send a request, and wait for its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(encoded)
        return await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self.closed = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(error)

    def on_message_begin(self) -> None:
        """An answer begins."""
        self._parts = []

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """It is complete."""
        if not self._parser.should_keep_alive():
            self.closed = True
        if self._answer is not None and not self._answer.done():
            good = self._parser.get_status_code() == HTTPStatus.OK
            self._answer.set_result(b"".join(self._parts) if good else None)
