"""Fitting one model by a recipe: what `cxr train` and cross-validation share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr_training.backbones import Backbone
from cxr_training.calibration import fit_temperature, log_loss
from cxr_training.features import Variation, extract_features
from cxr_training.finetune import finetune
from cxr_training.heads import (
    CalibratedHead,
    Head,
    LinearHead,
    Selection,
    balanced_weights,
    fit_head,
)
from cxr_training.processes import processes
from cxr_training.recipes import Balance, Recipe, candidates
from cxr_training.runs import Epoch, HeadSelection, recipe_backbone
from cxr_training.tabular import tabular_inputs

Features = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A fitted model.

    Attributes:
        recipe: what was fitted, at the size that was chosen.
        backbone: the feature extractor.
        head: the head, calibrated as the recipe says.
        selection: how the head was chosen.
        history: epochs of fine-tuning.
        tabular: whether age, sex and view are inputs too.
    """

    recipe: Recipe
    backbone: Backbone
    head: Head
    selection: HeadSelection
    history: tuple[Epoch, ...] = ()
    tabular: bool = False

    def predict_proba(self, frame: pd.DataFrame, *, cache: Path | None = None) -> Float64Array:
        """Class probabilities for a manifest's images: float64 `[images, classes]`."""
        inputs = model_inputs(frame, self.backbone, tabular=self.tabular, cache=cache)
        return self.head.predict_proba(inputs)


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of some images and of their augmented copies.

    Attributes:
        plain: float32 `[images, features]`.
        copies: the same shape for each copy.
        parts: length of each backbone's features.
    """

    plain: Features
    copies: tuple[Features, ...]
    parts: tuple[int, ...]

    def of(self, rows: npt.NDArray[np.bool_]) -> "FrozenFeatures":
        """Those of some of the images."""
        copies = tuple(copy[rows] for copy in self.copies)
        return FrozenFeatures(self.plain[rows], copies, self.parts)


def fit_model(
    recipe: Recipe,
    training: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    seed: int,
    tabular: bool = False,
    cache: Path | None = None,
    checkpoint: Path | None = None,
) -> Model:
    """Fit a model on the training split, and calibrate it on the validation split.

    Args:
        recipe: what to fit.
        training: rows of a manifest.
        validation: rows of a manifest.
        seed: of whatever is random; equal seeds give equal models.
        tabular: give the head age, sex and view beside the features.
        cache: folder for extracted features; `None` keeps none.
        checkpoint: file that fine-tuning keeps its state in, and goes on from after a kill.

    Raises:
        TrainingError: the data does not allow training, or an image cannot be used.
    """
    if recipe.finetune is not None:
        return _finetuned(recipe, training, validation, seed=seed, cache=cache, file=checkpoint)
    choices = []
    for candidate in candidates(recipe):
        backbone = recipe_backbone(candidate)
        features = frozen_features(training, backbone, candidate, cache)
        if tabular:
            features = _beside(features, tabular_inputs(training))
        choices.append((candidate, backbone, *fit_frozen(candidate, training, features, seed=seed)))
    chosen, backbone, head, selection = min(choices, key=lambda choice: choice[-1].log_loss)
    size = {"size": chosen.preprocessing["height"]} if recipe.sizes else {}
    inputs = model_inputs(validation, backbone, tabular=tabular, cache=cache)
    head, calibration = _calibrated_on(recipe, head, inputs, validation)
    return Model(
        recipe=chosen,
        backbone=backbone,
        head=head,
        selection=HeadSelection(
            kind=recipe.head.kind,
            folds=selection.folds,
            parameters=size | dict(selection.parameters),
            log_loss=selection.log_loss,
            accuracy=selection.accuracy,
            **calibration,
        ),
        tabular=tabular,
    )


def _finetuned(
    recipe: Recipe,
    training: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    seed: int,
    cache: Path | None,
    file: Path | None,
) -> Model:
    assert recipe.finetune is not None  # noqa: S101 - the caller looks
    backbone = recipe_backbone(recipe)
    labels = tuple(sorted({str(name) for name in training["label"]}))
    if recipe.finetune.head == "frozen":
        start, _ = fit_frozen(
            recipe, training, frozen_features(training, backbone, recipe, cache), seed=seed
        )
        assert isinstance(start, LinearHead)  # noqa: S101 - the default head
    else:
        size = (len(labels), backbone.feature_count)
        start = LinearHead(labels, np.zeros(size), np.zeros(len(labels)))
    with processes() as group:
        result = finetune(
            recipe,
            backbone,
            start,
            training,
            validation,
            weights=(
                sample_weights(training, recipe.balance),
                sample_weights(validation, recipe.balance),
            ),
            seed=seed,
            group=group,
            checkpoint=file,
        )
    inputs = model_inputs(validation, result.backbone, cache=cache)
    head, calibration = _calibrated_on(recipe, result.head, inputs, validation)
    best = result.history[result.best - 1]
    return Model(
        recipe=recipe,
        backbone=result.backbone,
        head=head,
        selection=HeadSelection(
            kind="finetuned",
            folds=0,
            parameters={"epoch": result.best},
            log_loss=best.validation_loss,
            accuracy=best.validation_accuracy,
            **calibration,
        ),
        history=result.history,
    )


def model_inputs(
    frame: pd.DataFrame, backbone: Backbone, *, tabular: bool = False, cache: Path | None = None
) -> Features:
    """What a head sees of a manifest's images: float32 `[images, inputs]`."""
    features = extract_features(frame, backbone, cache=cache)
    return np.hstack([features, tabular_inputs(frame)]) if tabular else features


