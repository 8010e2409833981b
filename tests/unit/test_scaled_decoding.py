"""Decoding at a fraction of the size: how far it differs, and what it must not change."""

import dataclasses
import random
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cxr.decode import DEFAULT_LIMITS, DecodeLimits, decode
from cxr.errors import BadImageError
from cxr.preprocess import Preprocessing, load_tensor

EXACT = Preprocessing(
    color="grayscale",
    resize="stretch",
    height=40,
    width=40,
    interpolation="bilinear",
    crop="none",
    mean=(0.0, 0.0, 0.0),
    std=(1 / 255, 1 / 255, 1 / 255),
    layout="NCHW",
)
SCALED = dataclasses.replace(EXACT, decoding="scaled")
EXIF_ORIENTATION = 0x0112


def picture(width: int, height: int) -> npt.NDArray[np.uint8]:
    """Soft shapes with some grain, as a radiograph has."""
    y, x = np.mgrid[0:height, 0:width] / (height, width)[0]
    wave = 128 + 60 * np.sin(9 * x) * np.cos(7 * y) + 40 * np.sin(31 * x * y)
    grain = np.random.default_rng(0).normal(0, 4, wave.shape)
    return (wave + grain).clip(0, 255).astype(np.uint8)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def colour(width: int, height: int) -> Image.Image:
    planes = [picture(width, height), picture(width, height)[::-1], picture(width, height)[:, ::-1]]
    return Image.fromarray(np.stack(planes, axis=-1))


def decoded_size(data: bytes, **changes: Any) -> tuple[int, int]:
    return decode(data, DEFAULT_LIMITS, dataclasses.replace(SCALED, **changes).draft).size


def test_exact_is_the_default_and_decodes_every_pixel() -> None:
    assert EXACT.decoding == "exact"
    assert EXACT.draft is None
    assert "decoding" not in EXACT.distinctive()
    assert SCALED.distinctive()["decoding"] == "scaled"


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preprocessing\.decoding must be one of exact, scaled"):
        dataclasses.replace(EXACT, decoding="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "factor"), [(80, 1), (159, 1), (160, 2), (320, 4), (1000, 8)])
def test_twice_the_pixels_that_are_needed_are_left(side: int, factor: int) -> None:
    data = jpeg(Image.fromarray(picture(side, side)))
    assert decoded_size(data) == (-(-side // factor),) * 2


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"margin": 0.1}, 2),
        ({"region": "lungs"}, 1),
        ({"resolution": 80}, 2),
        ({"resolution": 20}, 8),
        ({"resize": "shorter_side", "crop": "center"}, 4),
        ({"resize": "longer_side"}, 8),
        ({"width": 20}, 4),
    ],
)
def test_what_is_cut_off_is_no_spare_pixel(changes: dict[str, Any], factor: int) -> None:
    data = jpeg(Image.fromarray(picture(640, 320)))
    assert decoded_size(data, **changes) == (640 // factor, 320 // factor)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_on_its_side_is_measured_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = jpeg(Image.fromarray(picture(320, 640)), exif=exif)
    wide = {"width": 160}  # only where it lies on its side is there more than enough width
    upright = orientation in (1, 3)
    assert decoded_size(data, **wide) == ((320, 640) if upright else (320, 160))
    exact = load_tensor(data, dataclasses.replace(EXACT, **wide))
    scaled = load_tensor(data, dataclasses.replace(SCALED, **wide))
    assert np.abs(exact - scaled).mean() < 1


@pytest.mark.parametrize(
    ("size", "mean", "largest"),
    # Sides that the factor does not divide are rounded up: up to half a pixel at the far edges.
    [((160, 320), 0.5, 6), ((640, 320), 0.5, 6), ((333, 500), 2, 20), ((801, 645), 3, 20)],
)
@pytest.mark.parametrize("color", ["grayscale", "rgb"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_difference_is_small(
    size: tuple[int, int], mean: float, largest: float, color: str, progressive: bool
) -> None:
    data = jpeg(colour(*size), progressive=progressive)
    exact = load_tensor(data, dataclasses.replace(EXACT, color=color))  # type: ignore[arg-type]
    scaled = load_tensor(data, dataclasses.replace(SCALED, color=color))  # type: ignore[arg-type]
    assert scaled.shape == exact.shape
    assert 0 < np.abs(scaled - exact).mean() < mean
    assert np.abs(scaled - exact).max() < largest


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_kind_of_jpeg(mode: str) -> None:
    data = jpeg(colour(400, 400).convert(mode))
    difference = np.abs(load_tensor(data, SCALED) - load_tensor(data, EXACT))
    assert difference.mean() < 1


@pytest.mark.parametrize(("kind", "size"), [("PNG", (400, 400)), ("TIFF", (400, 400))])
def test_other_formats_are_decoded_as_ever(kind: str, size: tuple[int, int]) -> None:
    buffer = BytesIO()
    colour(*size).save(buffer, kind)
    data = buffer.getvalue()
    np.testing.assert_array_equal(load_tensor(data, SCALED), load_tensor(data, EXACT))


def test_a_small_grey_file_gives_the_same_numbers() -> None:
    data = jpeg(Image.fromarray(picture(96, 120)))
    np.testing.assert_array_equal(load_tensor(data, SCALED), load_tensor(data, EXACT))


def outcome(data: bytes, spec: Preprocessing, limits: DecodeLimits = DEFAULT_LIMITS) -> str:
    try:
        load_tensor(data, spec, limits)
    except BadImageError as error:
        return f"{error.reason.value}: {error}"
    return "accepted"


def test_the_limit_counts_the_pixels_of_the_file() -> None:
    data = jpeg(Image.fromarray(picture(400, 400)))
    limits = DecodeLimits(max_pixels=159_999)
    assert outcome(data, SCALED, limits) == outcome(data, EXACT, limits)
    assert outcome(data, SCALED, limits).startswith("too_many_pixels")


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_files_are_refused_for_the_same_reason(progressive: bool) -> None:
    original = jpeg(colour(170, 180), progressive=progressive)
    draw = random.Random(1)  # noqa: S311 - not for secrets
    outcomes = []
    for _ in range(60):
        data = bytearray(original)
        reach = draw.choice((60, 700, len(data)))
        for _ in range(draw.randint(0, 5)):
            data[draw.randrange(reach)] = draw.randrange(256)
        if draw.random() < 0.4:
            del data[draw.randrange(len(data)) :]
        outcomes.append((outcome(bytes(data), EXACT), outcome(bytes(data), SCALED)))
    differing = [pair for pair in outcomes if pair[0] != pair[1]]
    assert not differing
    assert {exact.partition(":")[0] for exact, _ in outcomes} >= {"accepted", "damaged"}
