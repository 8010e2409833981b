"""Cross-validation of a recipe: by patient, by image beside it, and by left-out source.

Whatever is chosen or calibrated is chosen on the training folds: the free parameters of a head, the
size of the input and the temperature by folds within them, the end of a fine-tuning by a part of
them. Beside every figure stands that of a forest on trivial numbers of the files, which never see
the lung.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr_training.baselines import fold_splits, trivial_features, trivial_predictions
from cxr_training.data import SplitKind, grouped_folds, leave_one_source_out
from cxr_training.errors import TrainingError
from cxr_training.folds import FoldSummary, Scheme, prediction_table, summarize_folds
from cxr_training.model import (
    FrozenFeatures,
    calibrated,
    fit_frozen,
    fit_model,
    frozen_features,
    text,
)
from cxr_training.recipes import Recipe, candidates
from cxr_training.runs import recipe_backbone

Float64Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_INNER_FOLDS = 5


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold predictions: each image's from a model that had not seen its fold.

    Attributes:
        labels: class names, in the order of the columns.
        probabilities: float64 `[images, classes]`.
        fold: each image's fold: its number, or the left-out source.
    """

    labels: tuple[str, ...]
    probabilities: Float64Array
    fold: npt.NDArray[np.int_] | npt.NDArray[np.str_]


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        summaries: its figures, the one to quote first.
        predictions: what they come from, as :func:`cxr_training.folds.prediction_table` says.
    """

    summaries: tuple[FoldSummary, ...]
    predictions: pd.DataFrame


class Validator:
    """Fits a recipe on parts of a manifest; frozen features are extracted once."""

    def __init__(self, frame: pd.DataFrame, recipe: Recipe, *, cache: Path | None = None) -> None:
        """Prepare.

        Args:
            frame: a manifest.
            recipe: what to fit.
            cache: folder for extracted features; `None` keeps none.

        Raises:
            TrainingError: an image cannot be used, or the network cannot be built.
        """
        self.frame, self.recipe, self.cache = frame, recipe, cache
        self.labels = tuple(sorted({str(name) for name in frame["label"]}))
        self._frozen: list[tuple[Recipe, FrozenFeatures]] = []
        if recipe.finetune is None:
            self._frozen = [
                (each, frozen_features(frame, recipe_backbone(each), each, cache))
                for each in candidates(recipe)
            ]

    def out_of_fold(self, folds: int, *, seed: int, kind: SplitKind) -> Predictions:
        """Predict every image by a model that was fitted without its fold.

        Args:
            folds: number of folds.
            seed: of folds and fits.
            kind: `grouped` parts no group; `random` draws image by image.

        Raises:
            TrainingError: the data does not allow training.
            DataError: a class has too few groups for the folds.
        """
        # By image, an image is its own group, in the inner folds too.
        frame = self.frame if kind == "grouped" else self.frame.assign(group=self.frame["sha256"])
        number = grouped_folds(frame, folds=folds, seed=seed).to_numpy(dtype=np.int_)
        probabilities = np.zeros((len(frame), len(self.labels)))
        for fold in range(folds):
            test = number == fold
            probabilities[test] = self.predict(frame, ~test, test, seed=seed)
        return Predictions(self.labels, probabilities, np.asarray(number, dtype=np.int_))

    def predict(
        self, frame: pd.DataFrame, training: Mask, test: Mask, *, seed: int
    ) -> Float64Array:
        """Fit on some images and predict others.

        Args:
            frame: the manifest, its groups perhaps others.
            training: bool `[images]`.
            test: bool `[images]`.
            seed: of the fit.

        Returns:
            float64 `[test images, classes]`; 0 for a class that no training image has.

        Raises:
            TrainingError: the data does not allow training.
        """
        if self.recipe.finetune is not None:
            labels, found = self._finetuned(frame, training, test, seed)
        else:
            rows = frame[training]
            fitted = [
                (*fit_frozen(recipe, rows, features.of(training), seed=seed), features)
                for recipe, features in self._frozen
            ]
            head, selection, features = min(fitted, key=lambda each: each[1].log_loss)
            head, _ = calibrated(self.recipe, head, selection.out_of_fold, text(rows["label"]))
            labels, found = head.labels, head.predict_proba(features.plain[test])
        columns = [self.labels.index(name) for name in labels]
        probabilities = np.zeros((len(found), len(self.labels)))
        probabilities[:, columns] = found
        return probabilities

    def _finetuned(
        self, frame: pd.DataFrame, training: Mask, test: Mask, seed: int
    ) -> tuple[tuple[str, ...], Float64Array]:
        rows = frame[training]
        held_out = grouped_folds(rows, folds=_INNER_FOLDS, seed=seed) == 0
        model = fit_model(self.recipe, rows[~held_out], rows[held_out], seed=seed)
        return model.head.labels, model.predict_proba(frame[test])


def cross_validate(
    frame: pd.DataFrame,
    recipe: Recipe,
    *,
    folds: int = 5,
    seeds: Sequence[int] = (0,),
    cache: Path | None = None,
) -> Validation:
    """Cross-validate a recipe by patient and, beside it, by image.

    Args:
        frame: a manifest.
        recipe: what to fit.
        folds: number of folds.
        seeds: one cross-validation each.
        cache: folder for extracted features; `None` keeps none.

    Returns:
        By folds that part no group; and by folds drawn image by image, as published figures are.

    Raises:
        TrainingError: the data does not allow training, or an image cannot be used.
        DataError: a class has too few groups for the folds.
    """
    validator = Validator(frame, recipe, cache=cache)
    trivial = trivial_features(frame)
    names = text(frame["label"])

    def validation(kind: SplitKind) -> Validation:
        found = [validator.out_of_fold(folds, seed=seed, kind=kind) for seed in seeds]
        baseline = [
            trivial_predictions(trivial, names, validator.labels, fold_splits(one.fold), seed=seed)
            for seed, one in zip(seeds, found, strict=True)
        ]
        return _validation(frame, recipe, found, baseline, seeds=seeds, scheme=kind)

    both = validation("grouped"), validation("random")
    return Validation(
        tuple(summary for one in both for summary in one.summaries),
        pd.concat([one.predictions for one in both], ignore_index=True),
    )


def validate_by_source(
    frame: pd.DataFrame, recipe: Recipe, *, seed: int = 0, cache: Path | None = None
) -> Validation:
    """Test a recipe on each source in turn, after training on the others.

    Args:
        frame: a manifest of at least two sources.
        recipe: what to fit.
        seed: of the fits.
        cache: folder for extracted features; `None` keeps none.

    Raises:
        TrainingError: what the other sources leave does not allow training.
        DataError: the manifest has only one source.
    """
    folds = list(leave_one_source_out(frame))
    validator = Validator(frame, recipe, cache=cache)
    probabilities = np.zeros((len(frame), len(validator.labels)))
    for fold in folds:
        try:
            probabilities[fold.test] = validator.predict(frame, fold.train, fold.test, seed=seed)
        except TrainingError as error:
            raise TrainingError(f"Without the source {fold.source}: {error}") from error
    baseline = trivial_predictions(
        trivial_features(frame),
        text(frame["label"]),
        validator.labels,
        [(fold.train, fold.test) for fold in folds],
        seed=seed,
    )
    found = Predictions(validator.labels, probabilities, text(frame["source"]))
    return _validation(
        frame, recipe, [found], [baseline], seeds=[seed], scheme="leave-one-source-out"
    )


def _validation(
    frame: pd.DataFrame,
    recipe: Recipe,
    found: Sequence[Predictions],
    baseline: Sequence[Float64Array],
    *,
    seeds: Sequence[int],
    scheme: Scheme,
) -> Validation:
    """What the predictions of each seed come to."""
    probabilities, folds = [one.probabilities for one in found], [one.fold for one in found]
    labels = found[0].labels
    summary = summarize_folds(
        frame,
        probabilities,
        labels,
        folds,
        seeds=seeds,
        scheme=scheme,
        recipe=recipe.name,
        baseline=baseline,
    )
    table = prediction_table(frame, probabilities, labels, folds, seeds=seeds, scheme=scheme)
    return Validation((summary,), table)
