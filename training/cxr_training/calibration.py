"""Calibration of probabilities, and decision thresholds, from the validation split.

Temperature scaling: Guo et al., On Calibration of Modern Neural Networks, ICML 2017. One number
divides all logits, so that the order of the classes, and with it every figure that only needs the
most probable class, stays as it is.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import softmax

from cxr_training.errors import TrainingError

Float64Array = npt.NDArray[np.float64]
Probabilities = npt.NDArray[np.floating]
Labels = npt.NDArray[np.str_]

# Equal in width, from 0 to 1. More of them measure the noise of a few hundred test images.
BINS = 10
TEMPERATURES = (0.05, 20.0)
# The search ends some 1e-5 before a bound.
_AT_BOUND = 1e-3
# A probability of exactly 0 would make one wrong image outweigh all others.
SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class ReliabilityBin:
    """The images whose highest probability lies in one interval.

    Attributes:
        low: lower end, exclusive (inclusive for the first).
        high: upper end, inclusive.
        images: how many.
        confidence: mean of their highest probability, 0 to 1; `None` without images.
        accuracy: share whose most probable class is right; `None` without images.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


def fit_temperature(
    probabilities: Probabilities, labels: Labels, classes: tuple[str, ...]
) -> float:
    """The temperature that minimises the log loss.

    Args:
        probabilities: `[images, classes]`, of images that the model was not trained on.
        labels: class name per image.
        classes: class names, in the order of the columns.

    Returns:
        T within :data:`TEMPERATURES`; above 1 the model was too sure of itself. 1 where every most
        probable class is right: the loss then falls with T without end.

    Raises:
        TrainingError: no images, or a label that is not among the classes.
    """
    truth = _truth(probabilities, labels, classes)
    if (np.asarray(probabilities).argmax(axis=1) == truth).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        return log_loss(apply_temperature(probabilities, math.exp(log_temperature)), truth)

    low, high = TEMPERATURES
    found = minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded")
    return float(math.exp(found.x))


def at_bound(temperature: float) -> bool:
    """Whether a fitted temperature is one of :data:`TEMPERATURES`, with no minimum between."""
    return any(math.isclose(temperature, bound, rel_tol=_AT_BOUND) for bound in TEMPERATURES)


def apply_temperature(probabilities: Probabilities, temperature: float) -> Float64Array:
    """Probabilities with their logits divided by the temperature.

    Args:
        probabilities: `[images, classes]`, rows sum to 1.
        temperature: above 0; 1 changes nothing.

    Returns:
        float64 `[images, classes]`, rows sum to 1.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"A temperature must be above 0, not {temperature:g}.")
    return np.asarray(softmax(_log(probabilities) / temperature, axis=1))


def log_loss(probabilities: Probabilities, truth: npt.NDArray[np.int_]) -> float:
    """Mean negative log probability of the true class; `truth` holds column numbers."""
    return float(-_log(probabilities)[np.arange(len(truth)), truth].mean())


def brier_score(probabilities: Probabilities, labels: Labels, classes: tuple[str, ...]) -> float:
    """Mean squared distance from the truth, summed over the classes: 0 (perfect) to 2.

    Brier's own definition for several classes; for two it is twice the usual binary score.

    Args:
        probabilities: `[images, classes]`.
        labels: class name per image.
        classes: class names, in the order of the columns.

    Raises:
        TrainingError: no images, or a label that is not among the classes.
    """
    return float(squared_errors(probabilities, _truth(probabilities, labels, classes)).mean())


def squared_errors(probabilities: Probabilities, truth: npt.NDArray[np.int_]) -> Float64Array:
    """Each image's part of the Brier score: `[images]`, 0 to 2."""
    known = np.eye(np.shape(probabilities)[1])[truth]
    return np.asarray(((np.asarray(probabilities, dtype=np.float64) - known) ** 2).sum(axis=1))


def expected_calibration_error(
    probabilities: Probabilities, labels: Labels, classes: tuple[str, ...]
) -> float:
    """Expected calibration error of the most probable class, 0 to 1.

    Images are sorted by their highest probability into :data:`BINS` bins of equal width; the error
    is the mean of |accuracy - mean probability| over the bins, weighted by their images. It is
    never negative, so that a perfectly calibrated model also shows some error on few images.

    Args:
        probabilities: `[images, classes]`.
        labels: class name per image.
        classes: class names, in the order of the columns.

    Raises:
        TrainingError: no images, or a label that is not among the classes.
    """
    gaps = calibration_gaps(probabilities, _truth(probabilities, labels, classes))
    return float(np.abs(gaps.sum(axis=0)).sum() / len(gaps))


