import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import softmax

from cxr_training.calibration import (
    TEMPERATURES,
    apply_temperature,
    at_bound,
    brier_score,
    choose_thresholds_for_sensitivity,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from cxr_training.errors import TrainingError

CLASSES = ("a", "b", "c")


def _drawn(
    images: int = 4000, seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.str_]]:
    """Probabilities that are right about themselves: labels are drawn from them."""
    random = np.random.default_rng(seed)
    probabilities = softmax(random.normal(0, 2, (images, len(CLASSES))), axis=1)
    drawn = (probabilities.cumsum(axis=1) > random.random((images, 1))).argmax(axis=1)
    return probabilities, np.asarray(CLASSES)[drawn]


def test_a_calibrated_model_keeps_its_temperature() -> None:
    probabilities, labels = _drawn()
    assert fit_temperature(probabilities, labels, CLASSES) == pytest.approx(1, abs=0.08)
    assert expected_calibration_error(probabilities, labels, CLASSES) < 0.02


@pytest.mark.parametrize("sureness", [0.4, 3.0])
def test_a_wrongly_sure_model_is_corrected(sureness: float) -> None:
    probabilities, labels = _drawn()
    distorted = apply_temperature(probabilities, 1 / sureness)
    temperature = fit_temperature(distorted, labels, CLASSES)
    assert temperature == pytest.approx(sureness, rel=0.08)
    corrected = apply_temperature(distorted, temperature)
    assert (corrected.argmax(axis=1) == distorted.argmax(axis=1)).all()
    before = expected_calibration_error(distorted, labels, CLASSES)
    assert expected_calibration_error(corrected, labels, CLASSES) < before / 3
    assert brier_score(corrected, labels, CLASSES) < brier_score(distorted, labels, CLASSES)


@pytest.mark.parametrize("sureness", [0.4, 0.99])
def test_a_perfectly_separated_split_sharpens_nothing(sureness: float) -> None:
    probabilities = np.full((3, 3), (1 - sureness) / 2)
    np.fill_diagonal(probabilities, sureness)
    assert fit_temperature(probabilities, np.asarray(CLASSES), CLASSES) == 1


def test_a_temperature_at_its_bound_is_told() -> None:
    # Always wrong: the flatter, the better.
    probabilities = np.full((3, 3), 0.2) + 0.4 * np.eye(3)
    temperature = fit_temperature(probabilities, np.asarray(list("bca")), CLASSES)
    assert at_bound(temperature)
    assert at_bound(TEMPERATURES[0])
    assert not at_bound(1.0)
    assert not at_bound(19.0)


def test_a_certain_mistake_does_not_break_the_fit() -> None:
    probabilities = np.asarray([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    temperature = fit_temperature(probabilities, np.asarray(list("abcb")), CLASSES)
    assert np.isfinite(apply_temperature(probabilities, temperature)).all()


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_images() -> None:
    probabilities = np.asarray([[0.95, 0.05, 0]] * 3 + [[0.35, 0.65, 0]])
    labels = np.asarray(list("aaba"))
    # Bin (0.9, 1]: 2 of 3 right at 0.95; bin (0.6, 0.7]: 0 of 1 right at 0.65.
    expected = 3 / 4 * (0.95 - 2 / 3) + 1 / 4 * 0.65
    assert expected_calibration_error(probabilities, labels, CLASSES) == pytest.approx(expected)
    filled = [row for row in reliability(probabilities, labels, CLASSES) if row.images]
    assert [(row.low, row.images, row.accuracy) for row in filled] == [
        (0.6, 1, 0),
        (0.9, 3, pytest.approx(2 / 3)),
    ]
    assert filled[1].confidence == pytest.approx(0.95)


def test_an_empty_bin_has_no_figures() -> None:
    first = reliability(np.asarray([[0.9, 0.1, 0]]), np.asarray(["a"]), CLASSES)[0]
    assert (first.images, first.accuracy, first.confidence) == (0, None, None)


def test_brier_score_runs_from_right_to_wrong() -> None:
    certain = np.asarray([[1.0, 0, 0]])
    assert brier_score(certain, np.asarray(["a"]), CLASSES) == 0
    assert brier_score(certain, np.asarray(["b"]), CLASSES) == 2


def test_thresholds_reach_the_sensitivity_and_no_higher_one_does() -> None:
    probabilities, labels = _drawn(300)
    thresholds = choose_thresholds_for_sensitivity(probabilities, labels, CLASSES, 0.9)
    for column, name in enumerate(CLASSES):
        scores = probabilities[labels == name, column]
        assert (scores >= thresholds[name]).mean() >= 0.9
        next_higher = np.sort(scores[scores >= thresholds[name]])[1]
        assert (scores >= next_higher).mean() < 0.9


def test_full_sensitivity_finds_every_image() -> None:
    probabilities, labels = _drawn(50)
    thresholds = choose_thresholds_for_sensitivity(probabilities, labels, CLASSES, 1.0)
    assert (probabilities[labels == "a", 0] >= thresholds["a"]).all()


@pytest.mark.parametrize("sensitivity", [0, -0.1, 1.01, float("nan")])
def test_an_impossible_sensitivity_is_refused(sensitivity: float) -> None:
    with pytest.raises(TrainingError, match="sensitivity"):
        choose_thresholds_for_sensitivity(*_drawn(10), CLASSES, sensitivity)


def test_a_class_without_images_has_no_threshold() -> None:
    with pytest.raises(TrainingError, match="'c'"):
        choose_thresholds_for_sensitivity(
            np.full((2, 3), 1 / 3), np.asarray(["a", "b"]), CLASSES, 0.9
        )


def test_a_label_that_is_no_class_is_named() -> None:
    with pytest.raises(TrainingError, match="'d'"):
        fit_temperature(np.full((1, 3), 1 / 3), np.asarray(["d"]), CLASSES)


def test_no_images_are_refused() -> None:
    with pytest.raises(TrainingError, match="at least one image"):
        fit_temperature(np.empty((0, 3)), np.asarray([], dtype=str), CLASSES)


def test_probabilities_of_other_images_are_refused() -> None:
    with pytest.raises(TrainingError, match="do not fit"):
        brier_score(np.full((2, 3), 1 / 3), np.asarray(["a"]), CLASSES)


def test_a_temperature_is_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        apply_temperature(np.full((1, 3), 1 / 3), 0)
