"""Encoded bytes to pixels: the one decoder that training and serving share."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as _Tag
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE as _BITS
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as _PHOTOMETRIC
from PIL.TiffImagePlugin import TiffImageFile

from cxr.dicom import decode_dicom, is_dicom
from cxr.errors import BadImageError, Rejection, too_many_pixels

# Those that Pillow reads; DICOM is read by `cxr.dicom`.
FORMATS = ("JPEG", "PNG", "TIFF")
ACCEPTED = f"{', '.join(FORMATS)} or DICOM"

_MIB = 2**20

# Bits that a detector gives, as far as they need two bytes.
_DEPTHS = (10, 12, 14, 16)

# Of how they hold pixels (Pillow's raw modes), those whose transparent colour Pillow compares with
# pixels that it has scaled.
_KEY_NOT_SCALED = ("L;2", "L;4", "RGB;16B")

# EXIF orientations in which width and height change places.
_ON_ITS_SIDE = (5, 6, 7, 8)

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


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a JPEG decoder may leave out because nobody would see it.

    Attributes:
        factor: from width and height of the upright image, in pixels, the number that each side
            may be divided by: 1, 2, 4 or 8.
        luma: leave out the colours.
    """

    factor: Callable[[int, int], int]
    luma: bool


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
    data: bytes | bytearray | memoryview,
    limits: DecodeLimits = DEFAULT_LIMITS,
    draft: Draft | None = None,
) -> Image.Image:
    """Decode one encoded radiograph.

    EXIF orientation is applied. Sixteen-bit images are reduced to eight by the highest of the bits
    that they use; with colour or alpha, they have to use all. Transparent pixels are laid on black,
    the background of a radiograph. What becomes of a DICOM file,
    :func:`cxr.dicom.decode_dicom` says.

    Args:
        data: one JPEG, PNG, TIFF or DICOM file.
        limits: the largest image that is accepted.
        draft: what may be left out of a JPEG file; `None` decodes all of it.

    Returns:
        An image in mode `L` (one channel) or `RGB`, 8 bits a channel.

    Raises:
        BadImageError: empty, too large, not an image, another format, damaged, of a depth that
            would be misread, or not one radiograph of the chest as far as the file says what it is.
    """
    check_size(data, limits)
    if is_dicom(data):
        return decode_dicom(data, limits.max_pixels)
    try:
        image: ImageFile.ImageFile = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise too_many_pixels(limits.max_pixels) from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception:  # a hostile header can raise anything; all of it is bad input
        raise _damaged() from None
    if image.width * image.height > limits.max_pixels:
        raise too_many_pixels(limits.max_pixels)
    # A JPEG or PNG may hold a preview or an animation beside its picture; a TIFF's pages are
    # pictures of equal right.
    if isinstance(image, TiffImageFile) and image.is_animated:
        raise BadImageError(
            Rejection.MULTIPLE_FRAMES, "The TIFF file holds several pages; send one image a file."
        )
    try:
        if draft is not None and isinstance(image, JpegImageFile):
            _reduce(image, draft)
        raw_mode = _raw_mode(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _eight_bit(image, raw_mode)
    except (BadImageError, MemoryError):
        raise
    except Exception:  # Pillow raises many types for damaged data
        raise _damaged() from None


def _reduce(image: JpegImageFile, draft: Draft) -> None:
    """Have the file decoded at a fraction of its size: the DCT's low frequencies only.

    All of the file is read nevertheless, so the same damage is found.
    """
    width, height = image.size
    on_its_side = image.getexif().get(_Tag.Orientation) in _ON_ITS_SIDE
    factor = draft.factor(height, width) if on_its_side else draft.factor(width, height)
    image.draft("L" if draft.luma else None, (max(1, width // factor), max(1, height // factor)))


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the file holds its pixels, in Pillow's words, which it forgets in loading.

    Raises:
        BadImageError: Pillow would misread them.
    """
    args = image.tile[0].args
    raw_mode = str(args[0] if isinstance(args, tuple) else args)
    # Colours in planes, uncompressed: one channel is read at a time, and always as bytes.
    wide_planes = (
        isinstance(image, TiffImageFile)
        and len(raw_mode) == 1
        and max(image.tag_v2.get(_BITS, (1,))) > 8  # noqa: PLR2004
    )
    if wide_planes or ("transparency" in image.info and raw_mode in _KEY_NOT_SCALED):
        raise _unsupported(
            "The file's bits a channel are not accepted together with its colours or its "
            "transparency; send 8 bits a channel, or grey without transparency."
        )
    return raw_mode


def _eight_bit(image: Image.Image, raw_mode: str) -> Image.Image:
    """Any Pillow mode that the formats produce, as `L` or `RGB`."""
    if image.mode.startswith(("I", "F")):
        return _from_deep(image)
    shown = _flat(image)
    # Of 16 bits with colour or alpha, Pillow gives the high 8. It would be nearly black.
    if ";16" in raw_mode and np.asarray(shown).max() < 2 ** (_DEPTHS[-2] - 8):
        raise _unsupported(
            f"The image has colour or transparency and uses {_DEPTHS[-2]} or fewer of its "
            f"{_DEPTHS[-1]} bits a channel; send 8 bits a channel, or grey without transparency."
        )
    return shown


def _flat(image: Image.Image) -> Image.Image:
    """An image of at most eight bits a channel, without transparency, as `L` or `RGB`."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """A grey image of more than eight bits, in mode `L`."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2 ** _DEPTHS[-1]:
        raise _unsupported(f"Images of more than {_DEPTHS[-1]} bits a channel are not accepted.")
    if (transparent := image.info.get("transparency")) is not None:
        pixels = np.where(pixels == transparent, 0, pixels)
    # Detectors have 10 to 16 bits, and the file does not say how many: the fewest that hold the
    # brightest pixel. An image of 12 bits would otherwise be nearly black.
    depth = next(depth for depth in _DEPTHS if pixels.max() < 2**depth)
    white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
    grey = (pixels >> (depth - 8)).astype(np.uint8)
    # Pillow inverts such an image itself, but not one of 16 bits.
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _unsupported(sentence: str) -> BadImageError:
    return BadImageError(Rejection.UNSUPPORTED_FORMAT, sentence)


def _damaged() -> BadImageError:
    return BadImageError(
        Rejection.DAMAGED,
        f"The image is truncated or damaged; send one complete {ACCEPTED} file.",
    )


# First bytes of what people send by mistake, to name it in the answer.
_KNOWN: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"%PDF", "PDF"),
    (8, b"WEBP", "WebP"),
    (4, b"ftyp", "HEIF or MP4"),
)
_SIGNATURES = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*")


def _unidentified(data: bytes | bytearray | memoryview) -> BadImageError:
    head = bytes(data[:144])
    if head.startswith(_SIGNATURES):
        return _damaged()
    for offset, magic, name in _KNOWN:
        if head[offset : offset + len(magic)] == magic:
            return _unsupported(f"{name} files are not accepted; send {ACCEPTED}.")
    return BadImageError(
        Rejection.NOT_AN_IMAGE, f"The data is not an image; send one {ACCEPTED} file."
    )


def to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels of a decoded image: uint8, `[height, width]` or `[height, width, 3]`, 0 to 255."""
    return np.asarray(image, dtype=np.uint8)
