"""What both runtimes tell their workers, and what they make of the answers."""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Generic, TypeVar

import orjson

from cxr.answer import Answer, Options, answer_from
from cxr.engine import MAX_BYTES_ENV, MAX_PIXELS_ENV, THREADS_ENV, WORKER_LOG
from cxr_server.errors import RequestError, unavailable
from cxr_server.settings import Settings
from cxr_server.worker import MOST

# Seconds after which images that wait behind another one in a worker are taken from it.
SLOW = 1.0


_Outcome = TypeVar("_Outcome")


@dataclass(kw_only=True, eq=False)
class Job(Generic[_Outcome]):
    """An image that waits for its answer. Jobs are ordered by their arrival.

    Attributes:
        arrival: its place among those that wait, which it keeps when its worker has died.
        options: what is wanted of it.
        outcome: done once nobody waits any more, too.
        alone: it goes with no other, since one that it was with has failed.
        skip: tells the worker that has it, with others, that nobody waits for it any more.
    """

    arrival: int
    image: bytes
    options: Options
    outcome: "asyncio.Future[_Outcome]"
    alone: bool = False
    skip: Callable[[], None] | None = None

    def __lt__(self, other: "Job[_Outcome]") -> bool:
        return self.arrival < other.arrival

    def settle(self, outcome: _Outcome) -> None:
        """Tell who waits for it, if somebody does."""
        if not self.outcome.done():
            self.outcome.set_result(outcome)

    def fail(self, error: Exception) -> None:
        """Tell who waits for it that there will be no answer."""
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def leave(self) -> None:
        """Nobody waits for it any more: it may stand in a queue for a while, its image need not."""
        self.image = b""
        if self.skip is not None:
            self.skip()


_AnyJob = TypeVar("_AnyJob", bound=Job[Any])


def taken_back(jobs: list[_AnyJob], at: int) -> list[_AnyJob]:
    """Take images back from a worker, all but the one that it is at.

    That may take long, or have ended it; its neighbours have nothing to do with it. What is
    finished is among them, since its answers come with the last one.

    Args:
        jobs: at the end, only those that the worker still has.
        at: place of the one that it is at; -1 before the first.

    Returns:
        Those that still have to be answered.
    """
    back = [job for place, job in enumerate(jobs) if place != at]
    jobs[:] = [] if at < 0 else [jobs[at]]
    for job in back:
        if job.skip is not None:
            job.skip()
            job.skip = None
    return [job for job in back if not job.outcome.done()]


def log_worker(line: str, log: logging.Logger, *, verbose: bool) -> None:
    """Log a line that a worker has written, if it is meant for this log or all are wanted."""
    if line.startswith(WORKER_LOG):
        log.error("worker: %s", line.removeprefix(WORKER_LOG))
    elif verbose:
        log.info("worker: %s", line)


def worker_environment(settings: Settings) -> dict[str, str]:
    """Environment variables that the handler and its libraries read."""
    threads = str(settings.threads_per_worker)
    return {
        "OMP_NUM_THREADS": threads,
        THREADS_ENV: threads,
        MAX_BYTES_ENV: str(settings.limits.max_bytes),
        MAX_PIXELS_ENV: str(settings.limits.max_pixels),
    }


def at_once(waiting: int, workers: int) -> int:
    """How many images a worker is given together, at most, that takes no batches.

    One, unless many wait. And one where it is the only worker: behind an image that takes long,
    nobody else could answer them.
    """
    return min(MOST, 1 + waiting // workers) if workers > 1 else 1


def parse_answer(body: bytes) -> Answer | None:
    """The handler's answer; None where something else answered in its place."""
    return _answer(_document(body))


def parse_answers(body: bytes, number: int) -> list[Answer | None] | None:
    """The handler's answers to a request with several images; None as for one."""
    documents = _document(body)
    if not isinstance(documents, list) or len(documents) != number:
        return None
    return [_answer(document) for document in documents]


def _document(body: bytes) -> Any:
    """What JSON says; None if it is none."""
    for loads in (orjson.loads, json.loads):  # the second one knows NaN, too
        try:
            return loads(body)
        except ValueError:
            continue
    return None


def _answer(document: Any) -> Answer | None:
    try:
        return answer_from(document)
    except ValueError:
        return None


def too_late(settings: Settings) -> RequestError:
    """504: no answer within the time that one image may take."""
    return RequestError(
        HTTPStatus.GATEWAY_TIMEOUT,
        f"There was no answer within {settings.request_timeout:g} s; try again later.",
    )


def failed_twice() -> RequestError:
    """500: an image that fails its worker is not passed on until all have failed."""
    return RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, "The model failed twice on this image.")


def killed_again() -> RequestError:
    """500: nor is one whose workers are killed again and again."""
    return RequestError(
        HTTPStatus.INTERNAL_SERVER_ERROR, "Three workers were killed while they had this image."
    )


def no_worker() -> RequestError:
    """503: no worker was there to answer."""
    return unavailable("No worker could answer; try again later.")


def not_ready() -> RequestError:
    """503: the model is not loaded yet, or not any more."""
    return unavailable("The model is not ready; try again later.")


def ended_while_loading(times: int) -> str:
    """Why the model could not be loaded, where its process said nothing."""
    return f"its process ended while loading, {times} times in a row."
