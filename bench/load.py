"""The load generator: clients that each send one image, wait for its answer, and send the next."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=60)


@dataclass(frozen=True)
class Request:
    """One request, ready to be sent: its body costs nothing while the clock runs."""

    url: str
    body: bytes
    headers: dict[str, str]


@dataclass
class Load:
    """What some clients saw.

    Attributes:
        latencies: seconds of each answered request.
        failures: requests that were not answered with 200.
        seconds: from the first request to the last answer.
        client_seconds: processor time of the clients themselves.
        others: processor time that neither server nor clients have used.
    """

    latencies: list[float] = field(default_factory=list)
    failures: int = 0
    seconds: float = 0.0
    client_seconds: float = 0.0
    others: float = 0.0

    def add(self, other: "Load") -> None:
        """Pool the rounds of one subject."""
        self.latencies += other.latencies
        self.failures += other.failures
        self.seconds += other.seconds
        self.client_seconds += other.client_seconds
        self.others += other.others

    @property
    def throughput(self) -> float:
        """Answered requests per second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0


def drive(requests: Sequence[Request], *, concurrency: int, seconds: float) -> Load:
    """Send requests from `concurrency` clients for a while, each over a connection of its own."""
    return asyncio.run(_drive(requests, concurrency, seconds))


def ask_each(requests: Sequence[Request]) -> list[bytes | None]:
    """Send every request once, one after the other; `None` where the answer was no 200."""
    return asyncio.run(_ask_each(requests))


async def _drive(requests: Sequence[Request], concurrency: int, seconds: float) -> Load:
    load = Load()
    # All clients go through one list, so that every image is asked about equally often.
    upcoming = itertools.cycle(requests)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=_TIMEOUT
    ) as session:
        cpu, start = time.process_time(), time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - start < seconds:
                sent = time.perf_counter()
                if await _answer(session, next(upcoming)) is None:
                    load.failures += 1
                else:
                    load.latencies.append(time.perf_counter() - sent)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        load.seconds = time.perf_counter() - start
        load.client_seconds = time.process_time() - cpu
    return load


async def _ask_each(requests: Sequence[Request]) -> list[bytes | None]:
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        return [await _answer(session, request) for request in requests]


async def _answer(session: aiohttp.ClientSession, request: Request) -> bytes | None:
    try:
        async with session.post(request.url, data=request.body, headers=request.headers) as answer:
            body = await answer.read()
            return body if answer.status == HTTPStatus.OK else None
    except (aiohttp.ClientError, TimeoutError):
        return None
