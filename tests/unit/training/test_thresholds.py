import numpy as np
import pytest

from cxr_training.thresholds import choose_thresholds, uncertain_bands


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


def test_the_grey_zone_holds_what_is_not_certain_either_way() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 400)
    own = np.concatenate([rng.beta(5, 3, 400), rng.beta(3, 5, 400)])
    probabilities = np.column_stack([own, 1 - own])
    thresholds = choose_thresholds(probabilities, labels, ("a", "b"))
    bands = uncertain_bands(probabilities, labels, ("a", "b"), thresholds)
    low, high = bands["a"]
    assert low < thresholds["a"] < high
    assert (own[labels == "a"] < low).mean() == pytest.approx(0.05, abs=0.01)
    assert (own[labels == "b"] >= high).mean() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("images", [1, 19, 20, 21, 40, 50, 100, 137])
def test_at_most_one_in_twenty_of_the_others_lies_beyond_the_zone(images: int) -> None:
    others = np.linspace(0.1, 0.9, images)
    probabilities = np.concatenate([others, [0.05]])
    probabilities = np.column_stack([probabilities, 1 - probabilities])
    labels = np.asarray(["b"] * images + ["a"])
    _, high = uncertain_bands(probabilities, labels, ("a", "b"), {"a": 0.0, "b": 0.0})["a"]
    assert (others >= high).mean() <= 0.05
    lower = others[others < high]
    assert not len(lower) or (others >= lower[-1]).mean() > 0.05


def test_the_grey_zone_ends_at_one_at_most() -> None:
    probabilities = np.asarray([[1.0, 0.0], [1.0, 0.0]])
    thresholds = {"a": 0.5, "b": 0.5}
    bands = uncertain_bands(probabilities, np.asarray(["a", "b"]), ("a", "b"), thresholds)
    assert bands["a"][1] == 1.0


def test_a_model_without_doubt_has_no_grey_zone() -> None:
    probabilities = np.asarray([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]])
    labels = np.asarray(["a", "a", "b", "b"])
    thresholds = choose_thresholds(probabilities, labels, ("a", "b"))
    bands = uncertain_bands(probabilities, labels, ("a", "b"), thresholds)
    assert bands == {name: (value, value) for name, value in thresholds.items()}