def calibration_gaps(probabilities: Probabilities, truth: npt.NDArray[np.int_]) -> Float64Array:
    """Each image's correctness (0 or 1) minus its highest probability, in the column of its bin.

    Returns:
        float64 `[images, BINS]`, 0 outside the image's bin.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    confidence = values.max(axis=1)
    gaps = np.zeros((len(values), BINS))
    correct = values.argmax(axis=1) == truth
    gaps[np.arange(len(values)), _bins(confidence)] = correct - confidence
    return gaps


def reliability(
    probabilities: Probabilities, labels: Labels, classes: tuple[str, ...]
) -> tuple[ReliabilityBin, ...]:
    """The table behind a reliability plot: one row per bin, from low to high.

    Args:
        probabilities: `[images, classes]`.
        labels: class name per image.
        classes: class names, in the order of the columns.

    Raises:
        TrainingError: no images, or a label that is not among the classes.
    """
    truth = _truth(probabilities, labels, classes)
    values = np.asarray(probabilities, dtype=np.float64)
    confidence = values.max(axis=1)
    correct = values.argmax(axis=1) == truth
    bins = _bins(confidence)
    rows = []
    for index in range(BINS):
        inside = bins == index
        images = int(inside.sum())
        rows.append(
            ReliabilityBin(
                low=index / BINS,
                high=(index + 1) / BINS,
                images=images,
                confidence=float(confidence[inside].mean()) if images else None,
                accuracy=float(correct[inside].mean()) if images else None,
            )
        )
    return tuple(rows)


def choose_thresholds_for_sensitivity(
    probabilities: Probabilities,
    labels: Labels,
    classes: tuple[str, ...],
    sensitivity: float,
) -> dict[str, float]:
    """Per class, the highest threshold that finds the stated share of its images.

    The threshold lies half-way to the next lower probability, so that rounding cannot flip an
    image. On other images the sensitivity will differ, and may be lower.

    Args:
        probabilities: `[images, classes]`, of the validation split.
        labels: class name per image; every class must occur.
        classes: class names, in the order of the columns.
        sensitivity: share of each class's images to reach, above 0 and at most 1.

    Returns:
        Per class, the probability from which it counts as present, 0 to 1.

    Raises:
        TrainingError: the sensitivity is out of range, or a class has no image.
    """
    if not 0 < sensitivity <= 1:
        raise TrainingError(f"A sensitivity lies above 0 and at most at 1, not at {sensitivity:g}.")
    truth = _truth(probabilities, labels, classes)
    thresholds = {}
    for column, name in enumerate(classes):
        scores = np.asarray(probabilities, dtype=np.float64)[:, column]
        positive = np.sort(scores[truth == column])[::-1]
        if not len(positive):
            raise TrainingError(f"No image of the class {name!r} to choose its threshold by.")
        # 0.7 * 10 must not become 8 images by rounding.
        needed = math.ceil(sensitivity * len(positive) - 1e-9)
        cut = positive[needed - 1]
        thresholds[name] = float((cut + scores[scores < cut].max(initial=0.0)) / 2)
    return thresholds


def _truth(
    probabilities: Probabilities, labels: Labels, classes: tuple[str, ...]
) -> npt.NDArray[np.int_]:
    """Column of each image's class."""
    if len(labels) == 0:
        raise TrainingError("Calibration needs at least one image.")
    if np.shape(probabilities) != (len(labels), len(classes)):
        raise TrainingError(
            f"Probabilities of shape {list(np.shape(probabilities))} do not fit "
            f"{len(labels)} images and {len(classes)} classes."
        )
    unknown = sorted(set(map(str, labels)) - set(classes))
    if unknown:
        raise TrainingError(f"The model does not know the label {unknown[0]!r}.")
    return np.asarray([classes.index(str(name)) for name in labels], dtype=np.int_)


def _bins(confidence: Float64Array) -> npt.NDArray[np.int_]:
    return np.clip(np.ceil(confidence * BINS).astype(np.int_) - 1, 0, BINS - 1)


def _log(probabilities: Probabilities) -> Float64Array:
    return np.log(np.clip(np.asarray(probabilities, np.float64), SMALLEST_PROBABILITY, None))
