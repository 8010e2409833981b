"""Metrics of a model on one set of images, with bootstrap intervals that respect patients.

Every figure is a function of how often each image counts. Once each gives the figure itself; as
often as its group was drawn gives one bootstrap replicate. Areas under curves are sums over images
sorted by score, so that all replicates are computed at once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr.config import ClassMetrics, Interval, Metrics, OperatingPoint, Subgroup
from cxr_training.calibration import SMALLEST_PROBABILITY, calibration_gaps, squared_errors
from cxr_training.errors import TrainingError

Split = Literal["train", "validation", "test"]
Float64Array = npt.NDArray[np.float64]

REPLICATES = 2000
METHOD = (
    f"95 % percentile intervals from {REPLICATES} bootstrap replicates that resample whole groups "
    "(patients with their near-duplicates), reversed about the value for the expected calibration "
    "error, which resampling biases upward; replicates without the figure are left out; the class "
    "is the most probable one"
)
UNKNOWN = "unknown"
# Years: from the first up to, not including, the second.
AGE_BANDS = ((0, 18), (18, 40), (40, 60), (60, 80), (80, 150))

_PERCENTILES = (2.5, 97.5)
# Numbers in one block of replicates by images: 32 MB.
_BLOCK = 4_000_000

Figures = dict[str, Float64Array]


class SplitMetrics(Metrics):
    """Metrics of any images; a model's configuration holds those of the test split only."""

    split: Literal["train", "validation", "test", "out-of-fold"]  # type: ignore[assignment]


def evaluate_predictions(
    frame: pd.DataFrame,
    probabilities: npt.NDArray[np.floating],
    labels: tuple[str, ...],
    *,
    seed: int,
    split: Literal["train", "validation", "test", "out-of-fold"] = "test",
    thresholds: Mapping[str, float] | None = None,
) -> SplitMetrics:
    """Compare probabilities with a manifest's labels.

    The decision is the most probable class. A figure that is not defined, such as the precision of
    a class that was never predicted, is `None`.

    Args:
        frame: the manifest's rows of that split: `label`, `source`, `group`, and, where known,
            `sex`, `age` and `view`.
        probabilities: `[images, classes]`, in the order of `frame` and `labels`.
        labels: class names; every label of `frame` must be among them.
        seed: of the bootstrap.
        split: the split's name.
        thresholds: per class; adds its figures at that threshold.

    Raises:
        TrainingError: no images, or a label that the model does not know.
    """
    if frame.empty:
        raise TrainingError(f"The {split} split holds no images.")
    images = _images(frame, probabilities, labels)
    values, replicates = _all_figures(images, seed, lambda counts: _figures(images, counts))
    if thresholds is not None:
        cuts = np.asarray([thresholds[name] for name in labels])
        at_values, at_replicates = _all_figures(
            images, seed, lambda counts: _threshold_figures(images, counts, cuts)
        )
        values, replicates = values | at_values, replicates | at_replicates

    def figure(name: str, *, within: str = "") -> Interval | None:
        return figure_interval(name, values[name + within], replicates[name + within])

    def always(name: str) -> Interval:
        found = figure(name)
        assert found is not None  # noqa: S101 - defined for any image
        return found

    def per_class(index: int, name: str) -> ClassMetrics:
        point = None
        if thresholds is not None:
            point = OperatingPoint(
                threshold=thresholds[name],
                sensitivity=figure("sensitivity_at", within=f":{index}"),
                specificity=figure("specificity_at", within=f":{index}"),
                precision=figure("precision_at", within=f":{index}"),
            )
        return ClassMetrics(
            support=int((images.truth == index).sum()),
            sensitivity=figure("sensitivity", within=f":{index}"),
            specificity=figure("specificity", within=f":{index}"),
            precision=figure("precision", within=f":{index}"),
            f1=figure("f1", within=f":{index}"),
            roc_auc=figure("roc_auc", within=f":{index}"),
            average_precision=figure("average_precision", within=f":{index}"),
            at_threshold=point,
        )

    confusion = _confusions(images, np.ones((1, len(frame))))[0].astype(int)
    return SplitMetrics(
        split=split,
        images=len(frame),
        groups=images.groups,
        method=METHOD,
        accuracy=always("accuracy"),
        balanced_accuracy=always("balanced_accuracy"),
        macro_precision=figure("macro_precision"),
        macro_f1=always("macro_f1"),
        macro_roc_auc=figure("macro_roc_auc"),
        macro_average_precision=figure("macro_average_precision"),
        expected_calibration_error=always("expected_calibration_error"),
        brier_score=always("brier_score"),
        log_loss=always("log_loss"),
        per_class={name: per_class(index, name) for index, name in enumerate(labels)},
        per_source=_subgroups(frame, probabilities, labels, seed, _column(frame, "source")),
        per_sex=_subgroups(frame, probabilities, labels, seed, _column(frame, "sex")),
        per_age=_subgroups(frame, probabilities, labels, seed, _age_bands(frame)),
        per_view=_subgroups(frame, probabilities, labels, seed, _column(frame, "view")),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )


