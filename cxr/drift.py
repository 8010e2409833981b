"""What answers look like, as numbers whose distribution tells whether images have changed.

Training keeps each number's distribution over the validation images; serving counts into the same
bins. How far the two are apart, the population stability index says: the sum over the bins of
(p - q) ln(p / q), with p and q the shares of an image's number to fall into the bin. Below 0.1 is
commonly read as no change, above 0.25 as a large one (Siddiqi, Credit Risk Scorecards, 2006).
"""

from bisect import bisect_left
from collections.abc import Sequence

from cxr.answer import Prediction
from cxr.errors import Rejection

_PROBABILITY = "probability of {}"


def summary_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Every name that :func:`summaries` may give for a model of these classes."""
    return (*(_PROBABILITY.format(label) for label in labels), *Rejection)


def summaries(prediction: Prediction) -> dict[str, float]:
    """An answer's probability of each class, and the scores of its guards if it has any."""
    found = {_PROBABILITY.format(name): p for name, p in prediction.probabilities.items()}
    return found | dict(prediction.quality.scores if prediction.quality else {})


def bin_of(value: float, edges: Sequence[float]) -> int:
    """Number of the bin that a value falls into: each bin holds its upper edge.

    Args:
        value: the number.
        edges: between the bins, ascending; the first bin is all up to the first edge, the last one
            all above the last edge.
    """
    return bisect_left(edges, value)
