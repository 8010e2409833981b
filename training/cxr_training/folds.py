"""Summaries of cross-validation, by fold and by left-out source, from out-of-fold predictions.

A run folder may hold `cv.json` and `loso.json`. Both are a :class:`FoldDocument`: a list of
summaries, the one to quote first. `cv.json` holds a grouped cross-validation and, beside it, one by
image, which shows what the leak is worth; `loso.json` holds one summary whose folds are the
sources. Beside each lies the table of its predictions, from which two recipes are compared.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cxr.config import Interval
from cxr_training.data import COVID
from cxr_training.errors import TrainingError
from cxr_training.evaluation import (
    Figures,
    SplitMetrics,
    bootstrap_figures,
    evaluate_predictions,
    figure_interval,
    percentiles,
)

CV_FILE = "cv.json"
LOSO_FILE = "loso.json"
# Of a class's probability in the table of predictions.
_COLUMN = "probability:"

Scheme = Literal["grouped", "random", "leave-one-source-out"]
Probabilities = npt.NDArray[np.floating]

FIGURES = (
    "accuracy", "balanced_accuracy", "macro_f1", "macro_roc_auc",
    "expected_calibration_error", "brier_score", "log_loss",
)  # fmt: skip
POSITIVE_FIGURES = ("sensitivity", "specificity", "balanced_accuracy", "roc_auc")


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Document):
    """One figure over seeds and folds.

    Attributes:
        pooled: over all out-of-fold predictions of a seed, averaged over the seeds; its interval
            resamples groups.
        seeds: the pooled figure of each seed.
        deviation: standard deviation between the folds of all seeds; `None` if fewer than two
            folds have the figure.
    """

    pooled: Interval
    seeds: tuple[float, ...]
    deviation: float | None


class FoldFigures(_Document):
    """One fold of one seed; a figure that is not defined there, such as ROC-AUC of one class, is
    absent.
    """  # noqa: D205 - one sentence

    seed: int
    fold: str
    images: Annotated[int, Field(ge=1)]
    labels: dict[str, int]
    figures: dict[str, float]


class FoldSummary(_Document):
    """Out-of-fold figures of one recipe under one scheme.

    Attributes:
        scheme: `grouped` keeps patients in one fold, `random` splits image by image, and
            `leave-one-source-out` tests on each source in turn.
        recipe: name of what was trained in each fold.
        figures: by name: :data:`FIGURES` and, for the class `positive` against all others,
            `positive_` and :data:`POSITIVE_FIGURES`.
        baseline: the same figures of the trivial baseline on the same folds.
        metrics: everything about the pooled predictions of the first seed.
    """

    scheme: Scheme
    recipe: str
    labels: tuple[str, ...]
    images: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    positive: str | None
    folds: tuple[FoldFigures, ...]
    figures: dict[str, Spread]
    baseline: dict[str, Spread] | None
    metrics: SplitMetrics


class Comparison(_Document):
    """How much higher the figures of one recipe are than those of another, on the same images.

    Attributes:
        first: figures of the first recipe, by part and name; the part is empty for all images, and
            otherwise a left-out source.
        second: the same of the second.
        difference: first minus second, measured on the same bootstrap replicates; an interval that
            excludes 0 speaks for a difference.
    """

    first: dict[str, dict[str, Interval]]
    second: dict[str, dict[str, Interval]]
    difference: dict[str, dict[str, Interval]]


class FoldDocument(_Document):
    """The content of `cv.json` and `loso.json`."""

    summaries: Annotated[tuple[FoldSummary, ...], Field(min_length=1)]


def summarize_folds(
    frame: pd.DataFrame,
    probabilities: Sequence[Probabilities],
    labels: tuple[str, ...],
    folds: Sequence[Sequence[object] | npt.NDArray[np.generic] | pd.Series],
    *,
    seeds: Sequence[int],
    scheme: Scheme,
    recipe: str,
    baseline: Sequence[Probabilities] | None = None,
    positive: str = COVID,
) -> FoldSummary:
    """Summarise out-of-fold predictions.

    Args:
        frame: the manifest.
        probabilities: per seed, float `[images, classes]`: each image's answer from the model that
            was trained without its fold.
        labels: class names, in the order of the columns.
        folds: per seed, each image's fold: a number, or the left-out source.
        seeds: the seeds; the first also seeds the bootstrap.
        scheme: how the folds were made.
        recipe: name of what was trained.
        baseline: per seed, the trivial baseline's predictions on the same folds.
        positive: the class that is also measured against all others, if it is one of `labels`.

    Raises:
        TrainingError: the parts do not fit each other, or an image has no prediction.
    """
    _check(frame, [*probabilities, *(baseline or ())], labels, folds, seeds)
    found = positive if positive in labels else None

    def by_fold(predictions: Sequence[Probabilities]) -> list[FoldFigures]:
        return [
            _fold(frame[where], values[where], labels, found, seed=seed, name=name)
            for seed, values, column in zip(seeds, predictions, folds, strict=True)
            for name, where in _parts(column)
        ]

    def spreads(predictions: Sequence[Probabilities]) -> dict[str, Spread]:
        rows = by_fold(predictions)
        return _spreads(frame, predictions, labels, found, seed=seeds[0], folds=rows)

    return FoldSummary(
        scheme=scheme,
        recipe=recipe,
        labels=labels,
        images=len(frame),
        groups=int(frame["group"].nunique()),
        positive=found,
        folds=tuple(by_fold(probabilities)),
        figures=spreads(probabilities),
        baseline=None if baseline is None else spreads(baseline),
        metrics=evaluate_predictions(
            frame, probabilities[0], labels, seed=seeds[0], split="out-of-fold"
        ),
    )


def prediction_table(
    frame: pd.DataFrame,
    probabilities: Sequence[Probabilities],
    labels: tuple[str, ...],
    folds: Sequence[Sequence[object] | npt.NDArray[np.generic] | pd.Series],
    *,
    seeds: Sequence[int],
    scheme: Scheme,
) -> pd.DataFrame:
    """Out-of-fold predictions, a row for each image and seed; the arguments of `summarize_folds`.

    Returns:
        `scheme`, `seed`, `fold`, `sha256`, `group`, `source`, `label`, and a column for the
        probability of each class.
    """
    parts = []
    for seed, values, column in zip(seeds, probabilities, folds, strict=True):
        rows = frame[["sha256", "group", "source", "label"]].reset_index(drop=True)
        rows.insert(0, "fold", [str(name) for name in column])
        rows.insert(0, "seed", seed)
        rows.insert(0, "scheme", scheme)
        for index, label in enumerate(labels):
            rows[_COLUMN + label] = values[:, index]
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def write_folds(
    path: Path, summaries: Sequence[FoldSummary], predictions: pd.DataFrame | None = None
) -> None:
    """Write `cv.json` or `loso.json`, and the predictions, if given, beside it, as Parquet.

    Raises:
        OSError: a file cannot be written.
    """
    document = FoldDocument(summaries=tuple(summaries))
    path.write_text(document.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if predictions is not None:
        predictions.to_parquet(path.with_suffix(".parquet"), index=False)


def read_folds(path: Path) -> tuple[FoldSummary, ...]:
    """Read `cv.json` or `loso.json`; nothing if there is no such file.

    Raises:
        TrainingError: the file is damaged or from another version.
    """
    try:
        return FoldDocument.model_validate_json(path.read_bytes()).summaries
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{path} is damaged, or was written by another version.") from error


def compare_folds(first: Path, second: Path, *, positive: str = COVID) -> Comparison:
    """Compare two recipes on out-of-fold predictions for the same images.

    Of a cross-validation, the one by patient is compared, figures averaged over the seeds; of
    left-out sources, all images and each source.

    Args:
        first: `cv.json` or `loso.json` of one recipe.
        second: the same of the other.
        positive: the class that is also measured against all others, if both know it.

    Raises:
        TrainingError: there are no predictions beside a file, or they are of other images, classes
            or seeds.
    """
    tables = [_predictions(path) for path in (first, second)]
    columns = [[str(n) for n in table if str(n).startswith(_COLUMN)] for table in tables]
    keys = ["scheme", "seed", "sha256", "group", "label"]
    if columns[0] != columns[1] or not tables[0][keys].equals(tables[1][keys]):
        raise TrainingError(
            f"{first.parent} and {second.parent} have predictions for other images, classes or "
            "seeds: validate both recipes on the same data in the same way."
        )
    labels = tuple(name.removeprefix(_COLUMN) for name in columns[0])
    chosen = positive if positive in labels else None
    parts = {"": np.ones(len(tables[0]), dtype=bool)}
    if tables[0]["scheme"].iloc[0] == "leave-one-source-out":
        parts |= dict(_parts(tables[0]["fold"]))
    found: tuple[dict[str, dict[str, Interval]], ...] = ({}, {}, {})
    for part, where in parts.items():
        both = [_replicated(table[where], columns[0], labels, chosen) for table in tables]
        both.append({name: (v - both[1][name][0], r - both[1][name][1])
                     for name, (v, r) in both[0].items()})  # fmt: skip
        several = _several(tables[0]["label"][where], labels)
        for into, figures in zip(found, both, strict=True):
            intervals = {name: percentiles(*figure) for name, figure in figures.items()}
            into[part] = {
                name: interval
                for name, interval in intervals.items()
                if interval and _is_defined(name, several=several)
            }
    return Comparison(first=found[0], second=found[1], difference=found[2])


def _predictions(path: Path) -> pd.DataFrame:
    table = path.with_suffix(".parquet")
    try:
        frame = pd.read_parquet(table)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{table} cannot be read; `cxr train --cv` or `--leave-one-source-out` with --out "
            "writes it."
        ) from error
    return frame[frame["scheme"] != "random"].reset_index(drop=True)


def _replicated(
    table: pd.DataFrame, columns: list[str], labels: tuple[str, ...], positive: str | None
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    return _averaged(
        [
            _drawn(rows, rows[columns].to_numpy(), labels, positive, seed=0)
            for _, rows in table.groupby("seed")
        ]
    )


def _drawn(
    frame: pd.DataFrame,
    probabilities: Probabilities,
    labels: tuple[str, ...],
    positive: str | None,
    *,
    seed: int,
) -> tuple[Figures, Figures]:
    """Our choice of figures, and their replicates."""
    values, replicates = bootstrap_figures(frame, probabilities, labels, seed=seed)
    return _selected(values, labels, positive), _selected(replicates, labels, positive)


def _averaged(
    drawn: Sequence[tuple[Figures, Figures]],
) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Each figure and its replicates, averaged over models that were drawn with one seed.

    The same seed draws the same patients for each model, so that replicates can be averaged.
    """
    return {
        name: (
            np.mean([values[name] for values, _ in drawn], axis=0),
            np.mean([replicates[name] for _, replicates in drawn], axis=0),
        )
        for name in drawn[0][0]
    }


