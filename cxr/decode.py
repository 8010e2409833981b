"""Encoded bytes to pixels: the one decoder that training and serving share."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cxr.errors import BadImageError, Rejection

FORMATS = ("JPEG", "PNG")
ACCEPTED = " or ".join(FORMATS)

_MIB = 2**20

# Pillow refuses more than twice its warning level by itself; that guard stays.
PILLOW_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """The largest image that is accepted.

    Attributes:
        max_bytes: encoded size, in bytes.
        max_pixels: decoded size, width times height.
    """

    max_bytes: int = 32 * _MIB
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_pixels < 1:
            raise ValueError("decode limits must be positive")
        if self.max_pixels > PILLOW_MAX_PIXELS:
            raise ValueError(f"max_pixels can be at most {PILLOW_MAX_PIXELS}")


DEFAULT_LIMITS = DecodeLimits()


def check_size(data: bytes | bytearray | memoryview, limits: DecodeLimits) -> None:
    """Refuse data that need not be decoded to be refused.

    Raises:
        BadImageError: nothing in it, or more than `limits.max_bytes`.
    """
    if len(data) == 0:
        raise BadImageError(Rejection.EMPTY, f"The image is empty; send one {ACCEPTED} file.")
    if len(data) > limits.max_bytes:
        raise BadImageError(
            Rejection.TOO_MANY_BYTES,
            f"The image is larger than {limits.max_bytes / _MIB:g} MiB, the limit for one image.",
        )


def decode(
    data: bytes | bytearray | memoryview, limits: DecodeLimits = DEFAULT_LIMITS
) -> Image.Image:
    """Decode one encoded radiograph.

    EXIF orientation is applied. Sixteen-bit images are reduced to eight bits by their high byte.
    Transparent pixels are laid on black, the background of a radiograph.

    Args:
        data: one JPEG or PNG file.
        limits: the largest image that is accepted.

    Returns:
        An image in mode `L` (one channel) or `RGB`, 8 bits a channel.

    Raises:
        BadImageError: empty, too large, not an image, another format, or damaged.
    """
    check_size(data, limits)
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels(limits) from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception:  # a hostile header can raise anything; all of it is bad input
        raise _damaged() from None
    if image.width * image.height > limits.max_pixels:
        raise _too_many_pixels(limits)
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _eight_bit(image)
    except MemoryError:
        raise
    except Exception:  # Pillow raises many types for damaged data
        raise _damaged() from None


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any Pillow mode that JPEG and PNG produce, as `L` or `RGB`."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _too_many_pixels(limits: DecodeLimits) -> BadImageError:
    return BadImageError(
        Rejection.TOO_MANY_PIXELS,
        f"The image has more than {limits.max_pixels / 1e6:g} megapixels, the limit for one image.",
    )


def _damaged() -> BadImageError:
    return BadImageError(
        Rejection.DAMAGED,
        f"The image is truncated or damaged; send one complete {ACCEPTED} file.",
    )


# First bytes of what people send by mistake, to name it in the answer.
_KNOWN: tuple[tuple[int, bytes, str], ...] = (
    (128, b"DICM", "DICOM"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"%PDF", "PDF"),
    (8, b"WEBP", "WebP"),
    (4, b"ftyp", "HEIF or MP4"),
)
_SIGNATURES = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n")


def _unidentified(data: bytes | bytearray | memoryview) -> BadImageError:
    head = bytes(data[:144])
    if head.startswith(_SIGNATURES):
        return _damaged()
    for offset, magic, name in _KNOWN:
        if head[offset : offset + len(magic)] == magic:
            return BadImageError(
                Rejection.UNSUPPORTED_FORMAT, f"{name} files are not accepted; send {ACCEPTED}."
            )
    return BadImageError(
        Rejection.NOT_AN_IMAGE, f"The data is not an image; send one {ACCEPTED} file."
    )


def to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels of a decoded image: uint8, `[height, width]` or `[height, width, 3]`, 0 to 255."""
    return np.asarray(image, dtype=np.uint8)
