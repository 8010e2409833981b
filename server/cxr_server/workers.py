"""What both runtimes tell their workers, and what they make of the answers."""

import json
from http import HTTPStatus

import orjson

from cxr.answer import Answer, answer_from, answer_from_json
from cxr.engine import MAX_BYTES_ENV, MAX_PIXELS_ENV, THREADS_ENV
from cxr_server.errors import RequestError, unavailable
from cxr_server.settings import Settings
from cxr_server.worker import MOST

# Seconds after which images that wait behind another one in a worker are taken from it.
SLOW = 1.0


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
    try:
        return answer_from(orjson.loads(body))
    except ValueError:
        pass
    try:
        # It knows NaN, too.
        return answer_from_json(body)
    except ValueError:
        return None


def parse_answers(body: bytes, number: int) -> list[Answer | None] | None:
    """The handler's answers to a request with several images; None as for one."""
    try:
        documents = orjson.loads(body)
    except ValueError:
        try:
            documents = json.loads(body)
        except ValueError:
            return None
    if not isinstance(documents, list) or len(documents) != number:
        return None
    answers: list[Answer | None] = []
    for document in documents:
        try:
            answers.append(answer_from(document))
        except ValueError:
            answers.append(None)
    return answers


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
