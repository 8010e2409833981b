"""What augmentation changes, what it leaves, and that it can be repeated."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cxr_training.augment import (
    Augmentation,
    augment,
    blurred,
    coarsened,
    exposed,
    moved,
    noisy,
    reencoded,
)

EVERYTHING = Augmentation(
    flip=0.5,
    rotation=10,
    shift=0.05,
    scale=0.1,
    contrast=0.3,
    gamma=0.5,
    invert=0.5,
    blur=0.01,
    resolution=0.4,
    noise=8,
    quality=30,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(height: int = 60, width: int = 80, mode: str = "L") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    grey = (
        127.5 + 60 * np.sin(9 * x / width) * np.cos(7 * y / height) + 40 * ((x // 4 + y // 4) % 2)
    )
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert(mode)


def dot(x: int, y: int, size: tuple[int, int] = (41, 41)) -> Image.Image:
    image = Image.new("L", size)
    image.paste(255, (x - 1, y - 1, x + 2, y + 2))
    return image


def brightest(image: Image.Image) -> tuple[int, int]:
    y, x = np.unravel_index(np.asarray(image).argmax(), (image.height, image.width))
    return int(x), int(y)


def pixels(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


def sharpness(image: Image.Image) -> float:
    return float(np.abs(np.diff(pixels(image), axis=1)).mean())


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_nothing_asked_changes_nothing(mode: str) -> None:
    image = picture(mode=mode)
    result = augment(image, Augmentation(), rng())
    np.testing.assert_array_equal(pixels(result), pixels(image))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_equal_generators_give_equal_images_and_others_do_not(mode: str) -> None:
    image = picture(mode=mode)
    first, again, other = (augment(image, EVERYTHING, rng(seed)) for seed in (3, 3, 4))
    assert (first.mode, first.size) == (mode, image.size)
    np.testing.assert_array_equal(pixels(first), pixels(again))
    assert np.abs(pixels(first) - pixels(other)).mean() > 1
    np.testing.assert_array_equal(pixels(image), pixels(picture(mode=mode)))


def test_a_grey_image_in_colour_stays_grey() -> None:
    result = pixels(augment(picture(mode="RGB"), EVERYTHING, rng()))
    np.testing.assert_allclose(result.std(axis=2), 0, atol=2)  # JPEG rounds its colours


def test_probability_zero_leaves_the_acquisition_alone() -> None:
    spec = Augmentation(
        contrast=0.5, gamma=1, blur=0.1, resolution=0.1, noise=50, quality=1, probability=0
    )
    np.testing.assert_array_equal(pixels(augment(picture(), spec, rng())), pixels(picture()))


def test_noise_reaches_the_network_from_a_large_image() -> None:
    result = augment(Image.new("L", (1800, 1200), 128), Augmentation(noise=20), rng(1))
    assert min(result.size) == 512
    assert pixels(result).std() > 1


@pytest.mark.parametrize("size", [(1, 1), (3, 200)])
def test_a_tiny_image_survives(size: tuple[int, int]) -> None:
    assert augment(Image.new("L", size, 90), EVERYTHING, rng()).size == size


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({}, (30, 20)),
        ({"rotation": 90}, (20, 10)),
        ({"shift": (5 / 41, 0)}, (35, 20)),
        ({"shift": (0, 5 / 41)}, (30, 25)),
        ({"scale": 1.5}, (35, 20)),
        ({"scale": 0.5}, (25, 20)),
    ],
)
def test_moved_brings_a_point_where_it_should(
    arguments: dict[str, Any], place: tuple[int, int]
) -> None:
    x, y = brightest(moved(dot(30, 20), **arguments))
    assert abs(x - place[0]) <= 1
    assert abs(y - place[1]) <= 1


def test_flip_mirrors() -> None:
    flipped = augment(dot(30, 20), Augmentation(flip=1), rng())
    assert brightest(flipped) == brightest(dot(10, 20))


def test_contrast_keeps_the_mean_and_scales_the_deviation() -> None:
    image = Image.fromarray((100 + 10 * np.eye(50)).astype(np.uint8))
    stretched = pixels(exposed(image, contrast=2))
    assert abs(stretched.mean() - pixels(image).mean()) < 0.5
    assert abs(stretched.std() / pixels(image).std() - 2) < 0.1


def test_gamma_is_an_exponent() -> None:
    result = exposed(Image.new("L", (4, 4), 128), gamma=2)
    np.testing.assert_array_equal(pixels(result), round(255 * (128 / 255) ** 2))


def test_invert_exchanges_black_and_white() -> None:
    result = augment(Image.new("L", (4, 4), 10), Augmentation(invert=1), rng())
    np.testing.assert_array_equal(pixels(result), 245)


def test_blur_and_coarsening_and_encoding_lose_detail() -> None:
    image = picture()
    for worse in (blurred(image, 0.02), coarsened(image, 0.3)):
        assert worse.size == image.size
        assert sharpness(worse) < 0.8 * sharpness(image)
    assert 0 < np.abs(pixels(reencoded(image, 5)) - pixels(image)).mean() < 20


def test_blur_is_relative_to_the_image() -> None:
    small, large = picture(60, 80), picture(60, 80).resize((320, 240), Image.Resampling.BICUBIC)
    back = blurred(large, 0.03).resize(small.size, Image.Resampling.BOX)
    np.testing.assert_allclose(pixels(blurred(small, 0.03)), pixels(back), atol=8)


def test_noise_has_the_deviation() -> None:
    result = pixels(noisy(Image.new("L", (200, 200), 128), 10, rng()))
    assert abs(result.std() - 10) < 0.3
    assert abs(result.mean() - 128) < 0.3


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rotation": -1}, "rotation"),
        ({"flip": 1.5}, "flip"),
        ({"probability": 2}, "probability"),
        ({"scale": 1}, "scale"),
        ({"resolution": 0}, "resolution"),
        ({"quality": 0}, "quality"),
        ({"quality": 101}, "quality"),
    ],
)
def test_an_impossible_amount_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Augmentation(**changes)


def test_an_image_cannot_be_scaled_away() -> None:
    with pytest.raises(ValueError, match="scale"):
        moved(picture(), scale=0)
