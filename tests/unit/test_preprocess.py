"""The numbers that reach the model, against a computation of their own."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cxr.decode import DecodeLimits
from cxr.errors import BadImageError, Rejection
from cxr.preprocess import Preprocessing, load_tensor, preprocess
from support.bundles import encoded_image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SPEC = Preprocessing(
    color="grayscale",
    resize="stretch",
    height=24,
    width=32,
    interpolation="bilinear",
    crop="none",
    mean=MEAN,
    std=STD,
    layout="NCHW",
)
# Pillow rounds to whole grey values after each of its two passes.
ONE_GREY_VALUE = 1.01 / 255 / min(STD)


def spec(**changes: Any) -> Preprocessing:
    return dataclasses.replace(SPEC, **changes)


def smooth(height: int, width: int) -> npt.NDArray[np.uint8]:
    """A picture without noise or hard edges."""
    y, x = np.mgrid[0:height, 0:width]
    wave = np.sin(2 * np.pi * x / width) * np.cos(3 * np.pi * y / height)
    return (127.5 + 100 * wave).astype(np.uint8)


def triangle_weights(source: int, target: int) -> npt.NDArray[np.float64]:
    """Antialiased bilinear resampling of one axis, as a matrix."""
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / support
    weights = np.clip(1 - distance, 0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def resized(pixels: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float64]:
    rows = triangle_weights(pixels.shape[0], height)
    columns = triangle_weights(pixels.shape[1], width)
    return np.asarray(rows @ pixels.astype(float) @ columns.T)


def normalised(pixels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Grey values as three normalised planes."""
    return np.stack([(pixels / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)])


def test_without_resize_the_numbers_are_exact() -> None:
    pixels = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32).astype(np.uint8)
    tensor = preprocess(Image.fromarray(pixels), SPEC)
    np.testing.assert_allclose(tensor, normalised(pixels), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(96, 80), (50, 200), (10, 12)])
def test_stretch(height: int, width: int) -> None:
    pixels = smooth(height, width)
    tensor = preprocess(Image.fromarray(pixels), SPEC)
    np.testing.assert_allclose(tensor, normalised(resized(pixels, 24, 32)), atol=ONE_GREY_VALUE)


@pytest.mark.parametrize(
    ("height", "width", "scaled"),
    [(96, 200, (24, 50)), (120, 64, (60, 32)), (97, 333, (24, 82)), (72, 96, (24, 32))],
)
def test_shorter_side_covers_and_the_centre_is_kept(
    height: int, width: int, scaled: tuple[int, int]
) -> None:
    pixels = smooth(height, width)
    tensor = preprocess(Image.fromarray(pixels), spec(resize="shorter_side", crop="center"))
    top, left = (scaled[0] - 24) // 2, (scaled[1] - 32) // 2
    expected = resized(pixels, *scaled)[top : top + 24, left : left + 32]
    np.testing.assert_allclose(tensor, normalised(expected), atol=ONE_GREY_VALUE)


@pytest.mark.parametrize(
    ("height", "width", "scaled"), [(96, 200, (15, 32)), (120, 64, (24, 13)), (72, 96, (24, 32))]
)
def test_longer_side_fits_and_the_rest_is_black(
    height: int, width: int, scaled: tuple[int, int]
) -> None:
    pixels = smooth(height, width)
    tensor = preprocess(Image.fromarray(pixels), spec(resize="longer_side"))
    top, left = -((scaled[0] - 24) // 2), -((scaled[1] - 32) // 2)
    expected = np.zeros((24, 32))
    expected[top : top + scaled[0], left : left + scaled[1]] = resized(pixels, *scaled)
    np.testing.assert_allclose(tensor, normalised(expected), atol=ONE_GREY_VALUE)


def test_rgb_keeps_the_channels_apart() -> None:
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:] = (10, 100, 200)
    tensor = preprocess(Image.fromarray(pixels), spec(color="rgb"))
    for plane, value, mean, std in zip(tensor, (10, 100, 200), MEAN, STD, strict=True):
        np.testing.assert_allclose(plane, (value / 255 - mean) / std, atol=1e-6)


def test_rgb_repeats_a_grey_image() -> None:
    image = Image.fromarray(smooth(24, 32))
    np.testing.assert_array_equal(preprocess(image, spec(color="rgb")), preprocess(image, SPEC))


def test_grayscale_is_luma() -> None:
    tensor = preprocess(Image.new("RGB", (32, 24), (10, 100, 200)), SPEC)
    luma = round(0.299 * 10 + 0.587 * 100 + 0.114 * 200)
    np.testing.assert_allclose(tensor, normalised(np.full((24, 32), luma)), atol=1e-6)


@pytest.mark.parametrize("color", ["grayscale", "rgb"])
def test_nhwc_holds_the_same_numbers(color: str) -> None:
    image = Image.fromarray(np.stack([smooth(40, 50)] * 3, axis=-1))
    planes = preprocess(image, spec(color=color))
    np.testing.assert_allclose(
        preprocess(image, spec(color=color, layout="NHWC")), planes.transpose(1, 2, 0), atol=1e-6
    )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("color", ["grayscale", "rgb"])
@pytest.mark.parametrize(
    ("resize", "crop"), [("stretch", "none"), ("shorter_side", "center"), ("longer_side", "none")]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (33, 25)])
def test_every_image_gives_the_promised_array(
    size: tuple[int, int], resize: str, crop: str, color: str, layout: str
) -> None:
    wanted = spec(resize=resize, crop=crop, color=color, layout=layout)
    tensor = preprocess(Image.new("L", size, 200), wanted)
    assert tensor.shape == wanted.item_shape
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    assert np.isfinite(tensor).all()


def test_a_hair_of_an_image_does_not_grow_beyond_memory() -> None:
    """Scaled as a whole before the crop it would have 20 gigapixels."""
    hair = Image.new("L", (1, 20_000_000), 255)
    tensor = preprocess(hair, spec(resize="shorter_side", crop="center"))
    np.testing.assert_allclose(tensor, normalised(np.full((24, 32), 255)), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"color": "bgr"}, "preprocessing.color"),
        ({"resize": "squash"}, "preprocessing.resize"),
        ({"interpolation": "nearest"}, "preprocessing.interpolation"),
        ({"crop": "left"}, "preprocessing.crop"),
        ({"layout": "CHWN"}, "preprocessing.layout"),
        ({"height": 0}, "preprocessing.height"),
        ({"width": -1}, "width"),
        ({"mean": (0.5,)}, "preprocessing.mean"),
        ({"std": (0.5, 0.5, 0.0)}, "std"),
        ({"crop": "center"}, "preprocessing.crop"),
        ({"resize": "shorter_side"}, "preprocessing.crop"),
    ],
)
def test_an_invalid_value_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        spec(**changes)


def test_lists_from_json_compare_equal_to_tuples() -> None:
    from_json = spec(mean=list(MEAN), std=list(STD))
    assert from_json == SPEC
    assert hash(from_json) == hash(SPEC)


def test_load_tensor_decodes_and_preprocesses() -> None:
    tensor = load_tensor(encoded_image(brightness=200), SPEC)
    assert tensor.shape == (3, 24, 32)
    assert abs(float(tensor[0].mean()) * STD[0] + MEAN[0] - 200 / 255) < 0.01


def test_load_tensor_applies_the_limits() -> None:
    with pytest.raises(BadImageError) as caught:
        load_tensor(encoded_image(), SPEC, DecodeLimits(max_pixels=10))
    assert caught.value.reason is Rejection.TOO_MANY_PIXELS
