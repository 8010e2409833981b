"""Whether an image is one that a model can judge: scores, and what is wrong where one is too high.

Some scores come from the graph, others from the pixels; which are too high, the model's
configuration says. A score is named as the reason that it gives.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from cxr.answer import Quality
from cxr.errors import BadImageError, Rejection
from cxr.preprocess import Preprocessing

# The worst first, with what an answer says of it.
REASONS = {
    Rejection.NOT_RADIOGRAPH: "it does not look like a radiograph",
    Rejection.NOT_FRONTAL_CHEST: "it does not look like a whole frontal chest",
    Rejection.OUT_OF_DISTRIBUTION: "it is unlike the images that the model was made from",
    Rejection.INVERTED: "black and white seem to be exchanged",
    Rejection.ROTATED: "it seems to lie on its side or upside down",
    Rejection.TOO_SMALL: "it has too few pixels",
    Rejection.TOO_DARK: "it is too dark",
    Rejection.CLIPPED: "too much of it is plain black or white",
}
# Those that :func:`pixel_scores` gives; the others come from the graph.
PIXEL_REASONS = (Rejection.TOO_SMALL, Rejection.TOO_DARK, Rejection.CLIPPED)
# Pixels a side that grey values are sampled at.
_SAMPLE = 128
_MAX_VALUE = 255
# Grey values from either end that count as clipped.
_END = 2
_BRIGHT = 95  # percentile


def pixel_scores(image: Image.Image, spec: Preprocessing) -> dict[Rejection, float]:
    """What an image's size and grey values say; the higher, the worse.

    Args:
        image: mode `L` or `RGB`, as :func:`cxr.decode.decode` returns it; scaled decoding leaves
            so many pixels that no image becomes too small by it.
        spec: the model's preprocessing.

    Returns:
        `too_small`, the input's shorter side by the image's; `too_dark`, by how much the 95th
        percentile of the grey values lies below white, 0 to 1; `clipped`, the share of pixels that
        are black or white, 0 to 1.
    """
    sample = image.resize((_SAMPLE, _SAMPLE), Image.Resampling.NEAREST).convert("L")
    grey = np.asarray(sample)
    ends = (grey <= _END) | (grey >= _MAX_VALUE - _END)
    return {
        Rejection.TOO_SMALL: min(spec.height, spec.width) / min(image.size),
        Rejection.TOO_DARK: 1 - float(np.percentile(grey, _BRIGHT)) / _MAX_VALUE,
        Rejection.CLIPPED: float(ends.mean()),
    }


def judged(scores: Mapping[Rejection, float], limits: Mapping[str, float]) -> Quality:
    """What is wrong with an image.

    Args:
        scores: by the reason that they give.
        limits: by reason, the score above which it is one.
    """
    return Quality(
        reasons=tuple(reason for reason in REASONS if scores[reason] > limits[reason]),
        scores={reason.value: scores[reason] for reason in REASONS},
    )


def refusal(reasons: Sequence[Rejection]) -> BadImageError:
    """The refusal of an image that a model cannot judge; at least one reason."""
    phrases = "; ".join(REASONS[reason] for reason in reasons)
    return BadImageError(
        reasons[0],
        f"The image cannot be judged: {phrases}. Send an upright frontal radiograph of a chest.",
    )
