import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_training.errors import TrainingError
from cxr_training.head import choose_thresholds, fit_head

Data = tuple[npt.NDArray[np.float64], npt.NDArray[np.str_], npt.NDArray[np.str_]]


def _data(classes: int, images: int = 90, features: int = 120) -> Data:
    """Overlapping classes of unequal size, in features of very different scales."""
    random = np.random.default_rng(classes)
    labels = np.minimum(np.arange(images) % (classes + 1), classes - 1)
    centres = random.normal(size=(classes, features)) * 0.3
    scales = np.logspace(-3, 3, features)
    values = (centres[labels] + random.normal(size=(images, features))) * scales + 5
    groups = np.asarray([f"p{index // 2}" for index in range(images)])
    return values, np.asarray(["abcdef"[label] for label in labels]), groups


@pytest.mark.parametrize("classes", [2, 3])
def test_folding_keeps_the_standardised_regression(classes: int) -> None:
    features, labels, groups = _data(classes)
    head, chosen = fit_head(features, labels, groups, seed=0)
    plain = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=chosen.chosen, class_weight="balanced", max_iter=5000, tol=1e-6),
    ).fit(features, labels)
    assert head.labels == tuple(plain.classes_)
    np.testing.assert_allclose(
        head.predict_proba(features), plain.predict_proba(features), atol=1e-3
    )


def test_chooses_the_strength_of_lowest_loss_in_folds_of_whole_groups() -> None:
    features, labels, groups = _data(3)
    _, chosen = fit_head(features, labels, groups, seed=0)
    assert chosen.folds == 5
    assert chosen.log_loss[chosen.chosen] == min(chosen.log_loss.values())


def test_copies_of_a_patient_do_not_pass_for_evidence() -> None:
    # Noise, each image five times over: only a split that parts the copies can look accurate.
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(size=(30, 40)), 5, axis=0)
    labels = np.repeat(np.asarray(["a", "b"] * 15), 5)
    groups = np.repeat(np.asarray([f"p{index}" for index in range(30)]), 5)
    _, chosen = fit_head(features, labels, groups, seed=0)
    assert chosen.accuracy[chosen.chosen] < 0.75


def test_the_same_seed_gives_the_same_head() -> None:
    first, _ = fit_head(*_data(3), seed=4)
    second, _ = fit_head(*_data(3), seed=4)
    np.testing.assert_array_equal(first.weight, second.weight)
    np.testing.assert_array_equal(first.bias, second.bias)


def test_one_class_is_not_enough() -> None:
    features, labels, groups = _data(2)
    with pytest.raises(TrainingError, match="at least two classes"):
        fit_head(features, np.full_like(labels, "a"), groups, seed=0)


def test_a_class_of_one_patient_is_not_enough() -> None:
    features, labels, groups = _data(2)
    groups[labels == "b"] = "p0"
    with pytest.raises(TrainingError, match="at least two groups"):
        fit_head(features, labels, groups, seed=0)


def test_threshold_lies_between_classes_that_are_apart() -> None:
    positive = np.asarray([0.9, 0.7, 0.3, 0.1])
    thresholds = choose_thresholds(
        np.stack([positive, 1 - positive], axis=1), np.asarray(["a", "a", "b", "b"]), ("a", "b")
    )
    assert thresholds == pytest.approx({"a": 0.5, "b": 0.5})


def test_threshold_has_the_largest_youden_index() -> None:
    positive = np.asarray([0.8, 0.6, 0.5, 0.4, 0.2])
    labels = np.asarray(["a", "b", "a", "b", "b"])
    thresholds = choose_thresholds(np.stack([positive, 1 - positive], axis=1), labels, ("a", "b"))
    # Above 0.45: both a, and one of three b. Above 0.7: one of two a, and no b.
    assert thresholds["a"] == pytest.approx(0.45)


def test_threshold_of_a_useless_model_still_is_a_probability() -> None:
    thresholds = choose_thresholds(np.full((4, 2), 0.5), np.asarray(["a", "b"] * 2), ("a", "b"))
    assert all(0 <= threshold <= 1 for threshold in thresholds.values())