def _check(
    frame: pd.DataFrame,
    probabilities: Sequence[Probabilities],
    labels: tuple[str, ...],
    folds: Sequence[Sequence[object] | npt.NDArray[np.generic] | pd.Series],
    seeds: Sequence[int],
) -> None:
    if (
        not seeds
        or len(folds) != len(seeds)
        or len(probabilities)
        not in (
            len(seeds),
            2 * len(seeds),
        )
    ):
        raise TrainingError("Each seed needs its folds and its predictions.")
    for values in probabilities:
        if np.shape(values) != (len(frame), len(labels)):
            raise TrainingError("The predictions do not fit the manifest and the classes.")
        if not np.isfinite(values).all():
            raise TrainingError("An image has no prediction: no fold tests it.")
    if any(len(column) != len(frame) for column in folds):
        raise TrainingError("The folds do not fit the manifest.")


def _parts(
    column: Sequence[object] | npt.NDArray[np.generic] | pd.Series,
) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    names = np.asarray([str(name) for name in column])
    return [(str(name), names == name) for name in np.unique(names)]


def _fold(
    rows: pd.DataFrame,
    probabilities: Probabilities,
    labels: tuple[str, ...],
    positive: str | None,
    *,
    seed: int,
    name: str,
) -> FoldFigures:
    values, _ = bootstrap_figures(rows, probabilities, labels, seed=None)
    figures = {key: float(value[0]) for key, value in _selected(values, labels, positive).items()}
    counts = rows["label"].value_counts()
    several = _several(rows["label"], labels)
    return FoldFigures(
        seed=seed,
        fold=name,
        images=len(rows),
        labels={label: int(counts.get(label, 0)) for label in labels},
        figures={
            key: value
            for key, value in figures.items()
            if np.isfinite(value) and _is_defined(key, several=several)
        },
    )


