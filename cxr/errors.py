"""Errors that a caller can act on: what was wrong with an image, and what is accepted."""

from enum import StrEnum


class Rejection(StrEnum):
    """Why an image was rejected. The values are stable: clients and metrics may rely on them."""

    EMPTY = "empty"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    DAMAGED = "damaged"

    @property
    def http_status(self) -> int:
        """The HTTP status that answers it: 413 too large, 415 wrong format, 400 otherwise."""
        if self in (Rejection.TOO_MANY_BYTES, Rejection.TOO_MANY_PIXELS):
            return 413
        return 415 if self is Rejection.UNSUPPORTED_FORMAT else 400


class BadImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: the machine-readable reason.

    The message is one sentence for the person who sent the image. It never holds image content or
    a file name.
    """

    def __init__(self, reason: Rejection, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ModelLoadError(RuntimeError):
    """A model archive or bundle that is damaged, incomplete or does not fit together."""