def compare_predictions(
    frame: pd.DataFrame,
    first: npt.NDArray[np.floating],
    second: npt.NDArray[np.floating],
    labels: tuple[str, ...],
    *,
    figure: str = "balanced_accuracy",
    seed: int,
) -> Interval:
    """How much higher a figure of the first model is than of the second, on the same images.

    Both are measured on the same bootstrap replicates, so that what makes some patients harder for
    both does not widen the interval. One that excludes 0 speaks for a difference.

    Args:
        frame: rows with `label` and `group`.
        first: `[images, classes]`.
        second: `[images, classes]`.
        labels: class names.
        figure: `accuracy`, `balanced_accuracy`, `macro_f1`, `macro_roc_auc`,
            `macro_average_precision`, `brier_score` or `log_loss`.
        seed: of the bootstrap.

    Raises:
        TrainingError: no images, an unknown label, or a figure that is not defined on them.
    """
    a, a_replicates = bootstrap_figures(frame, first, labels, seed=seed)
    b, b_replicates = bootstrap_figures(frame, second, labels, seed=seed)
    found = percentiles(a[figure] - b[figure], a_replicates[figure] - b_replicates[figure])
    if found is None:
        raise TrainingError(f"{figure} is not defined on these images.")
    return found


def bootstrap_figures(
    frame: pd.DataFrame,
    probabilities: npt.NDArray[np.floating],
    labels: tuple[str, ...],
    *,
    seed: int | None,
) -> tuple[Figures, Figures]:
    """All figures on the images, and on each bootstrap replicate; NaN where one is not defined.

    Args:
        frame: rows with `label` and `group`.
        probabilities: `[images, classes]`.
        labels: class names; figures of a class are named by its number, such as `sensitivity:0`.
        seed: of the bootstrap; the same seed and groups give the same replicates for every model.
            `None` draws none.

    Returns:
        The figures, each `[1]`, and their replicates, each `[replicates]`.

    Raises:
        TrainingError: no images, or a label that the model does not know.
    """
    if frame.empty:
        raise TrainingError("There are no images to evaluate.")
    images = _images(frame, probabilities, labels)
    if seed is None:
        return _figures(images, np.ones((1, len(frame)))), {}
    return _all_figures(images, seed, lambda counts: _figures(images, counts))


def percentiles(value: Float64Array, replicates: Float64Array) -> Interval | None:
    """A figure with the middle 95 % of its replicates; `None` if it is not defined.

    Args:
        value: `[1]`.
        replicates: `[replicates]`; NaN where the figure is not defined.
    """
    if np.isnan(value[0]):
        return None
    low, high = np.nanpercentile(replicates, _PERCENTILES)
    return Interval(value=float(value[0]), low=float(low), high=float(high))


def figure_interval(name: str, value: Float64Array, replicates: Float64Array) -> Interval | None:
    """A figure with its 95 % interval, as :data:`METHOD` says; `None` if it is not defined."""
    if name == "expected_calibration_error":
        return _reversed(value, replicates)
    return percentiles(value, replicates)


@dataclass(frozen=True)
class _Images:
    truth: npt.NDArray[np.int_]
    predicted: npt.NDArray[np.int_]
    probabilities: Float64Array
    codes: npt.NDArray[np.int_]
    groups: int

    @property
    def classes(self) -> int:
        return int(self.probabilities.shape[1])


