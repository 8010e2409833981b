"""Pixels to tensor: the one preprocessing that training and serving share.

Its numbers stand in a :class:`Preprocessing` record that training writes into the model's
configuration and serving reads back; none of them is a default of the code.
"""

import math
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps

from cxr.decode import DEFAULT_LIMITS, DecodeLimits, Draft, decode

Color = Literal["grayscale", "rgb"]
Resize = Literal["stretch", "shorter_side", "longer_side"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "box"]
Crop = Literal["none", "center"]
Layout = Literal["NCHW", "NHWC"]
Region = Literal["image", "lungs"]
Intensity = Literal["none", "equalize"]
Decoding = Literal["exact", "scaled"]

# To be raised when decoding or preprocessing comes to make another tensor of the same image and
# record: training keeps features under this number.
REVISION = 1

_CHANNELS = 3
_MAX_VALUE = 255.0
# The lung fields are sought in an equalised, blurred picture of this side.
_THUMBNAIL = 128
_BLUR = 3.0
# Shares of that picture in which its parts lie, generously: the spine; the lungs' darkest columns;
# the rows that show lungs on most radiographs; the rows of the lungs' darkest part.
_SPINE = (0.35, 0.65)
_LUNGS_ACROSS = (0.08, 0.92)
_LUNGS_DOWN = (0.25, 0.70)
_LUNGS_CORE = (0.25, 0.65)
# Half the width of the mediastinum, and what is kept about the lungs.
_MEDIASTINUM = 0.0625
_RIM = 0.04
# What a JPEG decoder can divide an image's sides by, and how many times the pixels of the next step
# must be left a side: its low frequencies then differ little from the average that the step makes.
_REDUCTIONS = (8, 4, 2)
_SPARE = 2.0
# However wrong the search goes, what lies between these is kept: left and right, top and bottom.
_KEPT_ACROSS = (0.25, 0.75)
_KEPT_DOWN = (0.25, 0.65)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a decoded image becomes the model's input.

    Attributes:
        color: `grayscale` reduces to luma (ITU-R BT.601) and repeats it on three channels;
            `rgb` keeps colour.
        resize: `stretch` to `height` x `width`; `shorter_side` scales so that the image covers
            that size; `longer_side` scales so that it fits, and pads with black.
        height: input height, in pixels.
        width: input width, in pixels.
        interpolation: Pillow's antialiased filter for the resize.
        crop: `center` cuts to `height` x `width` after `shorter_side`; `none` elsewhere.
        mean: per channel, subtracted after scaling pixels to 0..1.
        std: per channel, divided by after that.
        layout: order of the axes.
        margin: cut from each side before anything else, as a fraction of that side: burnt-in
            letters, markers and frames stand there.
        region: `lungs` cuts to the box about the lung fields, found by their darkness, so that
            neither the field of view nor what stands around the lungs matters; `image` keeps all.
        resolution: the image is reduced to this many pixels a side before it is scaled to the
            input's size, so that sharp and coarse originals look the same; 0 leaves it out.
        intensity: `equalize` makes all grey values of the input equally frequent, so that neither
            exposure nor the tone curve of the file matters; `none` leaves them.
        decoding: `scaled` decodes a large JPEG file at a half, a quarter or an eighth of its size
            where that leaves twice the pixels that are needed, and no colours where none are;
            `exact` decodes every pixel.
    """

    color: Color
    resize: Resize
    height: int
    width: int
    interpolation: Interpolation
    crop: Crop
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: Layout
    margin: float = 0.0
    region: Region = "image"
    resolution: int = 0
    intensity: Intensity = "none"
    decoding: Decoding = "exact"

    def __post_init__(self) -> None:
        for name, choices in (
            ("color", Color),
            ("resize", Resize),
            ("interpolation", Interpolation),
            ("crop", Crop),
            ("layout", Layout),
            ("region", Region),
            ("intensity", Intensity),
            ("decoding", Decoding),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"preprocessing.{name} must be one of {', '.join(get_args(choices))}"
                )
        if self.height < 1 or self.width < 1:
            raise ValueError("preprocessing.height and .width must be positive")
        # JSON gives lists; equality and hashing want tuples.
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if len(self.mean) != _CHANNELS or len(self.std) != _CHANNELS or min(self.std) <= 0:
            raise ValueError("preprocessing.mean and .std need three numbers, std above zero")
        if (self.crop == "center") != (self.resize == "shorter_side"):
            raise ValueError("preprocessing.crop is 'center' exactly with resize 'shorter_side'")
        if not 0 <= self.margin < 0.5:  # noqa: PLR2004 - two halves would leave nothing
            raise ValueError("preprocessing.margin must be at least 0 and below 0.5")
        if self.resolution < 0:
            raise ValueError("preprocessing.resolution must not be negative")
        if self.intensity != "none" and self.color != "grayscale":
            raise ValueError("preprocessing.intensity needs the color 'grayscale'")

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """Shape of one image's tensor, without the batch axis."""
        if self.layout == "NCHW":
            return (_CHANNELS, self.height, self.width)
        return (self.height, self.width, _CHANNELS)

    @property
    def draft(self) -> Draft | None:
        """What the decoder may leave out of an image; `None` if nothing."""
        if self.decoding == "exact":
            return None
        return Draft(factor=self._reduction, luma=self.color == "grayscale")

    def _reduction(self, width: int, height: int) -> int:
        """By how much an image of this size may be reduced while it is decoded."""
        across, down = width * (1 - 2 * self.margin), height * (1 - 2 * self.margin)
        if self.region == "lungs":  # at the least
            across *= _KEPT_ACROSS[1] - _KEPT_ACROSS[0]
            down *= _KEPT_DOWN[1] - _KEPT_DOWN[0]
        target = (self.resolution or self.width, self.resolution or self.height)
        shrinks = across / target[0], down / target[1]
        fits = self.resize == "longer_side" and self.resolution == 0
        shrink = max(shrinks) if fits else min(shrinks)
        return next((n for n in _REDUCTIONS if n * _SPARE <= shrink), 1)

    def distinctive(self) -> dict[str, Any]:
        """The fields by name, without those that are optional and left out.

        What is computed from this, such as the key of a cache, stays the same when a release adds
        an optional field.
        """
        optional = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in optional or value != optional[name]
        }


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """The part of an image that a tensor shows, as shares of the image's width and height.

    Attributes:
        left: 0 is the image's left edge; below it, the tensor is padded there.
        top: likewise.
        right: 1 is the image's right edge; above it, the tensor is padded there.
        bottom: likewise.
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def within(self, box: Box, size: tuple[int, int]) -> "View":
        """The part of this part that a box of its pixels shows.

        Args:
            box: left, top, right, bottom.
            size: width and height of this part, in pixels.
        """
        x, y = (self.right - self.left) / size[0], (self.bottom - self.top) / size[1]
        return View(
            self.left + box[0] * x,
            self.top + box[1] * y,
            self.left + box[2] * x,
            self.top + box[3] * y,
        )


@dataclass(frozen=True)
class Loaded:
    """A decoded image on its way to the model.

    Attributes:
        image: mode `L` or `RGB`, as :func:`cxr.decode.decode` returns it.
        tensor: float32, shape `spec.item_shape`.
        view: the part of the image that the tensor shows.
        decode_seconds: how long decoding took; the rest was preprocessing.
    """

    image: Image.Image
    tensor: npt.NDArray[np.float32]
    view: View
    decode_seconds: float


def preprocess(image: Image.Image, spec: Preprocessing) -> npt.NDArray[np.float32]:
    """Turn a decoded image into one input tensor.

    Args:
        image: mode `L` or `RGB`, as :func:`cxr.decode.decode` returns it.
        spec: the model's preprocessing.

    Returns:
        float32, shape `spec.item_shape`, C-contiguous, `(pixel / 255 - mean) / std`.
    """
    return _preprocessed(image, spec)[0]


def _preprocessed(image: Image.Image, spec: Preprocessing) -> tuple[npt.NDArray[np.float32], View]:
    image = image.convert("L" if spec.color == "grayscale" else "RGB")
    view = View()
    box = _inner_box(image, spec.margin)
    image, view = image.crop(box), view.within(box, image.size)
    if spec.region == "lungs":
        box = lung_box(image)
        image, view = image.crop(box), view.within(box, image.size)
    image = _coarsened(image, spec)
    scaling = _Scaling.of(image.size, spec)
    view = view.within(scaling.seen, image.size)
    image = scaling.applied(image, spec)
    return _normalised(image, spec), view


def _normalised(image: Image.Image, spec: Preprocessing) -> npt.NDArray[np.float32]:
    if spec.intensity == "equalize":
        image = ImageOps.equalize(image)
    pixels = np.asarray(image, dtype=np.float32)
    scale = np.asarray(1.0 / (_MAX_VALUE * np.asarray(spec.std)), dtype=np.float32)
    shift = np.asarray(-np.asarray(spec.mean) / np.asarray(spec.std), dtype=np.float32)
    if pixels.ndim == 2:  # noqa: PLR2004 - grey: one plane serves all channels
        pixels = pixels[:, :, None]
    if spec.layout == "NHWC":
        return np.ascontiguousarray(pixels * scale + shift)
    planes = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes * scale[:, None, None] + shift[:, None, None])


def lung_box(image: Image.Image) -> tuple[int, int, int, int]:
    """The box about the lung fields of a frontal chest radiograph.

    In an equalised and blurred picture, the lungs are the dark valleys on both sides of the bright
    spine. From the darkest column of each, the box reaches outwards, and from their darkest row up
    and down, until half-way to the brightest there. An image that shows something else gives some
    box; it is never empty and always holds the middle of the image.

    Args:
        image: any size, mode `L` or `RGB`.

    Returns:
        left, top, right, bottom, in pixels of the image.
    """
    picture = image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    picture = ImageOps.equalize(picture).filter(ImageFilter.GaussianBlur(_BLUR))
    grey = np.asarray(picture, dtype=np.float32)
    across = grey[_share(_LUNGS_DOWN)].mean(axis=0)
    spine = _extreme(across, _SPINE, np.argmax)
    middle = spine / _THUMBNAIL
    one = _extreme(across, (_LUNGS_ACROSS[0], middle), np.argmin)
    other = _extreme(across, (middle, _LUNGS_ACROSS[1]), np.argmin)
    left, right = one - _reach(across[one::-1]), other + _reach(across[other:])
    columns = np.arange(_THUMBNAIL)
    beside_spine = np.abs(columns - spine) >= _MEDIASTINUM * _THUMBNAIL
    down = grey[:, (columns >= left) & (columns <= right) & beside_spine].mean(axis=1)
    core = _extreme(down, _LUNGS_CORE, np.argmin)
    top, bottom = core - _reach(down[core::-1]), core + _reach(down[core:])
    x = _kept(left, right, _KEPT_ACROSS)
    y = _kept(top, bottom, _KEPT_DOWN)
    return (
        int(x[0] * image.width),
        int(y[0] * image.height),
        math.ceil(x[1] * image.width),
        math.ceil(y[1] * image.height),
    )


def load_tensor(
    data: bytes | bytearray | memoryview,
    spec: Preprocessing,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> npt.NDArray[np.float32]:
    """Encoded bytes to one input tensor: decode, then preprocess.

    Training and serving both come through here.

    Args:
        data: one JPEG, PNG, TIFF or DICOM file.
        spec: the model's preprocessing.
        limits: the largest image that is accepted.

    Returns:
        float32, shape `spec.item_shape`.

    Raises:
        BadImageError: the image cannot be used.
    """
    return load(data, spec, limits).tensor


def load(
    data: bytes | bytearray | memoryview,
    spec: Preprocessing,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> Loaded:
    """As :func:`load_tensor`, and what it was made from."""
    start = time.perf_counter()
    image = decode(data, limits, spec.draft)
    decode_seconds = time.perf_counter() - start
    return Loaded(image, *_preprocessed(image, spec), decode_seconds)


def _share(part: tuple[float, float]) -> slice:
    return slice(int(part[0] * _THUMBNAIL), int(part[1] * _THUMBNAIL))


def _extreme(
    profile: npt.NDArray[np.float32],
    part: tuple[float, float],
    which: Callable[[npt.NDArray[np.float32]], np.intp],
) -> int:
    """Place of the darkest or brightest within a part of a profile."""
    inside = _share(part)
    start: int = inside.start
    return start + int(which(profile[inside]))


def _reach(profile: npt.NDArray[np.float32]) -> int:
    """Steps from the dark start of a profile to beyond half-way to its brightest place."""
    brighter = np.flatnonzero(profile > (profile[0] + profile.max()) / 2)
    return int(brighter[0]) if len(brighter) else len(profile) - 1


def _kept(first: int, last: int, kept: tuple[float, float]) -> tuple[float, float]:
    """Both ends as shares of the side, with a rim, and around what is always kept."""
    low, high = first / _THUMBNAIL - _RIM, last / _THUMBNAIL + _RIM
    return max(0.0, min(low, kept[0])), min(1.0, max(high, kept[1]))


def _inner_box(image: Image.Image, margin: float) -> tuple[int, int, int, int]:
    x, y = int(margin * image.width), int(margin * image.height)
    return x, y, image.width - x, image.height - y


def _coarsened(image: Image.Image, spec: Preprocessing) -> Image.Image:
    if spec.resolution == 0:
        return image
    size = (spec.resolution, spec.resolution)
    if spec.resize != "stretch":
        # Never larger than it was: the whole of a very thin image would not fit into memory.
        ratio = min(1.0, spec.resolution / min(image.size))
        size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling[spec.interpolation.upper()])


@dataclass(frozen=True)
class _Scaling:
    """How an image is brought to the input's size.

    Attributes:
        size: width and height that the whole image is scaled to.
        left: column of the scaled image where the input begins; negative where it is padded.
        top: row, likewise.
        seen: the part of the image, in its pixels, that the input shows.
    """

    size: tuple[int, int]
    left: int
    top: int
    seen: Box

    @classmethod
    def of(cls, size: tuple[int, int], spec: Preprocessing) -> "_Scaling":
        if spec.resize == "stretch":
            return cls((spec.width, spec.height), 0, 0, (0, 0, *size))
        ratios = (spec.width / size[0], spec.height / size[1])
        ratio = max(ratios) if spec.resize == "shorter_side" else min(ratios)
        scaled = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
        left, top = (scaled[0] - spec.width) // 2, (scaled[1] - spec.height) // 2
        x, y = size[0] / scaled[0], size[1] / scaled[1]
        right, bottom = (left + spec.width) * x, (top + spec.height) * y
        return cls(scaled, left, top, (left * x, top * y, right, bottom))

    def applied(self, image: Image.Image, spec: Preprocessing) -> Image.Image:
        target = (spec.width, spec.height)
        resample = Image.Resampling[spec.interpolation.upper()]
        if spec.resize == "stretch":
            return image.resize(target, resample)
        left, top, right, bottom = self.seen
        if spec.resize == "shorter_side":
            # Only the part that the crop keeps is scaled: the whole of a very thin image would not
            # fit into memory.
            box = (left, top, min(right, image.width), min(bottom, image.height))
            return image.resize(target, resample, box)
        # Outside the image, Pillow's crop gives black: the padding.
        corner = (self.left, self.top, self.left + spec.width, self.top + spec.height)
        return image.resize(self.size, resample).crop(corner)
