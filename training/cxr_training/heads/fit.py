"""Fitting a head: its free parameters by grouped cross-validation, then the head itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits

from cxr_training.calibration import apply_temperature, fit_temperature
from cxr_training.errors import TrainingError
from cxr_training.head_settings import (
    AverageSettings,
    ForestSettings,
    HeadSettings,
    LogisticSettings,
    RbfSettings,
    SoftmaxSettings,
    SvmSettings,
    TreeSettings,
)
from cxr_training.heads.base import Features, Float64Array, Head, Labels, Selection
from cxr_training.heads.fitted import (
    AverageHead,
    CalibratedHead,
    KernelHead,
    LinearHead,
    SlicedHead,
)
from cxr_training.heads.linear import (
    fit_logistic,
    fit_rbf,
    fit_scale_and_shift,
    fit_softmax,
    fit_svm,
)
from cxr_training.heads.projection import Projection
from cxr_training.heads.trees import Trees, fit_forest, fit_tree

FOLDS = 5

Indices = npt.NDArray[np.int_]
# From training features, labels and weights: a head for each value of the free parameter.
Fitter = Callable[[Float64Array, Labels, Float64Array], Callable[[float], Head | Trees]]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The training images.

    Attributes:
        features: float64 `[(1 + copies) * images, features]`; copies help to fit and are never
            tested on.
        labels: class name per image.
        weights: weight per image, mean 1.
        splits: of the cross-validation: rows to fit on, rows to test on.
        seed: of whatever is random in a fit.
        sources: source per image, if what tells them apart is taken out.
        directions: how many of the copies' differences are taken out.
    """

    features: Float64Array
    labels: Labels
    weights: Float64Array
    splits: Sequence[tuple[Indices, Indices]]
    seed: int
    sources: Labels | None = None
    directions: int = 0

    def fitted(self, fitter: "Fitter", rows: Indices) -> Callable[[float], "Head | Trees"]:
        """Fit on some of the images and all of their copies."""
        copies = len(self.features) // len(self.labels)
        every = np.concatenate([rows + len(self.labels) * copy for copy in range(copies)])
        labels, weights = np.tile(self.labels, copies), np.tile(self.weights, copies)
        features = self.features[every]
        if self.sources is None and not self.directions:
            return fitter(features, labels[every], weights[every])
        projection = Projection.fitted(
            features,
            self.labels[rows],
            None if self.sources is None else self.sources[rows],
            self.directions,
        )
        candidate = fitter(projection.applied(features), labels[every], weights[every])
        return lambda value: projection.folded(candidate(value))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(str(label) for label in np.unique(self.labels))


@dataclass(frozen=True)
class _Calibration:
    """Probabilities of unseen images after a calibration, and the calibration itself."""

    probabilities: Float64Array
    applied: Callable[[Head], Head]


_Calibrator = Callable[[Float64Array, _Task], _Calibration]


def _asis(probabilities: Float64Array, task: _Task) -> _Calibration:  # noqa: ARG001
    return _Calibration(probabilities, lambda head: head)


def _cooled(probabilities: Float64Array, task: _Task) -> _Calibration:
    """Calibrate by a temperature."""
    temperature = fit_temperature(probabilities, task.labels, task.classes)
    return _Calibration(
        apply_temperature(probabilities, temperature),
        lambda head: CalibratedHead(head, temperature),
    )


def _shifted(probabilities: Float64Array, task: _Task) -> _Calibration:
    """Calibrate a support vector machine by one scale of its logits and a shift for each class."""
    scale, shift = fit_scale_and_shift(np.log(probabilities), task.labels, task.weights)

    def applied(head: Head) -> Head:
        assert isinstance(head, LinearHead | KernelHead)  # noqa: S101 - its fitters
        return replace(head, weight=scale * head.weight, bias=scale * head.bias + shift)

    return _Calibration(np.asarray(softmax(scale * np.log(probabilities) + shift, axis=1)), applied)


def fit_head(
    features: Features,
    labels: Labels,
    groups: Labels,
    *,
    settings: HeadSettings | None = None,
    seed: int,
    weights: Float64Array | None = None,
    parts: Sequence[int] = (),
    sources: Labels | None = None,
    directions: int = 0,
) -> tuple[Head, Selection]:
    """Fit a head on the training images.

    What the settings leave open is chosen by stratified cross-validation that keeps every group in
    one fold, and minimises the weighted log loss.

    Args:
        features: `[images, features]`; or, with augmented copies of the images,
            `[(1 + copies) * images, features]`: all images, then all first copies, and so on.
        labels: class name per image.
        groups: group per image.
        settings: kind of head; without them, logistic regression.
        seed: shuffles the folds; the same seed gives the same head.
        weights: weight per image; without them, classes count equally.
        parts: lengths of several backbones' features; given, a head is fitted on each one's, and
            their probabilities are averaged.
        sources: source per image; given, a linear head sees nothing of what differs between the
            means of sources within a label.
        directions: number of strongest differences between images and their copies that a linear
            head does not see.

    Raises:
        TrainingError: fewer than two classes, a class with fewer than two groups, or directions to
            take out for a head that is not linear.
    """
    settings = settings or LogisticSettings()
    if weights is None:
        weights = balanced_weights(labels)
    task = _Task(
        features=np.asarray(features, dtype=np.float64),
        labels=labels,
        weights=weights / weights.mean(),
        splits=_splits(labels, groups, seed),
        seed=seed,
        sources=sources,
        directions=directions,
    )
    # These matrices are small: threads of the linear algebra cost more than they bring.
    with threadpool_limits(1):
        if len(parts) <= 1:
            return _fit(settings, task)
        ends = np.cumsum([0, *parts]).tolist()
        fitted = []
        for start, stop in pairwise(ends):
            part = _Task(**(vars(task) | {"features": task.features[:, start:stop]}))
            head, selection = _fit(settings, part)
            fitted.append((SlicedHead(head, start, stop), selection))
        return _averaged(fitted, task)