def _images(
    frame: pd.DataFrame, probabilities: npt.NDArray[np.floating], labels: tuple[str, ...]
) -> _Images:
    unknown = sorted(set(frame["label"]) - set(labels))
    if unknown:
        raise TrainingError(f"The model does not know the label {unknown[0]!r}.")
    values = np.asarray(probabilities, dtype=np.float64)
    codes, names = pd.factorize(frame["group"], sort=True)
    return _Images(
        truth=np.asarray([labels.index(name) for name in frame["label"]], dtype=np.int_),
        predicted=values.argmax(axis=1),
        probabilities=values,
        codes=codes,
        groups=len(names),
    )


def _all_figures(
    images: _Images, seed: int, figures: Callable[[Float64Array], Figures]
) -> tuple[Figures, Figures]:
    """Each figure on all images (`[1]`), and on the bootstrap replicates (`[replicates]`)."""
    values = figures(np.ones((1, len(images.truth))))
    parts = [figures(counts) for counts in _resampled(images, seed)]
    return values, {name: np.concatenate([part[name] for part in parts]) for name in values}


def _resampled(images: _Images, seed: int) -> Iterator[Float64Array]:
    """How often each image counts in each replicate, in blocks `[some replicates, images]`."""
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(images.truth))
    for start in range(0, REPLICATES, block):
        # Drawing groups with replacement: how often each one comes is multinomial.
        draws = random.multinomial(
            images.groups,
            np.full(images.groups, 1 / images.groups),
            size=min(block, REPLICATES - start),
        )
        yield draws[:, images.codes].astype(np.float64)


def _figures(images: _Images, counts: Float64Array, *, calibration: bool = True) -> Figures:
    """Figures where each image counts that often (`[replicates, images]`); NaN if not defined."""
    confusions = _confusions(images, counts)
    support = confusions.sum(axis=2)
    called = confusions.sum(axis=1)
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    total = counts.sum(axis=1)
    negatives = total[:, None] - support
    per_class = {
        "sensitivity": _ratio(hits, support),
        "specificity": _ratio(negatives - (called - hits), negatives),
        "precision": _ratio(hits, called),
        "f1": _ratio(2 * hits, support + called),
    }
    curves = [
        _areas(images.truth == index, images.probabilities[:, index], counts)
        for index in range(images.classes)
    ]
    per_class["roc_auc"] = np.stack([roc for roc, _ in curves], axis=1)
    per_class["average_precision"] = np.stack([precision for _, precision in curves], axis=1)
    figures = {
        "accuracy": hits.sum(axis=1) / total,
        "balanced_accuracy": _mean(per_class["sensitivity"]),
        "macro_precision": _mean(per_class["precision"]),
        "macro_f1": _mean(per_class["f1"]),
        "macro_roc_auc": _mean(per_class["roc_auc"]),
        "macro_average_precision": _mean(per_class["average_precision"]),
    }
    if calibration:
        gaps = counts @ calibration_gaps(images.probabilities, images.truth)
        known = images.probabilities[np.arange(len(images.truth)), images.truth]
        surprise = -np.log(np.clip(known, SMALLEST_PROBABILITY, None))
        figures |= {
            "expected_calibration_error": np.abs(gaps).sum(axis=1) / total,
            "brier_score": counts @ squared_errors(images.probabilities, images.truth) / total,
            "log_loss": counts @ surprise / total,
        }
    return figures | _by_class(per_class)


def _threshold_figures(images: _Images, counts: Float64Array, cuts: Float64Array) -> Figures:
    positive = np.eye(images.classes)[images.truth]
    called = (images.probabilities >= cuts).astype(np.float64)
    hits, calls, support = (counts @ part for part in (called * positive, called, positive))
    negatives = counts.sum(axis=1, keepdims=True) - support
    return _by_class(
        {
            "sensitivity_at": _ratio(hits, support),
            "specificity_at": _ratio(negatives - (calls - hits), negatives),
            "precision_at": _ratio(hits, calls),
        }
    )


def _by_class(figures: Mapping[str, Float64Array]) -> Figures:
    return {
        f"{name}:{index}": column
        for name, columns in figures.items()
        for index, column in enumerate(columns.T)
    }


def _confusions(images: _Images, counts: Float64Array) -> Float64Array:
    """`[replicates, truth, predicted]`."""
    classes = images.classes
    cells = np.zeros((len(images.truth), classes * classes))
    cells[np.arange(len(images.truth)), images.truth * classes + images.predicted] = 1
    return (counts @ cells).reshape(-1, classes, classes)


