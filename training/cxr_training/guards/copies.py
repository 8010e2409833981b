"""What guards are taught with: radiographs turned, inverted, cut or filmed, and what is none.

All of it is drawn or made from the training images, as none may be downloaded. Every function takes
a generator; equal generators give equal images.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import cbook
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from sklearn.datasets import load_sample_images

from cxr_training.augment import augment
from cxr_training.recipes import PRESETS

_SIDE = 384
_MAX_VALUE = 255
# Sides of a part that is cut out of a radiograph, as fractions of its own.
_PARTS = (0.2, 0.42)
_WORDS = "chest report patient no acute finding lorem ipsum total 42 file edit view help ok"
Pixels = npt.NDArray[np.floating]


def rotated(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """On its left or right side, or upside down."""
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return image.transpose(turns[int(rng.integers(3))])


def inverted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Black and white exchanged, as in a file whose photometric interpretation was lost."""
    return ImageOps.invert(varied(image, rng))


def part(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part too small to show a chest, or several chests side by side."""
    if _chance(rng, 0.2):
        across, down = (2, 2) if _chance(rng) else (3, 1)
        small = image.resize((image.width // across, image.height // down))
        sheet = Image.new(image.mode, (small.width * across, small.height * down))
        for number in range(across * down):
            sheet.paste(small, (number % across * small.width, number // across * small.height))
        return sheet
    width, height = (int(side * rng.uniform(*_PARTS)) for side in image.size)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + max(width, 1), top + max(height, 1)))


def varied(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """As another machine, exposure and file would have made it."""
    return augment(image, PRESETS["full"], rng)


def filmed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A photograph of a film or a screen: askew, tinted, with a reflection, perhaps a moire."""
    image = image.convert("RGB")
    image.thumbnail((2 * _SIDE, 2 * _SIDE))
    width, height = image.size
    corners = np.array([[0, 0], [0, height], [width, height], [width, 0]], float)
    corners += rng.uniform(-0.06, 0.06, (4, 2)) * (width, height)
    image = image.transform(
        image.size,
        Image.Transform.QUAD,
        tuple(corners.ravel()),
        Image.Resampling.BILINEAR,
        fillcolor=tuple(rng.integers(0, 90, 3).tolist()),
    )
    pixels = np.asarray(image, dtype=np.float32)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    if _chance(rng):
        pitch, angle = rng.uniform(60, 160), rng.uniform(0, np.pi)
        wave = np.sin(2 * np.pi * pitch * (x * np.cos(angle) + y * np.sin(angle)))
        pixels = pixels + wave[:, :, None] * rng.uniform(2, 10)
    spot = np.exp(-((x - rng.uniform()) ** 2 + (y - rng.uniform()) ** 2) / 0.05)
    pixels = pixels + spot[:, :, None] * rng.uniform(0, 60)
    cast = rng.uniform(0.75, 1.0, 3)
    return augment(_image(pixels * cast), PRESETS["acquisition"], rng)


def no_radiograph(rng: np.random.Generator) -> Image.Image:
    """A photograph's part, a document, a drawing, a texture or noise."""
    makers: Sequence[Callable[[np.random.Generator], Image.Image]] = (
        _photograph,
        _photograph,
        _clouds,
        _noise,
        _document,
        _screen,
        _shapes,
        _stripes,
        _scene,
    )
    image = makers[int(rng.integers(len(makers)))](rng)
    if _chance(rng, 0.4):
        image = image.convert("L")
    return augment(image, PRESETS["acquisition"], rng)


@cache
def _photographs() -> tuple[Image.Image, ...]:
    """The few that come with installed packages."""
    found = [Image.fromarray(array) for array in load_sample_images().images]
    person: Any = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(Path(person)) as image:
        found.append(image.convert("RGB"))
    return tuple(found)


def _photograph(rng: np.random.Generator) -> Image.Image:
    photographs = _photographs()
    image = photographs[int(rng.integers(len(photographs)))]
    side = rng.uniform(0.25, 1)
    width, height = int(image.width * side), int(image.height * side)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    image = image.crop((left, top, left + width, top + height))
    if _chance(rng):
        image = ImageOps.mirror(image)
    hue, saturation, value = image.convert("HSV").split()
    if _chance(rng):
        shift = int(rng.integers(256))
        hue = hue.point([(grey + shift) % 256 for grey in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _spectrum(rng: np.random.Generator, size: tuple[int, int], falloff: float) -> Pixels:
    """Noise whose amplitude falls with frequency, 0 to 1."""
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.fftfreq(size[1])[None, :])
    frequency[0, 0] = 1
    phases = np.exp(2j * np.pi * rng.uniform(size=size))
    values = np.fft.ifft2(phases / frequency**falloff).real
    return np.asarray((values - values.min()) / np.ptp(values))


def _clouds(rng: np.random.Generator) -> Image.Image:
    falloff = rng.uniform(0.8, 2.2)
    planes = [_spectrum(rng, (_SIDE, _SIDE), falloff) for _ in range(3)]
    if _chance(rng):
        planes = planes[:1] * 3
    return _image(np.stack(planes, axis=2) * _MAX_VALUE)


def _noise(rng: np.random.Generator) -> Image.Image:
    shape = (_SIDE, _SIDE, 3 if _chance(rng) else 1)
    pixels = (
        rng.normal(rng.uniform(60, 200), rng.uniform(3, 80), shape),
        rng.uniform(0, _MAX_VALUE, shape),
        (rng.uniform(size=shape) < rng.uniform(0.02, 0.5)) * float(_MAX_VALUE),
        np.full(shape, rng.uniform(0, _MAX_VALUE)),
    )[int(rng.integers(4))]
    image = _image(np.broadcast_to(pixels, (*shape[:2], 3)))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))


