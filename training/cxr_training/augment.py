"""Augmentation of radiographs: what another machine, exposure or export could have made of one.

Every function takes a decoded image of mode `L` or `RGB` and returns a new one of the same mode.
Nothing here changes what a radiologist would read: there are no vertical flips, no shear, no
cut-outs. :func:`augment` draws the amounts; equal generators give equal images.
"""

import math
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageFilter, ImageOps

_MAX_VALUE = 255.0
_MIN_QUALITY, _MAX_QUALITY = 1, 100
_WORKING_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How much an image may change; each default means "not at all".

    Attributes:
        flip: probability of a horizontal flip.
        rotation: largest turn either way, in degrees.
        shift: largest shift along each axis, as a fraction of that side.
        scale: largest relative change of size: 0.1 gives 0.9 to 1.1.
        contrast: largest relative change of contrast, about the image's mean.
        gamma: largest change of the exponent, in octaves: 0.5 gives 2**-0.5 to 2**0.5.
        invert: probability that black and white are exchanged.
        blur: largest standard deviation of a Gaussian blur, as a fraction of the shorter side.
        resolution: smallest resolution, as a fraction of the image's own.
        noise: largest standard deviation of added Gaussian noise, in grey values of 255.
        quality: lowest JPEG quality of a re-encoding, 1 to 100; at 100 there is none.
        probability: with which each of contrast, gamma, blur, resolution, noise and quality acts.
    """

    flip: float = 0.0
    rotation: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    invert: float = 0.0
    blur: float = 0.0
    resolution: float = 1.0
    noise: float = 0.0
    quality: int = _MAX_QUALITY
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise ValueError(f"augmentation.{name} must not be negative")
        for name in ("flip", "invert", "probability"):
            if getattr(self, name) > 1:
                raise ValueError(f"augmentation.{name} is a probability, 0 to 1")
        for name in ("shift", "scale", "contrast"):
            if getattr(self, name) >= 1:
                raise ValueError(f"augmentation.{name} must be below 1")
        if not 0 < self.resolution <= 1:
            raise ValueError("augmentation.resolution must be above 0 and at most 1")
        if not _MIN_QUALITY <= self.quality <= _MAX_QUALITY:
            raise ValueError("augmentation.quality must be from 1 to 100")


def augment(image: Image.Image, spec: Augmentation, rng: np.random.Generator) -> Image.Image:
    """Change an image at random, as another acquisition would.

    Geometry comes first, then exposure, then sharpness, noise and file: the order in which they
    arise. An image whose shorter side is above 512 pixels is reduced to that before, so that noise
    and re-encoding are not averaged away when the network's input is made.

    Args:
        image: mode `L` or `RGB`.
        spec: the amounts.
        rng: source of all randomness.

    Returns:
        An image of the same mode.
    """
    amounts = rng.uniform(-1, 1, size=6).tolist()
    flips, inverts, *chances = rng.uniform(size=8).tolist()
    acts = [chance < spec.probability for chance in chances]
    image = _reduced(image)
    if flips < spec.flip:
        image = ImageOps.mirror(image)
    image = moved(
        image,
        rotation=spec.rotation * amounts[0],
        shift=(spec.shift * amounts[1], spec.shift * amounts[2]),
        scale=1 + spec.scale * amounts[3],
    )
    if inverts < spec.invert:
        image = ImageOps.invert(image)
    image = exposed(
        image,
        contrast=1 + spec.contrast * amounts[4] * acts[0],
        gamma=2 ** (spec.gamma * amounts[5] * acts[1]),
    )
    # From here on an amount has one direction only.
    portions = rng.uniform(size=4).tolist()
    if acts[2]:
        image = blurred(image, spec.blur * portions[0])
    if acts[3]:
        image = coarsened(image, 1 - (1 - spec.resolution) * portions[1])
    if acts[4]:
        image = noisy(image, spec.noise * portions[2], rng)
    if acts[5]:
        span = _MAX_QUALITY - spec.quality
        image = reencoded(image, round(_MAX_QUALITY - span * portions[3]))
    return image


def moved(
    image: Image.Image,
    *,
    rotation: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
) -> Image.Image:
    """Turn about the centre, enlarge, then shift; what comes into view is black.

    Args:
        image: mode `L` or `RGB`.
        rotation: degrees, counter-clockwise.
        shift: to the right and down, as fractions of width and height.
        scale: above 1 enlarges.

    Raises:
        ValueError: `scale` is not above 0.
    """
    if scale <= 0:
        raise ValueError("scale must be above 0")
    if rotation == 0 and shift == (0.0, 0.0) and scale == 1:
        return image.copy()
    # Pillow wants the way back: from a pixel of the result to its place in the image.
    angle = math.radians(rotation)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x, y = image.width / 2, image.height / 2
    to_x, to_y = x + shift[0] * image.width, y + shift[1] * image.height
    back = (cos, -sin, x - cos * to_x + sin * to_y, sin, cos, y - sin * to_x - cos * to_y)
    return image.transform(
        image.size, Image.Transform.AFFINE, back, resample=Image.Resampling.BILINEAR
    )


def exposed(image: Image.Image, *, contrast: float = 1.0, gamma: float = 1.0) -> Image.Image:
    """Change contrast about the mean grey value, then the tone curve.

    Args:
        image: mode `L` or `RGB`.
        contrast: factor; 1 leaves it.
        gamma: exponent on grey values of 0 to 1; above 1 darkens.
    """
    mean = float(np.asarray(image.convert("L"), dtype=np.float64).mean())
    values = np.clip(mean + contrast * (np.arange(256) - mean), 0, _MAX_VALUE) / _MAX_VALUE
    table = np.rint(values**gamma * _MAX_VALUE).astype(int).tolist()
    return image.point(table * len(image.getbands()))


def blurred(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur; `sigma` is a fraction of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(sigma * min(image.size)))


def coarsened(image: Image.Image, resolution: float) -> Image.Image:
    """Reduce to a fraction of the resolution and enlarge again."""
    size = (max(1, round(image.width * resolution)), max(1, round(image.height * resolution)))
    smaller = image.resize(size, Image.Resampling.BILINEAR)
    return smaller.resize(image.size, Image.Resampling.BILINEAR)


def noisy(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    """Add Gaussian noise, the same on all channels; `deviation` in grey values of 255."""
    pixels = np.asarray(image, dtype=np.float32)
    noise = rng.standard_normal((image.height, image.width), dtype=np.float32) * deviation
    noise = noise.reshape(noise.shape + (1,) * (pixels.ndim - 2))
    return Image.fromarray(np.clip(np.rint(pixels + noise), 0, _MAX_VALUE).astype(np.uint8))


def reencoded(image: Image.Image, quality: int) -> Image.Image:
    """Through a JPEG file of a quality of 1 to 100; at 100 the image stays as it is."""
    if quality >= _MAX_QUALITY:
        return image.copy()
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return decoded.convert(image.mode)


def _reduced(image: Image.Image) -> Image.Image:
    ratio = _WORKING_SIDE / min(image.size)
    if ratio >= 1:
        return image
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    return image.resize(size, Image.Resampling.BILINEAR)
