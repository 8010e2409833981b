import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from sklearn.metrics import (
    average_precision_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from cxr.config import Interval
from cxr_training.calibration import brier_score, expected_calibration_error
from cxr_training.errors import TrainingError
from cxr_training.evaluation import compare_predictions, evaluate_predictions

LABELS = ("a", "b", "c")


def _frame(truth: str, groups: list[str] | None = None, source: str = "s") -> pd.DataFrame:
    names = groups or [f"p{index}" for index in range(len(truth))]
    return pd.DataFrame({"label": list(truth), "group": names, "source": source})


def _predicting(predicted: str, certainty: float = 0.8) -> npt.NDArray[np.float64]:
    rows = np.full((len(predicted), len(LABELS)), (1 - certainty) / 2)
    rows[np.arange(len(predicted)), [LABELS.index(name) for name in predicted]] = certainty
    return rows


def test_figures_are_those_of_the_confusion_matrix() -> None:
    metrics = evaluate_predictions(_frame("aaabbc"), _predicting("aabbba"), LABELS, seed=0)
    assert metrics.confusion == ((2, 1, 0), (0, 2, 0), (1, 0, 0))
    assert metrics.accuracy.value == pytest.approx(4 / 6)
    assert metrics.balanced_accuracy.value == pytest.approx((2 / 3 + 1 + 0) / 3)
    a = metrics.per_class["a"]
    assert a.support == 3
    for figure in (a.sensitivity, a.specificity, a.precision, a.f1):
        assert figure is not None
        assert figure.value == pytest.approx(2 / 3)


def test_roc_auc_counts_pairs_in_the_right_order() -> None:
    probabilities = np.asarray([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.6, 0.4, 0], [0.1, 0.9, 0]])
    metrics = evaluate_predictions(_frame("aabb"), probabilities, LABELS, seed=0)
    roc_auc = metrics.per_class["a"].roc_auc
    assert roc_auc is not None
    assert roc_auc.value == pytest.approx(3 / 4)


def test_what_is_not_defined_is_none() -> None:
    metrics = evaluate_predictions(_frame("aab"), _predicting("aab"), LABELS, seed=0)
    absent = metrics.per_class["c"]
    assert absent.support == 0
    assert absent.specificity is not None
    assert absent.specificity.value == 1
    assert (absent.sensitivity, absent.precision, absent.f1) == (None,) * 3
    assert (absent.roc_auc, absent.average_precision) == (None, None)


def test_intervals_hold_their_value_and_narrow_with_more_patients() -> None:
    few = evaluate_predictions(_frame("aabb"), _predicting("aaba"), LABELS, seed=0)
    many = evaluate_predictions(_frame("aabb" * 50), _predicting("aaba" * 50), LABELS, seed=0)
    for metrics in (few, many):
        for interval in (metrics.accuracy, metrics.balanced_accuracy):
            assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert many.accuracy.high - many.accuracy.low < few.accuracy.high - few.accuracy.low


def test_more_images_of_the_same_patients_do_not_narrow_the_interval() -> None:
    once = evaluate_predictions(_frame("aabb" * 5), _predicting("aaba" * 5), LABELS, seed=0)
    names = [f"p{index}" for index in range(20)] * 10
    copies = evaluate_predictions(
        _frame("aabb" * 50, names), _predicting("aaba" * 50), LABELS, seed=0
    )
    assert copies.groups == once.groups == 20
    assert (copies.accuracy.low, copies.accuracy.high) == pytest.approx(
        (once.accuracy.low, once.accuracy.high)
    )


def test_each_source_is_measured_on_its_own() -> None:
    frame = pd.concat([_frame("ab", source="good"), _frame("ab", source="bad")])
    metrics = evaluate_predictions(frame, _predicting("abba"), LABELS, seed=0)
    assert {name: row.accuracy.value for name, row in metrics.per_source.items()} == {
        "good": 1,
        "bad": 0,
    }


def test_the_same_seed_gives_the_same_intervals() -> None:
    frame, probabilities = _frame("aabbcc"), _predicting("abbacc")
    first = evaluate_predictions(frame, probabilities, LABELS, seed=9)
    assert evaluate_predictions(frame, probabilities, LABELS, seed=9) == first


def test_a_label_the_model_does_not_know_is_named() -> None:
    with pytest.raises(TrainingError, match="'d'"):
        evaluate_predictions(_frame("ad"), _predicting("ab"), LABELS, seed=0)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(TrainingError, match="validation split holds no images"):
        evaluate_predictions(_frame(""), np.empty((0, 3)), LABELS, seed=0, split="validation")