def frozen_features(
    frame: pd.DataFrame, backbone: Backbone, recipe: Recipe, cache: Path | None
) -> FrozenFeatures:
    """Features of a manifest's images, and of the copies that the recipe asks for.

    Args:
        frame: a manifest.
        backbone: the recipe's.
        recipe: the recipe.
        cache: folder for extracted features; `None` keeps none.

    Raises:
        TrainingError: an image cannot be used.
    """
    variations = (
        [Variation(recipe.copies.augmentation, (n,)) for n in range(recipe.copies.count)]
        if recipe.copies
        else []
    )
    return FrozenFeatures(
        extract_features(frame, backbone, cache=cache),
        tuple(
            extract_features(frame, backbone, cache=cache, variation=variation)
            for variation in variations
        ),
        tuple(member.feature_count for member in backbone.members or (backbone,)),
    )


def fit_frozen(
    recipe: Recipe, frame: pd.DataFrame, features: FrozenFeatures, *, seed: int
) -> tuple[Head, Selection]:
    """Fit the recipe's head on frozen features; not calibrated.

    Args:
        recipe: the recipe.
        frame: rows of a manifest.
        features: of those rows.
        seed: shuffles the folds.

    Raises:
        TrainingError: fewer than two classes, or a class with fewer than two groups.
    """
    return fit_head(
        np.concatenate([features.plain, *features.copies]),
        text(frame["label"]),
        text(frame["group"]),
        settings=recipe.head,
        seed=seed,
        weights=sample_weights(frame, recipe.balance),
        parts=features.parts if recipe.head_per_backbone else (),
        sources=text(frame["source"]) if recipe.remove.sources else None,
        directions=recipe.remove.copies,
    )


def calibrated(
    recipe: Recipe, head: Head, probabilities: Float64Array, labels: npt.NDArray[np.str_]
) -> tuple[Head, float]:
    """The head with the temperature that suits images it has not seen, if the recipe wants one.

    Args:
        recipe: the recipe.
        head: the head.
        probabilities: the head's, of images that it was not fitted on.
        labels: their class names.

    Returns:
        The head, and its temperature: 1 without calibration.
    """
    if recipe.calibration == "none":
        return head, 1.0
    temperature = fit_temperature(probabilities, labels, head.labels)
    return CalibratedHead(head, temperature), temperature


def _calibrated_on(
    recipe: Recipe, head: Head, inputs: Features, validation: pd.DataFrame
) -> tuple[Head, dict[str, float]]:
    """Calibrate on the validation split, and note what that changed there."""
    labels = text(validation["label"])
    before = head.predict_proba(inputs)
    after, temperature = calibrated(recipe, head, before, labels)
    truth = np.asarray([head.labels.index(name) for name in labels])
    return after, {
        "temperature": temperature,
        "log_loss_before": log_loss(before, truth),
        "log_loss_after": log_loss(after.predict_proba(inputs), truth),
    }


def sample_weights(frame: pd.DataFrame, balance: Balance) -> Float64Array:
    """Weight of each image in training; their mean is 1.

    Args:
        frame: columns `label` and `source`.
        balance: what counts equally: each image; each class; or each class and, within it, each of
            its sources. Sources of one class alone then tip no balance between the classes.
    """
    if balance == "none":
        return np.ones(len(frame))
    if balance == "class":
        return balanced_weights(text(frame["label"]))
    cells = frame.groupby(["label", "source"])["label"].transform("size")
    sources = frame.groupby("label")["source"].transform("nunique")
    weights = (1 / (cells * sources)).to_numpy(dtype=np.float64)
    return np.asarray(weights / weights.mean())


def text(column: "pd.Series[str]") -> npt.NDArray[np.str_]:
    """A column of names as a NumPy array."""
    return column.to_numpy(dtype=str)


def _beside(features: FrozenFeatures, inputs: Features) -> FrozenFeatures:
    return FrozenFeatures(
        np.hstack([features.plain, inputs]),
        tuple(np.hstack([copy, inputs]) for copy in features.copies),
        (*features.parts, inputs.shape[1]),
    )
