"""The trivial baseline: a random forest on numbers that have nothing to do with the lung.

What it reaches is what scanner, hospital and file history give away. A model's figure means
something only as far as it exceeds this one.
"""

import sys
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from scipy import ndimage
from sklearn.ensemble import RandomForestClassifier
from tqdm import tqdm

from cxr.decode import decode
from cxr.errors import BadImageError
from cxr_training.errors import TrainingError

Float64Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.str_]
Mask = npt.NDArray[np.bool_]

_BINS = 16
_SIDES = ("top", "bottom", "left", "right")
_CORNERS = ("top left", "top right", "bottom left", "bottom right")
TRIVIAL_FEATURES = (
    *(f"share of grey {256 // _BINS * number}+" for number in range(_BINS)),
    "mean grey", "deviation of grey", "1st percentile", "median", "99th percentile",
    *(f"brightness of the {side} border" for side in _SIDES), "deviation of the border",
    *(f"brightness of the {corner} corner" for corner in _CORNERS),
    "share of black", "share of white",
    "sharpness (log variance of the Laplacian)", "mean gradient", "noise",
    "width", "height", "aspect ratio", "log file size", "bytes per pixel", "JPEG quality table",
)  # fmt: skip
TREES = 200
# Sharpness is measured at one size, so that it does not repeat the width.
_SIDE = 256
_BORDER = 0.04


def trivial_features(frame: pd.DataFrame) -> Float64Array:
    """The trivial numbers of a manifest's images.

    Returns:
        float64 `[images, len(TRIVIAL_FEATURES)]`.

    Raises:
        TrainingError: an image cannot be used.
    """
    hidden = not sys.stderr.isatty()
    with tqdm(frame["path"], desc="trivial numbers", unit="image", disable=hidden) as paths:
        rows = [_numbers(Path(path)) for path in paths]
    return np.asarray(rows, dtype=np.float64).reshape(len(frame), len(TRIVIAL_FEATURES))


def trivial_predictions(
    features: Float64Array,
    labels: Labels,
    classes: tuple[str, ...],
    splits: Iterable[tuple[Mask, Mask]],
    *,
    seed: int,
) -> Float64Array:
    """Train the baseline on each split's training images and ask it about its test images.

    Args:
        features: of :func:`trivial_features`.
        labels: class name per image.
        classes: class names, in the order of the columns of the result; one that training lacks
            gets probability 0.
        splits: pairs of bool `[images]`: training, test.
        seed: of the forests.

    Returns:
        float64 `[images, classes]`; NaN for images that no split tests.
    """
    probabilities = np.full((len(features), len(classes)), np.nan)
    for training, test in splits:
        forest = RandomForestClassifier(
            TREES, class_weight="balanced_subsample", random_state=seed
        ).fit(features[training], labels[training])
        answers = np.zeros((int(test.sum()), len(classes)))
        columns = [classes.index(str(name)) for name in forest.classes_]
        answers[:, columns] = forest.predict_proba(features[test])
        probabilities[test] = answers
    return probabilities


def fold_splits(folds: npt.NDArray[np.generic]) -> list[tuple[Mask, Mask]]:
    """Training and test masks of a cross-validation: each fold against all others."""
    return [(folds != fold, folds == fold) for fold in np.unique(folds)]


def _numbers(path: Path) -> list[float]:
    try:
        data = path.read_bytes()
        image = decode(data).convert("L")
    except OSError as error:
        raise TrainingError(f"Cannot read an image of the manifest: {error.strerror}.") from error
    except BadImageError as error:
        raise TrainingError(f"An image of the manifest cannot be used: {error}") from error
    grey = np.asarray(image, dtype=np.float64)
    return [
        *_brightness(grey),
        *_edges(grey),
        float((grey == 0).mean()),
        float((grey == 255).mean()),  # noqa: PLR2004 - white
        *_texture(image),
        image.width,
        image.height,
        image.width / image.height,
        float(np.log(len(data))),
        len(data) / (image.width * image.height),
        _quality(data),
    ]


def _brightness(grey: Float64Array) -> list[float]:
    counts, _ = np.histogram(grey, bins=_BINS, range=(0, 256))
    return [
        *(counts / grey.size),
        grey.mean(),
        grey.std(),
        *np.percentile(grey, (1, 50, 99)),
    ]


def _edges(grey: Float64Array) -> list[float]:
    high, wide = (max(1, round(size * _BORDER)) for size in grey.shape)
    sides = (grey[:high], grey[-high:], grey[:, :wide], grey[:, -wide:])
    corners = (
        grey[:high, :wide],
        grey[:high, -wide:],
        grey[-high:, :wide],
        grey[-high:, -wide:],
    )
    spread = float(np.concatenate([side.ravel() for side in sides]).std())
    return [*(side.mean() for side in sides), spread, *(corner.mean() for corner in corners)]


def _texture(image: Image.Image) -> list[float]:
    small = np.asarray(image.resize((_SIDE, _SIDE)), dtype=np.float64)
    laplacian = ndimage.laplace(small)
    across, down = np.gradient(small)
    noise = np.median(np.abs(small - ndimage.uniform_filter(small, 3)))
    return [float(np.log1p(laplacian.var())), float(np.hypot(across, down).mean()), float(noise)]


def _quality(data: bytes) -> float:
    """Mean of the first JPEG quantisation table: high for strong compression, 0 without one."""
    with Image.open(BytesIO(data)) as image:
        tables: dict[int, list[int]] = getattr(image, "quantization", {})
    return float(np.mean(tables[0])) if 0 in tables else 0.0
