"""Failures of a request, with the status that each protocol answers."""

import traceback
from http import HTTPStatus

import grpc

from cxr.errors import Rejection

_GRPC_STATUS = {
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.TOO_MANY_REQUESTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    HTTPStatus.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class RequestError(Exception):
    """A request that gets no answer.

    Attributes:
        status: the HTTP status.
        rejection: why the image was rejected; None where the failure is not an image's.

    The message is one sentence for the caller. It never quotes the request's content.
    """

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        grpc_status: grpc.StatusCode | None = None,
        *,
        rejection: Rejection | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.rejection = rejection
        self._grpc_status = grpc_status

    @property
    def grpc_status(self) -> grpc.StatusCode:
        """The gRPC status with the same meaning."""
        if self._grpc_status is not None:
            return self._grpc_status
        if self.status in _GRPC_STATUS:
            return _GRPC_STATUS[self.status]
        if self.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return grpc.StatusCode.INVALID_ARGUMENT
        return grpc.StatusCode.INTERNAL


def bad_request(message: str) -> RequestError:
    """400 / INVALID_ARGUMENT."""
    return RequestError(HTTPStatus.BAD_REQUEST, message)


def unavailable(message: str) -> RequestError:
    """503 / UNAVAILABLE: the same request may succeed later."""
    return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, message)


def busy() -> RequestError:
    """503 / RESOURCE_EXHAUSTED: more waits already than may."""
    return RequestError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The service is busy; try again later.",
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )


def check_batch(count: int, max_batch: int) -> None:
    """Refuse a batch before anything is made of its items.

    Raises:
        RequestError: it has more than `max_batch` images (413).
    """
    if count > max_batch:
        raise RequestError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The request has {count} images; at most {max_batch} are accepted.",
        )


def without_message(error: BaseException) -> str:
    """An unexpected error for the log: its type and where it came from.

    Its message is left out, since it might quote the request.
    """
    where = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__} at\n{where}"