def balanced_weights(classes: npt.NDArray[np.str_]) -> Float64Array:
    """Weight per image that makes every class count equally; their mean is 1."""
    _, codes, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return np.asarray(len(classes) / (len(counts) * counts[codes]))


def _splits(labels: Labels, groups: Labels, seed: int) -> list[tuple[Indices, Indices]]:
    classes = np.unique(labels)
    if len(classes) < 2:  # noqa: PLR2004
        raise TrainingError("Training needs images of at least two classes.")
    fewest = min(len(np.unique(groups[labels == name])) for name in classes)
    if fewest < 2:  # noqa: PLR2004
        raise TrainingError(
            "Each class needs at least two groups (patients) in the training split, to choose the "
            "regularisation by cross-validation."
        )
    splitter = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    splits = list(splitter.split(np.zeros(len(labels)), labels, groups))
    if any(len(np.unique(labels[fit])) < len(classes) for fit, _ in splits):
        raise TrainingError(
            "The training split is too small: a cross-validation fold lacks a whole class."
        )
    return splits


def _fit(settings: HeadSettings, task: _Task) -> tuple[Head, Selection]:
    if isinstance(settings, AverageSettings):
        return _averaged([_fit(member, task) for member in settings.members], task)
    fitter: Fitter
    if isinstance(settings, LogisticSettings):
        return _chosen("c", settings.c, fit_logistic, task)
    if isinstance(settings, SvmSettings | RbfSettings):
        fitter = fit_svm if settings.kind == "svm" else fit_rbf
        return _chosen("c", settings.c, fitter, task, calibrate=_shifted)
    if isinstance(settings, SoftmaxSettings):
        fitter = partial(fit_softmax, settings=settings, seed=task.seed)
        return _chosen("epochs", settings.epochs, fitter, task)
    if isinstance(settings, TreeSettings):
        fitter = partial(fit_tree, seed=task.seed)
        return _chosen("leaf", settings.leaf, fitter, task, calibrate=_cooled)
    forest: ForestSettings = settings
    fitter = partial(fit_forest, settings=forest, seed=task.seed)
    return _chosen("depth", (forest.depth,), fitter, task, calibrate=_cooled)


def _chosen(
    name: str, grid: Sequence[float], fitter: Fitter, task: _Task, calibrate: _Calibrator = _asis
) -> tuple[Head, Selection]:
    """Try each value of one free parameter on the folds, and fit the best one on all images."""
    found = {value: np.zeros((len(task.labels), len(task.classes))) for value in grid}
    for rows, held_out in task.splits:
        candidate = task.fitted(fitter, rows)
        for value in grid:
            found[value][held_out] = candidate(value).predict_proba(task.features[held_out])
    calibrators = {value: calibrate(found[value], task) for value in grid}
    probabilities = {value: calibrators[value].probabilities for value in grid}
    losses = {value: _log_loss(probabilities[value], task) for value in grid}
    best = min(losses, key=losses.__getitem__)
    fitted = task.fitted(fitter, np.arange(len(task.labels)))(best)
    head = fitted.converted() if isinstance(fitted, Trees) else fitted
    return calibrators[best].applied(head), Selection(
        folds=len(task.splits),
        parameters={name: float(best)},
        log_loss=losses[best],
        accuracy=_accuracy(probabilities[best], task),
        out_of_fold=probabilities[best],
        losses=losses,
    )


def _averaged(fitted: Sequence[tuple[Head, Selection]], task: _Task) -> tuple[Head, Selection]:
    heads = tuple(head for head, _ in fitted)
    selections = [selection for _, selection in fitted]
    out_of_fold = np.asarray(np.mean([s.out_of_fold for s in selections], axis=0))
    return AverageHead(heads), Selection(
        folds=len(task.splits),
        parameters={
            f"{number}.{name}": value
            for number, selection in enumerate(selections)
            for name, value in selection.parameters.items()
        },
        log_loss=_log_loss(out_of_fold, task),
        accuracy=_accuracy(out_of_fold, task),
        out_of_fold=out_of_fold,
    )


def _log_loss(probabilities: Float64Array, task: _Task) -> float:
    return float(
        np.mean(
            [
                log_loss(
                    task.labels[rows],
                    probabilities[rows],
                    sample_weight=task.weights[rows],
                    labels=task.classes,
                )
                for _, rows in task.splits
            ]
        )
    )


def _accuracy(probabilities: Float64Array, task: _Task) -> float:
    right = np.asarray(task.classes)[probabilities.argmax(axis=1)] == task.labels
    return float(np.mean([right[rows].mean() for _, rows in task.splits]))
