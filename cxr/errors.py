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
    MULTIPLE_FRAMES = "multiple_frames"
    WRONG_MODALITY = "wrong_modality"
    WRONG_BODY_PART = "wrong_body_part"
    # What guards find in an image that decodes well; see `cxr.quality`. A DICOM file can name its
    # view itself.
    NOT_RADIOGRAPH = "not_radiograph"
    NOT_FRONTAL_CHEST = "not_frontal_chest"
    OUT_OF_DISTRIBUTION = "out_of_distribution"
    INVERTED = "inverted"
    ROTATED = "rotated"
    TOO_SMALL = "too_small"
    TOO_DARK = "too_dark"
    CLIPPED = "clipped"

    @property
    def http_status(self) -> int:
        """The HTTP status that answers it.

        413 too large, 415 wrong format, 422 a whole file of an accepted format that is not one
        radiograph of the chest, or that guards refuse, 400 otherwise.
        """
        return _STATUS.get(self, 400)


_STATUS = {
    Rejection.TOO_MANY_BYTES: 413,
    Rejection.TOO_MANY_PIXELS: 413,
    Rejection.UNSUPPORTED_FORMAT: 415,
    Rejection.MULTIPLE_FRAMES: 422,
    Rejection.WRONG_MODALITY: 422,
    Rejection.WRONG_BODY_PART: 422,
    Rejection.NOT_RADIOGRAPH: 422,
    Rejection.NOT_FRONTAL_CHEST: 422,
    Rejection.OUT_OF_DISTRIBUTION: 422,
    Rejection.INVERTED: 422,
    Rejection.ROTATED: 422,
    Rejection.TOO_SMALL: 422,
    Rejection.TOO_DARK: 422,
    Rejection.CLIPPED: 422,
}


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


def too_many_pixels(max_pixels: int) -> BadImageError:
    """The refusal of an image of more than `max_pixels` pixels."""
    return BadImageError(
        Rejection.TOO_MANY_PIXELS,
        f"The image has more than {max_pixels / 1e6:g} megapixels, the limit for one image.",
    )


class ModelLoadError(RuntimeError):
    """A model archive or bundle that is damaged, incomplete or does not fit together."""
