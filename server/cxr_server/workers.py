"""What both runtimes tell their workers, and what they make of the answers."""

from http import HTTPStatus

import orjson

from cxr.answer import Answer, answer_from, answer_from_json
from cxr.engine import MAX_BYTES_ENV, MAX_PIXELS_ENV, THREADS_ENV
from cxr_server.errors import RequestError, unavailable
from cxr_server.settings import Settings


def worker_environment(settings: Settings) -> dict[str, str]:
    """Environment variables that the handler and its libraries read."""
    threads = str(settings.threads_per_worker)
    return {
        "OMP_NUM_THREADS": threads,
        THREADS_ENV: threads,
        MAX_BYTES_ENV: str(settings.limits.max_bytes),
        MAX_PIXELS_ENV: str(settings.limits.max_pixels),
    }


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
