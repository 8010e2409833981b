"""Metrics of a model on one split, with bootstrap intervals that respect patients."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import roc_auc_score

from cxr.config import ClassMetrics, Interval, Metrics
from cxr_training.errors import TrainingError

Split = Literal["train", "validation", "test"]
Float64Array = npt.NDArray[np.float64]

REPLICATES = 2000
METHOD = (
    f"95 % percentile intervals from {REPLICATES} bootstrap replicates that resample whole groups "
    "(patients with their near-duplicates); the class is the most probable one"
)
_PERCENTILES = (2.5, 97.5)


class SplitMetrics(Metrics):
    """Metrics of any split; a model's configuration holds those of the test split only."""

    split: Split  # type: ignore[assignment]


def evaluate_predictions(
    frame: pd.DataFrame,
    probabilities: npt.NDArray[np.floating],
    labels: tuple[str, ...],
    *,
    seed: int,
    split: Split = "test",
) -> SplitMetrics:
    """Compare probabilities with a manifest's labels.

    The decision is the most probable class. A figure that is not defined, such as the precision of
    a class that was never predicted, is `None`.

    Args:
        frame: the manifest's rows of that split.
        probabilities: `[images, classes]`, in the order of `frame` and `labels`.
        labels: class names; every label of `frame` must be among them.
        seed: of the bootstrap.
        split: the split's name.

    Raises:
        TrainingError: no images, or a label that the model does not know.
    """
    if frame.empty:
        raise TrainingError(f"The {split} split holds no images.")
    unknown = sorted(set(frame["label"]) - set(labels))
    if unknown:
        raise TrainingError(f"The model does not know the label {unknown[0]!r}.")
    truth = np.asarray([labels.index(name) for name in frame["label"]])
    predicted = np.asarray(probabilities).argmax(axis=1)
    confusions = _group_confusions(frame["group"], truth, predicted, len(labels))
    total = confusions.sum(axis=0)
    replicates = _resampled(confusions, seed)
    return SplitMetrics(
        split=split,
        images=len(frame),
        groups=len(confusions),
        method=METHOD,
        accuracy=_interval(_accuracy(total[None]), _accuracy(replicates)),
        balanced_accuracy=_interval(
            _balanced_accuracy(total[None]), _balanced_accuracy(replicates)
        ),
        per_class={
            name: _class_metrics(total, index, truth, probabilities[:, index])
            for index, name in enumerate(labels)
        },
        per_source={
            str(source): _source_accuracy(rows, truth[where], predicted[where], len(labels), seed)
            for source, rows, where in _by_source(frame)
        },
        confusion=tuple(tuple(int(count) for count in row) for row in total),
    )


def _by_source(
    frame: pd.DataFrame,
) -> list[tuple[object, pd.DataFrame, npt.NDArray[np.bool_]]]:
    sources = frame["source"].to_numpy()
    return [(name, frame[sources == name], sources == name) for name in sorted(set(sources))]


def _source_accuracy(
    rows: pd.DataFrame,
    truth: npt.NDArray[np.int_],
    predicted: npt.NDArray[np.int_],
    classes: int,
    seed: int,
) -> Interval:
    confusions = _group_confusions(rows["group"], truth, predicted, classes)
    total = confusions.sum(axis=0)
    return _interval(_accuracy(total[None]), _accuracy(_resampled(confusions, seed)))


def _group_confusions(
    groups: "pd.Series[str]",
    truth: npt.NDArray[np.int_],
    predicted: npt.NDArray[np.int_],
    classes: int,
) -> npt.NDArray[np.int_]:
    """Confusion counts of each group: `[groups, truth, predicted]`."""
    codes, names = pd.factorize(groups, sort=True)
    confusions = np.zeros((len(names), classes, classes), dtype=np.int_)
    np.add.at(confusions, (codes, truth, predicted), 1)
    return confusions


def _resampled(confusions: npt.NDArray[np.int_], seed: int) -> npt.NDArray[np.int_]:
    """Confusion counts of bootstrap replicates: `[replicates, truth, predicted]`."""
    groups = len(confusions)
    # Drawing groups with replacement: how often each one comes is multinomial.
    draws = np.random.default_rng(seed).multinomial(
        groups, np.full(groups, 1 / groups), size=REPLICATES
    )
    return np.tensordot(draws, confusions, axes=1)


def _accuracy(confusions: npt.NDArray[np.int_]) -> Float64Array:
    correct = np.trace(confusions, axis1=1, axis2=2)
    return np.asarray(correct / confusions.sum(axis=(1, 2)))


def _balanced_accuracy(confusions: npt.NDArray[np.int_]) -> Float64Array:
    """Mean sensitivity over the classes that occur."""
    support = confusions.sum(axis=2)
    correct = np.diagonal(confusions, axis1=1, axis2=2)
    sensitivity = correct / np.maximum(support, 1)
    return np.asarray(sensitivity.sum(axis=1) / (support > 0).sum(axis=1))


def _interval(value: Float64Array, replicates: Float64Array) -> Interval:
    low, high = np.percentile(replicates, _PERCENTILES)
    return Interval(value=float(value[0]), low=float(low), high=float(high))


def _class_metrics(
    confusion: npt.NDArray[np.int_],
    index: int,
    truth: npt.NDArray[np.int_],
    scores: npt.NDArray[np.floating],
) -> ClassMetrics:
    hit = int(confusion[index, index])
    support = int(confusion[index].sum())
    called = int(confusion[:, index].sum())
    negatives = int(confusion.sum()) - support
    return ClassMetrics(
        support=support,
        sensitivity=_ratio(hit, support),
        specificity=_ratio(negatives - (called - hit), negatives),
        precision=_ratio(hit, called),
        f1=_ratio(2 * hit, support + called),
        roc_auc=float(roc_auc_score(truth == index, scores)) if support and negatives else None,
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
