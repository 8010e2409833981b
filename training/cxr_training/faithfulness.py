"""Whether heat maps point at what a model looks at: hide the hottest part, and ask again.

The deletion test of Petsiuk et al., RISE, BMVC 2018, at one fraction. What is hidden is blurred
beyond recognition, so that no edge is added. The control hides the same shape elsewhere: the hot
part, moved by a random distance with what leaves on one side coming back on the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from cxr.answer import Options, Prediction
from cxr.decode import decode
from cxr.engine import Engine
from cxr_training.errors import TrainingError

HIDDEN = 0.2
# Standard deviation of the blur, as a fraction of the shorter side.
_BLUR = 0.1
_CONTROLS = 3

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Drop:
    """How much probability of the predicted class goes with a part of one image.

    Attributes:
        hottest: with the hottest fifth of what the model sees.
        elsewhere: with as large a part of the same shape elsewhere, the mean of three.
    """

    hottest: float
    elsewhere: float


def deletion_drops(engine: Engine, images: Sequence[bytes], *, seed: int) -> list[Drop]:
    """Hide the hottest fifth of each image, and as much elsewhere.

    Args:
        engine: a model with explanations.
        images: encoded images.
        seed: of the places of the control.

    Raises:
        TrainingError: an image is refused, or the model has no explanation.
    """
    rng = np.random.default_rng(seed)
    return [_drop(engine, data, rng) for data in images]


def _drop(engine: Engine, data: bytes, rng: np.random.Generator) -> Drop:
    (answer,) = engine.predict([data], [Options(explain=True)])
    if not isinstance(answer, Prediction):
        raise TrainingError(f"An image cannot be used: {answer}")
    if answer.explanation is None:
        raise TrainingError("The model has no explanation; export it again.")
    image = decode(data)
    hot = hottest(answer.explanation.heatmap)
    before = answer.probabilities[answer.label]
    masks = (hot, *_moved(hot, answer.explanation.heatmap != 0, rng))
    after = [before - _asked(engine, image, mask, answer.label) for mask in masks]
    return Drop(after[0], float(np.mean(after[1:])))


def hottest(heatmap: npt.NDArray[np.float32], share: float = HIDDEN) -> Mask:
    """The hottest share of the places that the model sees."""
    seen = heatmap != 0
    return np.asarray(seen & (heatmap >= np.quantile(heatmap[seen], 1 - share)))


def _moved(mask: Mask, seen: Mask, rng: np.random.Generator) -> list[Mask]:
    """The mask moved about within the box that the model sees."""
    rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    moved = []
    for _ in range(_CONTROLS):
        shift = [rng.integers(side // 4, side - side // 4) for side in mask[box].shape]
        other = np.zeros_like(mask)
        other[box] = np.roll(mask[box], shift, axis=(0, 1))
        moved.append(other)
    return moved


def _asked(engine: Engine, image: Image.Image, mask: Mask, label: str) -> float:
    """Probability of a class with a part of the image blurred."""
    blurred = image.filter(ImageFilter.GaussianBlur(_BLUR * min(image.size)))
    where = Image.fromarray(mask).convert("L").resize(image.size, Image.Resampling.BILINEAR)
    buffer = BytesIO()
    Image.composite(blurred, image, where).save(buffer, "PNG", compress_level=1)
    (answer,) = engine.predict([buffer.getvalue()])
    if not isinstance(answer, Prediction):
        raise TrainingError(f"An image cannot be used: {answer}")
    return answer.probabilities[label]