def _random(
    images: int = 90, patients: int = 40, seed: int = 0
) -> tuple[pd.DataFrame, npt.NDArray[np.float64]]:
    """Noisy predictions, rounded so that scores are often equal."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, len(LABELS), images)
    scores = random.random((images, len(LABELS))) + np.eye(len(LABELS))[truth] * 0.6
    probabilities = np.round(scores / scores.sum(axis=1, keepdims=True), 1)
    groups = [f"p{number}" for number in random.integers(0, patients, images)]
    frame = _frame("".join(LABELS[index] for index in truth), groups)
    return frame, probabilities


def test_every_figure_agrees_with_scikit_learn() -> None:
    frame, probabilities = _random()
    metrics = evaluate_predictions(frame, probabilities, LABELS, seed=0)
    truth = frame["label"].to_numpy()
    predicted = np.asarray(LABELS)[probabilities.argmax(axis=1)]
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="macro")
    areas = {name: (truth == name, probabilities[:, LABELS.index(name)]) for name in LABELS}
    roc = {name: roc_auc_score(*pair) for name, pair in areas.items()}
    average = {name: average_precision_score(*pair) for name, pair in areas.items()}
    assert metrics.balanced_accuracy.value == pytest.approx(recall)
    assert metrics.macro_f1.value == pytest.approx(f1)
    assert _value(metrics.macro_precision) == pytest.approx(precision)
    assert _value(metrics.macro_roc_auc) == pytest.approx(np.mean(list(roc.values())))
    assert _value(metrics.macro_average_precision) == pytest.approx(np.mean(list(average.values())))
    for name, row in metrics.per_class.items():
        assert _value(row.roc_auc) == pytest.approx(roc[name])
        assert _value(row.average_precision) == pytest.approx(average[name])


def test_intervals_of_areas_agree_with_a_plain_bootstrap() -> None:
    frame, probabilities = _random()
    metrics = evaluate_predictions(frame, probabilities, LABELS, seed=0)
    interval = metrics.per_class["a"].roc_auc
    assert interval is not None
    groups, codes = np.unique(frame["group"], return_inverse=True)
    random = np.random.default_rng(5)
    areas = []
    for _ in range(250):
        drawn = random.integers(0, len(groups), len(groups))
        rows = np.concatenate([np.flatnonzero(codes == group) for group in drawn])
        areas.append(roc_auc_score(frame["label"].iloc[rows] == "a", probabilities[rows, 0]))
    low, high = np.percentile(areas, (2.5, 97.5))
    assert (interval.low, interval.high) == (
        pytest.approx(low, abs=0.03),
        pytest.approx(high, abs=0.03),
    )


def test_calibration_figures_are_those_of_the_calibration_module() -> None:
    frame, probabilities = _random()
    metrics = evaluate_predictions(frame, probabilities, LABELS, seed=0)
    labels = frame["label"].to_numpy(dtype=str)
    error = expected_calibration_error(probabilities, labels, LABELS)
    assert metrics.expected_calibration_error.value == pytest.approx(error)
    assert metrics.expected_calibration_error.low >= 0
    assert metrics.brier_score.value == pytest.approx(brier_score(probabilities, labels, LABELS))


def test_figures_at_the_thresholds_stand_beside_those_of_the_likeliest_class() -> None:
    probabilities = np.asarray([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.3, 0.7, 0], [0.1, 0.9, 0]])
    thresholds = {"a": 0.35, "b": 0.65, "c": 0.5}
    metrics = evaluate_predictions(
        _frame("aabb"), probabilities, LABELS, seed=0, thresholds=thresholds
    )
    at = metrics.per_class["a"].at_threshold
    assert at is not None
    assert at.threshold == 0.35
    assert (_value(at.sensitivity), _value(at.specificity)) == (1, 1)
    assert _value(metrics.per_class["a"].sensitivity) == 0.5
    absent = metrics.per_class["c"].at_threshold
    assert absent is not None
    assert absent.precision is None


def test_sexes_ages_and_views_are_measured_apart_and_the_unknown_are_counted() -> None:
    frame = _frame("ababab").assign(
        sex=["F", "F", "M", "M", None, None],
        age=[17, 18, 39.5, 85, 60, np.nan],
        view=["PA"] * 6,
    )
    metrics = evaluate_predictions(frame, _predicting("abbaab"), LABELS, seed=0)
    assert list(metrics.per_sex) == ["F", "M", "unknown"]
    assert {name: row.accuracy.value for name, row in metrics.per_sex.items()} == {
        "F": 1,
        "M": 0,
        "unknown": 1,
    }
    assert {name: row.images for name, row in metrics.per_age.items()} == {
        "0-17": 1,
        "18-39": 2,
        "60-79": 1,
        "80+": 1,
        "unknown": 1,
    }
    one_class = metrics.per_age["0-17"]
    assert one_class.labels == {"a": 1, "b": 0, "c": 0}
    assert (one_class.balanced_accuracy, one_class.macro_roc_auc) == (None, None)
    assert list(metrics.per_view) == ["PA"]


def test_what_no_image_tells_makes_no_table() -> None:
    metrics = evaluate_predictions(_frame("ab").assign(sex=None), _predicting("ab"), LABELS, seed=0)
    assert (metrics.per_sex, metrics.per_age, metrics.per_view) == ({}, {}, {})


def test_two_models_are_compared_on_the_same_patients() -> None:
    frame = _frame("aabb" * 20)
    good, bad = _predicting("aabb" * 20), _predicting("abba" * 20)
    difference = compare_predictions(frame, good, bad, LABELS, seed=0)
    assert difference.value == pytest.approx(0.5)
    assert 0 < difference.low < difference.high < 1
    same = compare_predictions(frame, good, good, LABELS, figure="accuracy", seed=0)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_figure_that_no_image_defines_cannot_be_compared() -> None:
    frame, predicted = _frame("aa"), _predicting("aa")
    with pytest.raises(TrainingError, match="macro_roc_auc is not defined"):
        compare_predictions(frame, predicted, predicted, LABELS, figure="macro_roc_auc", seed=0)


def _value(interval: Interval | None) -> float:
    assert interval is not None
    return interval.value
