"""Decision thresholds from the validation split."""

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve

Float64Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.str_]

THRESHOLD_RULE = "largest sum of sensitivity and specificity (Youden's J) on the validation split"


# Beyond the band, decisions are at least this often right among the images of either kind.
CERTAIN = 0.95


def uncertain_bands(
    probabilities: Float64Array,
    labels: Labels,
    classes: tuple[str, ...],
    thresholds: dict[str, float],
) -> dict[str, tuple[float, float]]:
    """Grey zone of each class about its threshold, from the validation split.

    Below it lie at most 5 % of the class's images, so that a negative decision finds 95 % of them;
    at or above its end lie at most 5 % of the others, unless more of them are at 1, where it ends
    at the latest. See Coste and Pouchot, A grey zone for quantitative diagnostic and screening
    tests, Int. J. Epidemiol. 2003;32:304-313. Of a model that does better at the threshold already,
    the zone is empty on that side.

    Args:
        probabilities: `[images, classes]`, of the validation split.
        labels: class name per image; every class and another must occur.
        classes: class names, in the order of the columns.
        thresholds: decision threshold of each class.

    Returns:
        Per class, from which probability and below which one a decision is uncertain.
    """
    bands = {}
    for column, name in enumerate(classes):
        values, own = probabilities[:, column], labels == name
        low = float(np.quantile(values[own], 1 - CERTAIN, method="lower"))
        bands[name] = (min(low, thresholds[name]), max(_end(values[~own]), thresholds[name]))
    return bands


def _end(others: Float64Array) -> float:
    """The smallest of the values with at most 5 % at or above it, or just above all of them."""
    cuts, counts = np.unique(others, return_counts=True)
    above = counts[::-1].cumsum()[::-1] / len(others)
    few = cuts[above <= 1 - CERTAIN]
    return float(few[0] if len(few) else min(np.nextafter(cuts[-1], np.inf), 1.0))


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