def _several(column: "pd.Series[str]", labels: tuple[str, ...]) -> bool:
    """Whether images of more than one class are there."""
    return column[column.isin(labels)].nunique() > 1


def _is_defined(figure: str, *, several: bool) -> bool:
    """Of one class alone, balanced accuracy would be its sensitivity under another name."""
    return several or figure != "balanced_accuracy"


def _spreads(
    frame: pd.DataFrame,
    probabilities: Sequence[Probabilities],
    labels: tuple[str, ...],
    positive: str | None,
    *,
    seed: int,
    folds: Sequence[FoldFigures],
) -> dict[str, Spread]:
    drawn = [_drawn(frame, values, labels, positive, seed=seed) for values in probabilities]
    spreads = {}
    for name, average in _averaged(drawn).items():
        pooled = figure_interval(name, *average)
        if pooled is None:
            continue
        by_fold = [fold.figures[name] for fold in folds if name in fold.figures]
        spreads[name] = Spread(
            pooled=pooled,
            seeds=tuple(float(values[name][0]) for values, _ in drawn),
            deviation=float(np.std(by_fold, ddof=1)) if len(by_fold) > 1 else None,
        )
    return spreads


def _selected(figures: Figures, labels: tuple[str, ...], positive: str | None) -> Figures:
    chosen = {name: figures[name] for name in FIGURES}
    if positive is not None:
        index = labels.index(positive)
        one = {name: figures[f"{name}:{index}"] for name in ("sensitivity", "specificity")}
        one["balanced_accuracy"] = (one["sensitivity"] + one["specificity"]) / 2
        one["roc_auc"] = figures[f"roc_auc:{index}"]
        chosen |= {f"positive_{name}": one[name] for name in POSITIVE_FIGURES}
    return chosen
