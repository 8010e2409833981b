from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_training.baselines import (
    TRIVIAL_FEATURES,
    fold_splits,
    trivial_features,
    trivial_predictions,
)
from cxr_training.errors import TrainingError


def _saved(folder: Path, name: str, brightness: int, **options: object) -> Path:
    noise = np.random.default_rng(brightness).normal(brightness, 20, (80, 120)).clip(0, 255)
    path = folder / name
    Image.fromarray(noise.astype(np.uint8)).save(path, **options)
    return path


def _one(features: np.ndarray, row: int, name: str) -> float:
    return float(features[row, TRIVIAL_FEATURES.index(name)])


def test_numbers_tell_files_and_not_lungs(tmp_path: Path) -> None:
    paths = [
        _saved(tmp_path, "dark.jpg", 40, quality=30),
        _saved(tmp_path, "bright.jpg", 200, quality=95),
        _saved(tmp_path, "bright.png", 200),
    ]
    features = trivial_features(pd.DataFrame({"path": [str(path) for path in paths]}))
    assert features.shape == (3, len(TRIVIAL_FEATURES))
    assert np.isfinite(features).all()
    assert _one(features, 0, "mean grey") == pytest.approx(40, abs=5)
    assert _one(features, 1, "mean grey") == pytest.approx(200, abs=5)
    low, high, none = (_one(features, row, "JPEG quality table") for row in range(3))
    assert low > high > none == 0
    assert _one(features, 0, "aspect ratio") == 1.5
    assert features[:, :16].sum(axis=1) == pytest.approx(1)


def test_the_forest_is_tested_on_images_it_has_not_seen() -> None:
    random = np.random.default_rng(0)
    labels = np.asarray(["a", "b"] * 20)
    noise = random.normal(size=(40, 5))
    # The first fold can be learned from the second; the other way round only noise is learned.
    folds = np.repeat([0, 1], 20)
    noise[:, 0] = np.where(folds == 0, 0, labels == "b")
    answers = trivial_predictions(noise, labels, ("a", "b"), fold_splits(folds), seed=0)
    assert answers.sum(axis=1) == pytest.approx(1)
    assert (answers[20:].argmax(axis=1) == (labels[20:] == "b")).mean() < 0.8


def test_a_class_that_training_lacks_gets_no_probability() -> None:
    labels = np.asarray(list("aabbc"))
    training, test = np.asarray([1, 1, 1, 1, 0], bool), np.asarray([0, 0, 0, 0, 1], bool)
    answer = trivial_predictions(
        np.arange(5.0)[:, None], labels, ("a", "b", "c"), [(training, test)], seed=0
    )
    assert np.isnan(answer[:4]).all()
    assert answer[4, 2] == 0
    assert answer[4].sum() == pytest.approx(1)


def test_an_unusable_image_is_an_error_that_names_no_file(tmp_path: Path) -> None:
    broken = tmp_path / "Jane-Doe.jpg"
    broken.write_bytes(b"no image")
    for path in (broken, tmp_path / "Jane-Doe-2.jpg"):
        with pytest.raises(TrainingError, match="image of the manifest") as caught:
            trivial_features(pd.DataFrame({"path": [str(path)]}))
        assert "Jane" not in str(caught.value)
