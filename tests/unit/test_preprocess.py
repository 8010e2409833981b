"""The numbers that reach the model, against a computation of their own."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cxr.decode import DecodeLimits
from cxr.errors import BadImageError, Rejection
from cxr.preprocess import Preprocessing, load_tensor, lung_box, preprocess
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
        ({"margin": 0.5}, "preprocessing.margin"),
        ({"margin": -0.1}, "preprocessing.margin"),
        ({"resolution": -1}, "preprocessing.resolution"),
        ({"intensity": "bright"}, "preprocessing.intensity"),
        ({"region": "heart"}, "preprocessing.region"),
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


# Standardisation of the acquisition


def standardised(image: Image.Image, **changes: Any) -> npt.NDArray[np.float64]:
    """Grey values that reach the model, 0 to 255."""
    tensor = preprocess(image, spec(**changes))
    return np.asarray((tensor[0].astype(float) * STD[0] + MEAN[0]) * 255)


def test_optional_steps_are_left_out_of_what_identifies_a_preprocessing() -> None:
    """Caches of features made before a field existed stay valid."""
    fields = {
        "color",
        "resize",
        "height",
        "width",
        "interpolation",
        "crop",
        "mean",
        "std",
        "layout",
    }
    assert SPEC.distinctive().keys() == fields
    more = spec(margin=0.1, intensity="equalize").distinctive()
    assert more.keys() == fields | {"margin", "intensity"}
    assert (more["margin"], more["intensity"]) == (0.1, "equalize")


@pytest.mark.parametrize("resize", ["stretch", "longer_side"])
def test_margin_removes_what_stands_at_the_rim(resize: str) -> None:
    marked = smooth(240, 320)
    marked[:24] = 255
    marked[:, -32:] = 255
    framed = standardised(Image.fromarray(marked), margin=0.1, resize=resize)
    inner = standardised(Image.fromarray(smooth(240, 320)[24:-24, 32:-32]), resize=resize)
    np.testing.assert_allclose(framed, inner, atol=1e-3)


def test_resolution_hides_how_sharp_an_image_was() -> None:
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320), np.uint8))
    soft = sharp.resize((16, 12), Image.Resampling.BILINEAR).resize(sharp.size)
    plain = np.abs(standardised(sharp) - standardised(soft)).mean()
    levelled = np.abs(standardised(sharp, resolution=6) - standardised(soft, resolution=6)).mean()
    assert levelled < 0.5 * plain


def test_equalize_hides_how_an_image_was_exposed() -> None:
    image = Image.fromarray(smooth(96, 128))
    dull = image.point([round(60 + 0.4 * value) for value in range(256)])
    plain = np.abs(standardised(image) - standardised(dull)).mean()
    levelled = np.abs(
        standardised(image, intensity="equalize") - standardised(dull, intensity="equalize")
    ).mean()
    assert levelled < 0.25 * plain


def test_equalize_makes_grey_values_equally_frequent() -> None:
    dark = Image.fromarray((smooth(96, 128) // 4).astype(np.uint8))
    grey = standardised(dark, height=96, width=128, intensity="equalize")
    histogram, _ = np.histogram(grey, bins=4, range=(0, 256))
    np.testing.assert_allclose(histogram / grey.size, 0.25, atol=0.08)


@pytest.mark.parametrize(
    ("resize", "crop"), [("stretch", "none"), ("shorter_side", "center"), ("longer_side", "none")]
)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 5000), (33, 25)])
def test_standardisation_survives_any_image(size: tuple[int, int], resize: str, crop: str) -> None:
    wanted = spec(
        resize=resize, crop=crop, intensity="equalize", margin=0.4, resolution=7, region="lungs"
    )
    tensor = preprocess(Image.new("L", size, 200), wanted)
    assert tensor.shape == wanted.item_shape
    assert tensor.dtype == np.float32
    assert np.isfinite(tensor).all()


def test_a_hair_of_an_image_is_not_enlarged_to_the_resolution() -> None:
    hair = Image.new("L", (1, 2_000_000), 255)
    tensor = preprocess(hair, spec(resize="shorter_side", crop="center", resolution=500))
    np.testing.assert_allclose(tensor, normalised(np.full((24, 32), 255)), atol=1e-6)


def test_intensity_is_for_grey_images() -> None:
    with pytest.raises(ValueError, match="grayscale"):
        spec(color="rgb", intensity="equalize")


def chest(
    lungs: tuple[int, int, int, int] = (60, 40, 240, 170), size: tuple[int, int] = (300, 240)
) -> Image.Image:
    """Two dark lungs on a bright body, a bright spine between them; `lungs` as a box."""
    width, height = size
    left, top, right, bottom = lungs
    y, x = np.mgrid[0:height, 0:width]
    grey = np.full((height, width), 170.0)
    middle, reach = (left + right) / 2, (right - left) / 4 - 8
    for centre in ((left + middle) / 2 - 4, (right + middle) / 2 + 4):
        across, down = (x - centre) / reach, (y - (top + bottom) / 2) / ((bottom - top) / 2)
        grey -= 120 * np.clip(1.6 - 1.6 * (across**2 + down**2), 0, 1)
    grey[:, int(middle) - 8 : int(middle) + 8] = 230
    return Image.fromarray(grey.astype(np.uint8))


@pytest.mark.parametrize("lungs", [(60, 40, 240, 170), (90, 50, 230, 160), (40, 30, 220, 190)])
def test_lungs_are_found_where_they_are(lungs: tuple[int, int, int, int]) -> None:
    found = lung_box(chest(lungs))
    for edge, true, side in zip(found, lungs, (300, 240, 300, 240), strict=True):
        assert abs(edge - true) < 0.12 * side
    assert (found[2] - found[0]) * (found[3] - found[1]) < 0.75 * 300 * 240


def test_lungs_are_found_at_any_size_and_exposure() -> None:
    image = chest()
    large = image.resize((900, 720), Image.Resampling.BICUBIC)
    dull = image.point([round(60 + 0.4 * value) for value in range(256)]).convert("RGB")
    for edge, threefold, other in zip(
        lung_box(image), lung_box(large), lung_box(dull), strict=True
    ):
        assert abs(threefold / 3 - edge) < 8
        assert abs(other - edge) < 8


def test_region_lungs_is_what_the_model_sees() -> None:
    image = chest()
    np.testing.assert_array_equal(
        standardised(image, region="lungs"), standardised(image.crop(lung_box(image)))
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("value", [0, 255])
def test_what_is_no_chest_keeps_its_middle(size: tuple[int, int], value: int) -> None:
    left, top, right, bottom = lung_box(Image.new("L", size, value))
    assert 0 <= left <= size[0] / 4
    assert 0.75 * size[0] <= right <= size[0]
    assert 0 <= top <= size[1] / 4
    assert 0.65 * size[1] <= bottom <= size[1]
    assert np.isfinite(preprocess(Image.new("L", size, value), spec(region="lungs"))).all()