def _document(rng: np.random.Generator) -> Image.Image:
    dark = _chance(rng, 0.2)
    image = Image.new("RGB", (_SIDE, int(_SIDE * 1.3)), "black" if dark else "white")
    draw = ImageDraw.Draw(image)
    size = int(rng.integers(9, 26))
    font = ImageFont.load_default(size)
    words = _WORDS.split()
    for y in range(size, image.height - size, int(size * rng.uniform(1.2, 2))):
        line = " ".join(rng.choice(words, int(rng.integers(0, 12))))
        draw.text((size, y), line, fill="white" if dark else "black", font=font)
    return image


def _screen(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (int(_SIDE * 1.5), _SIDE), _color(rng))
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for _ in range(int(rng.integers(5, 25))):
        box = _box(rng, image.size)
        draw.rectangle(box, fill=_color(rng), outline=_color(rng))
        draw.text(box[:2], str(rng.choice(_WORDS.split())), fill=_color(rng), font=font)
    return image


def _shapes(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (_SIDE, _SIDE), _color(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 40))):
        if _chance(rng):
            draw.ellipse(_box(rng, image.size), fill=_color(rng))
        else:
            points = rng.integers(0, _SIDE, (int(rng.integers(3, 7)), 2))
            draw.polygon([tuple(point) for point in points.tolist()], fill=_color(rng))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 4)))


def _stripes(rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / _SIDE
    angle, count = rng.uniform(0, np.pi), rng.uniform(0.5, 40)
    wave = np.sin(2 * np.pi * count * (x * np.cos(angle) + y * np.sin(angle)))
    if _chance(rng):
        wave = np.sign(wave * np.sin(2 * np.pi * count * (y * np.cos(angle) - x * np.sin(angle))))
    ends = rng.uniform(0, _MAX_VALUE, (2, 3))
    return _image(ends[0] + (wave[:, :, None] + 1) / 2 * (ends[1] - ends[0]))


def _scene(rng: np.random.Generator) -> Image.Image:
    """Lit, textured blobs before a textured ground: the statistics of a photograph, drawn."""
    image = _clouds(rng)
    for _ in range(int(rng.integers(2, 9))):
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).ellipse(_box(rng, image.size), fill=_MAX_VALUE)
        texture = ImageOps.colorize(_clouds(rng).convert("L"), _color(rng), _color(rng))
        image.paste(texture, mask=mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, 5))))
    return image


def _chance(rng: np.random.Generator, share: float = 0.5) -> bool:
    return bool(rng.uniform() < share)


def _color(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, 3).tolist())


def _box(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
    x = np.sort(rng.integers(0, size[0], 2))
    y = np.sort(rng.integers(0, size[1], 2))
    return int(x[0]), int(y[0]), int(x[1]) + 1, int(y[1]) + 1


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.asarray(pixels).clip(0, _MAX_VALUE).astype(np.uint8))