def _areas(
    positive: npt.NDArray[np.bool_], scores: Float64Array, counts: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Areas under the ROC curve and under the precision-recall curve, per replicate.

    The first is the share of pairs of a positive and a negative image in the right order, equal
    scores counting half; the second is average precision, without interpolation.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    sorted_counts = counts[:, order]
    hits = np.add.reduceat(sorted_counts * positive[order], starts, axis=1)
    every = np.add.reduceat(sorted_counts, starts, axis=1)
    misses = every - hits
    positives, negatives = hits.sum(axis=1), misses.sum(axis=1)
    below = misses.cumsum(axis=1) - misses
    roc = _ratio((hits * (below + misses / 2)).sum(axis=1), positives * negatives)
    # From the highest score down: how many were called, and how many of those rightly.
    right, called = (part[:, ::-1].cumsum(axis=1) for part in (hits, every))
    precision = right / np.maximum(called, 1)
    area = _ratio((hits[:, ::-1] * precision).sum(axis=1), positives)
    return roc, np.where(negatives > 0, area, np.nan)


def _ratio(part: Float64Array, whole: Float64Array) -> Float64Array:
    undefined = np.full(np.shape(part), np.nan)
    return np.asarray(np.divide(part, whole, out=undefined, where=whole > 0))


def _mean(columns: Float64Array) -> Float64Array:
    """Mean over the columns that are not NaN; NaN where all are."""
    known = ~np.isnan(columns)
    return _ratio(np.where(known, columns, 0).sum(axis=1), known.sum(axis=1))


def _reversed(value: Float64Array, replicates: Float64Array) -> Interval:
    low, high = np.percentile(replicates, _PERCENTILES)
    middle = float(value[0])
    return Interval(
        value=middle, low=max(0.0, 2 * middle - float(high)), high=max(0.0, 2 * middle - float(low))
    )


def _column(frame: pd.DataFrame, name: str) -> "pd.Series[str]":
    if name not in frame:
        return pd.Series(UNKNOWN, index=frame.index, dtype=object)
    return frame[name].astype(object).where(frame[name].notna(), UNKNOWN).astype(str)


def _age_bands(frame: pd.DataFrame) -> "pd.Series[str]":
    bands = pd.Series(UNKNOWN, index=frame.index, dtype=object)
    if "age" in frame:
        ages = pd.to_numeric(frame["age"])
        for low, high in AGE_BANDS:
            bands[(ages >= low) & (ages < high)] = _band(low, high)
    return bands


def _band(low: int, high: int) -> str:
    return f"{low}+" if (low, high) == AGE_BANDS[-1] else f"{low}-{high - 1}"


def _subgroups(
    frame: pd.DataFrame,
    probabilities: npt.NDArray[np.floating],
    labels: tuple[str, ...],
    seed: int,
    column: "pd.Series[str]",
) -> dict[str, Subgroup]:
    names = column.to_numpy(dtype=str)
    known = sorted(set(names) - {UNKNOWN}, key=_natural)
    if not known:
        return {}
    return {
        name: _subgroup(frame[names == name], probabilities[names == name], labels, seed)
        for name in [*known, *sorted({UNKNOWN} & set(names))]
    }


def _natural(name: str) -> tuple[int, str]:
    """Age bands by their first number, everything else by name."""
    digits = name.split("-", maxsplit=1)[0].rstrip("+")
    return (int(digits), name) if digits.isdecimal() else (0, name)


def _subgroup(
    rows: pd.DataFrame,
    probabilities: npt.NDArray[np.floating],
    labels: tuple[str, ...],
    seed: int,
) -> Subgroup:
    images = _images(rows, probabilities, labels)
    values, replicates = _all_figures(
        images, seed, lambda counts: _figures(images, counts, calibration=False)
    )
    accuracy = percentiles(values["accuracy"], replicates["accuracy"])
    assert accuracy is not None  # noqa: S101 - defined for any image
    several = len(set(images.truth)) > 1
    return Subgroup(
        images=len(rows),
        groups=images.groups,
        labels={name: int((images.truth == index).sum()) for index, name in enumerate(labels)},
        accuracy=accuracy,
        balanced_accuracy=percentiles(values["balanced_accuracy"], replicates["balanced_accuracy"])
        if several
        else None,
        macro_roc_auc=percentiles(values["macro_roc_auc"], replicates["macro_roc_auc"])
        if several
        else None,
    )
