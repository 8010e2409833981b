import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from cxr_training.errors import TrainingError
from cxr_training.evaluation import evaluate_predictions

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
    assert a.sensitivity == pytest.approx(2 / 3)
    assert a.specificity == pytest.approx(2 / 3)
    assert a.precision == pytest.approx(2 / 3)
    assert a.f1 == pytest.approx(2 / 3)


def test_roc_auc_counts_pairs_in_the_right_order() -> None:
    probabilities = np.asarray([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.6, 0.4, 0], [0.1, 0.9, 0]])
    metrics = evaluate_predictions(_frame("aabb"), probabilities, LABELS, seed=0)
    assert metrics.per_class["a"].roc_auc == pytest.approx(3 / 4)


def test_what_is_not_defined_is_none() -> None:
    metrics = evaluate_predictions(_frame("aab"), _predicting("aab"), LABELS, seed=0)
    absent = metrics.per_class["c"]
    assert absent.support == 0
    assert absent.specificity == 1
    assert (absent.sensitivity, absent.precision, absent.f1, absent.roc_auc) == (None,) * 4


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
    assert {name: row.value for name, row in metrics.per_source.items()} == {"good": 1, "bad": 0}


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
