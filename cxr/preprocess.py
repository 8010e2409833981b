"""Pixels to tensor: the one preprocessing that training and serving share.

Its numbers stand in a :class:`Preprocessing` record that training writes into the model's
configuration and serving reads back; none of them is a default of the code.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr.decode import DEFAULT_LIMITS, DecodeLimits, decode

Color = Literal["grayscale", "rgb"]
Resize = Literal["stretch", "shorter_side", "longer_side"]
Interpolation = Literal["bilinear", "bicubic", "lanczos", "box"]
Crop = Literal["none", "center"]
Layout = Literal["NCHW", "NHWC"]

_CHANNELS = 3
_MAX_VALUE = 255.0


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

    def __post_init__(self) -> None:
        for name, choices in (
            ("color", Color),
            ("resize", Resize),
            ("interpolation", Interpolation),
            ("crop", Crop),
            ("layout", Layout),
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

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """Shape of one image's tensor, without the batch axis."""
        if self.layout == "NCHW":
            return (_CHANNELS, self.height, self.width)
        return (self.height, self.width, _CHANNELS)


def preprocess(image: Image.Image, spec: Preprocessing) -> npt.NDArray[np.float32]:
    """Turn a decoded image into one input tensor.

    Args:
        image: mode `L` or `RGB`, as :func:`cxr.decode.decode` returns it.
        spec: the model's preprocessing.

    Returns:
        float32, shape `spec.item_shape`, C-contiguous, `(pixel / 255 - mean) / std`.
    """
    image = image.convert("L" if spec.color == "grayscale" else "RGB")
    pixels = np.asarray(_resized(image, spec), dtype=np.float32)
    scale = np.asarray(1.0 / (_MAX_VALUE * np.asarray(spec.std)), dtype=np.float32)
    shift = np.asarray(-np.asarray(spec.mean) / np.asarray(spec.std), dtype=np.float32)
    if pixels.ndim == 2:  # noqa: PLR2004 - grey: one plane serves all channels
        pixels = pixels[:, :, None]
    if spec.layout == "NHWC":
        return np.ascontiguousarray(pixels * scale + shift)
    planes = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes * scale[:, None, None] + shift[:, None, None])


def load_tensor(
    data: bytes | bytearray | memoryview,
    spec: Preprocessing,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> npt.NDArray[np.float32]:
    """Encoded bytes to one input tensor: decode, then preprocess.

    Training and serving both come through here.

    Args:
        data: one JPEG or PNG file.
        spec: the model's preprocessing.
        limits: the largest image that is accepted.

    Returns:
        float32, shape `spec.item_shape`.

    Raises:
        BadImageError: the image cannot be used.
    """
    return preprocess(decode(data, limits), spec)


def _resized(image: Image.Image, spec: Preprocessing) -> Image.Image:
    target = (spec.width, spec.height)
    resample = Image.Resampling[spec.interpolation.upper()]
    if spec.resize == "stretch":
        return image.resize(target, resample)
    ratios = (spec.width / image.width, spec.height / image.height)
    ratio = max(ratios) if spec.resize == "shorter_side" else min(ratios)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    left, top = (size[0] - spec.width) // 2, (size[1] - spec.height) // 2
    if spec.resize == "shorter_side":
        # Only the part that the crop keeps is scaled: the whole of a very thin image would not fit
        # into memory.
        x, y = image.width / size[0], image.height / size[1]
        right, bottom = (left + spec.width) * x, (top + spec.height) * y
        box = (left * x, top * y, min(right, image.width), min(bottom, image.height))
        return image.resize(target, resample, box)
    # Outside the image, Pillow's crop gives black: the padding.
    return image.resize(size, resample).crop((left, top, left + spec.width, top + spec.height))
