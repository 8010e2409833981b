"""The linear head: standardised multinomial logistic regression, folded into one linear layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, roc_curve
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cxr_training.errors import TrainingError

Float64Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.str_]

# Inverse L2 strengths, half a decade apart; the best lies inside for a hundred images and for
# a hundred thousand.
REGULARIZATION_GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FOLDS = 5
_MAX_ITERATIONS = 5000


@dataclass(frozen=True)
class Head:
    """One linear layer and a softmax, on features that are not standardised.

    Attributes:
        labels: class names, in the order of the rows of `weight`.
        weight: float64 `[classes, features]`.
        bias: float64 `[classes]`.
    """

    labels: tuple[str, ...]
    weight: Float64Array
    bias: Float64Array

    def predict_proba(self, features: npt.NDArray[np.floating]) -> Float64Array:
        """Class probabilities.

        Args:
            features: `[images, features]`.

        Returns:
            float64 `[images, classes]`, rows sum to 1.
        """
        logits = np.asarray(features, dtype=np.float64) @ self.weight.T + self.bias
        return np.asarray(softmax(logits, axis=1))


@dataclass(frozen=True)
class CrossValidation:
    """How the regularisation was chosen.

    Attributes:
        folds: number of folds; no group is in two of them.
        chosen: the inverse L2 strength C with the lowest log loss.
        log_loss: per C, the mean over the folds, weighted by class so that classes count equally.
        accuracy: per C, the mean over the folds.
    """

    folds: int
    chosen: float
    log_loss: Mapping[float, float]
    accuracy: Mapping[float, float]


def fit_head(
    features: npt.NDArray[np.floating], labels: Labels, groups: Labels, *, seed: int
) -> tuple[Head, CrossValidation]:
    """Fit the head on the training split.

    Features are standardised, classes weighted inversely to their frequency. The inverse L2
    strength C comes from :data:`REGULARIZATION_GRID` by stratified cross-validation that keeps
    every group in one fold, and minimises the class-weighted log loss.

    Args:
        features: `[images, features]`.
        labels: class name per image.
        groups: group per image.
        seed: shuffles the folds; the same seed gives the same head.

    Raises:
        TrainingError: fewer than two classes, or a class with fewer than two groups.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:  # noqa: PLR2004
        raise TrainingError("Training needs images of at least two classes.")
    fewest = min(len(np.unique(groups[labels == name])) for name in classes)
    if fewest < 2:  # noqa: PLR2004
        raise TrainingError(
            "Each class needs at least two groups (patients) in the training split, to choose the "
            "regularisation by cross-validation."
        )
    folds = min(FOLDS, fewest)
    weight = dict(zip(classes, len(labels) / (len(classes) * counts), strict=True))
    sample_weight = np.asarray([weight[name] for name in labels])
    inputs = features.astype(np.float64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    splits = list(splitter.split(inputs, labels, groups))
    # These matrices are small: threads of the linear algebra cost more than they bring.
    with threadpool_limits(1):
        chosen = _choose_regularization(inputs, labels, sample_weight, splits)
        scaler, rotation, training = _rotated(inputs)
        model = _fit(training, labels, sample_weight, chosen.chosen)
    return _folded(model, scaler, rotation), chosen


def _choose_regularization(
    features: Float64Array,
    labels: Labels,
    sample_weight: Float64Array,
    splits: Sequence[tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]],
) -> CrossValidation:
    classes = np.unique(labels)
    losses: dict[float, list[float]] = {c: [] for c in REGULARIZATION_GRID}
    accuracies: dict[float, list[float]] = {c: [] for c in REGULARIZATION_GRID}
    for fit, held_out in splits:
        if len(np.unique(labels[fit])) < len(classes):
            raise TrainingError(
                "The training split is too small: a cross-validation fold lacks a whole class."
            )
        scaler, rotation, training = _rotated(features[fit])
        validation = rotation.transform(scaler.transform(features[held_out]))
        for c in REGULARIZATION_GRID:
            model = _fit(training, labels[fit], sample_weight[fit], c)
            probabilities = model.predict_proba(validation)
            truth, weight = labels[held_out], sample_weight[held_out]
            losses[c].append(log_loss(truth, probabilities, sample_weight=weight, labels=classes))
            accuracies[c].append(accuracy_score(truth, classes[probabilities.argmax(axis=1)]))
    loss = {c: float(np.mean(values)) for c, values in losses.items()}
    accuracy = {c: float(np.mean(values)) for c, values in accuracies.items()}
    return CrossValidation(
        folds=len(splits),
        chosen=min(loss, key=loss.__getitem__),
        log_loss=loss,
        accuracy=accuracy,
    )


def _rotated(features: Float64Array) -> tuple[StandardScaler, PCA, Float64Array]:
    """Standardise, then rotate onto the training images' own span.

    An L2-penalised linear model has its weights in that span, so that a full-rank PCA changes
    nothing but the time: there are fewer images than features.
    """
    scaler = StandardScaler()
    standardised = scaler.fit_transform(features)
    rotation = PCA(svd_solver="full")
    return scaler, rotation, rotation.fit_transform(standardised)


def _fit(
    features: Float64Array, labels: Labels, sample_weight: Float64Array, c: float
) -> LogisticRegression:
    model = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS)
    return model.fit(features, labels, sample_weight=sample_weight)


def _folded(model: LogisticRegression, scaler: StandardScaler, rotation: PCA) -> Head:
    coefficients, intercept = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # noqa: PLR2004
        # scikit-learn keeps one row for two classes: the sigmoid's logit. Softmax wants two.
        coefficients = np.vstack([np.zeros_like(coefficients), coefficients])
        intercept = np.concatenate([np.zeros_like(intercept), intercept])
    standardised = coefficients @ rotation.components_
    offset = intercept - standardised @ rotation.mean_
    weight = standardised / scaler.scale_
    return Head(
        labels=tuple(str(name) for name in model.classes_),
        weight=weight,
        bias=offset - weight @ scaler.mean_,
    )


def choose_thresholds(
    probabilities: Float64Array, labels: Labels, classes: tuple[str, ...]
) -> dict[str, float]:
    """Decision threshold of each class against the rest, from the validation split.

    Maximises Youden's J = sensitivity + specificity - 1 (Youden, Cancer 1950;3:32-35). The
    threshold lies half-way to the next lower probability, so that rounding cannot flip an image.

    Args:
        probabilities: `[images, classes]`, of the validation split.
        labels: class name per image; every class must occur.
        classes: class names, in the order of the columns.

    Returns:
        Per class, the probability from which it counts as present, 0 to 1.
    """
    thresholds = {}
    for column, name in enumerate(classes):
        false_positive, true_positive, cuts = roc_curve(
            labels == name, probabilities[:, column], drop_intermediate=False
        )
        # The first cut, infinity, would call nothing positive.
        best = 1 + int(np.argmax((true_positive - false_positive)[1:]))
        lower = cuts[best + 1] if best + 1 < len(cuts) else 0.0
        thresholds[name] = float((cuts[best] + lower) / 2)
    return thresholds
