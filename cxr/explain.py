"""From a model's evidence to a heat map over the image that was sent."""

import zlib
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from cxr.answer import Explanation
from cxr.preprocess import View

# Rows and columns of a heat map, whatever the image's shape.
HEATMAP_SIDE = 64
# Most of an explanation's time goes into the PNG file; see `bench/explain.py`.
OVERLAY_SIDE = 256
# How much the hottest place covers of the image below.
_OPACITY = 0.6
# Evidence for the class is laid on in red, evidence against it in blue.
_FOR = (255, 60, 0)
_AGAINST = (0, 90, 255)
_MAX_VALUE = 255
_PNG_LEVEL = 1


def explanation(
    image: Image.Image,
    view: View,
    evidence: npt.NDArray[np.float32],
    *,
    label: str,
    method: str,
) -> Explanation:
    """Lay the evidence for one class over the image.

    What matters is where evidence lies above that of the average place: the average belongs to no
    place, as little as the model's bias.

    Args:
        image: the decoded image.
        view: which part of it the model saw.
        evidence: float32 `[rows, columns]` over that part.
        label: the class.
        method: how the evidence was made.
    """
    inside = _inside(view, *evidence.shape)
    relative = evidence - evidence[inside].mean()
    largest = float(np.abs(relative[inside]).max())
    relative = (relative / largest if largest > 0 else relative).clip(-1, 1)
    heatmap = _over_the_image(relative, view, (HEATMAP_SIDE, HEATMAP_SIDE))
    return Explanation(
        label=label, method=method, heatmap=heatmap, overlay=_overlay(image, view, relative)
    )


def _inside(view: View, rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Which places of the evidence lie on the image, and not on padding."""
    x = view.left + (np.arange(columns) + 0.5) / columns * (view.right - view.left)
    y = view.top + (np.arange(rows) + 0.5) / rows * (view.bottom - view.top)
    return np.logical_and.outer((y > 0) & (y < 1), (x > 0) & (x < 1))


def _over_the_image(
    evidence: npt.NDArray[np.float32], view: View, size: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """The evidence in the coordinates of the whole image: float32 `[height, width]`.

    Args:
        evidence: float32 `[rows, columns]` over the part that the model saw.
        view: that part.
        size: width and height of the result.
    """
    rows, columns = evidence.shape
    across = _seen(view.left, view.right, size[0], columns)
    down = _seen(view.top, view.bottom, size[1], rows)
    whole = np.zeros((size[1], size[0]), dtype=np.float32)
    if across is None or down is None:
        return whole
    # Repeated by one place all round, so that interpolation does not fade at the view's edge.
    padded = Image.fromarray(np.pad(evidence, 1, mode="edge"))
    # Pillow wants the way back: which part of the evidence that is.
    box = (across.low + 1, down.low + 1, across.high + 1, down.high + 1)
    target = (across.end - across.start, down.end - down.start)
    seen = padded.resize(target, Image.Resampling.BILINEAR, box)
    whole[down.start : down.end, across.start : across.end] = np.asarray(seen)
    return whole


class _Seen(NamedTuple):
    """Pixels of a row that the model saw, `start` to `end`, and which places: `low` to `high`."""

    start: int
    end: int
    low: float
    high: float


def _seen(left: float, right: float, pixels: int, places: int) -> _Seen | None:
    """Which of `pixels` in a row lie in a view that has so many `places`; None if none does."""
    centres = (np.arange(pixels) + 0.5) / pixels
    inside = np.flatnonzero((centres > left) & (centres < right))
    if not len(inside):
        return None
    start, end = int(inside[0]), int(inside[-1]) + 1
    low, high = ((edge / pixels - left) / (right - left) * places for edge in (start, end))
    # A pixel may reach out of the view further than there is evidence.
    return _Seen(start, end, max(low, -1.0), min(high, places + 1.0))


def _overlay(image: Image.Image, view: View, evidence: npt.NDArray[np.float32]) -> bytes:
    small = image.copy()
    # Before it gets colours: there are three times as many of them.
    small.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE), Image.Resampling.BOX)
    wide = _over_the_image(evidence, view, small.size)
    color = Image.fromarray((wide > 0).view(np.uint8))
    color.putpalette((*_AGAINST, *_FOR))
    amount = np.abs(wide) * np.float32(_OPACITY * _MAX_VALUE)
    mask = Image.fromarray(amount.astype(np.uint8))
    buffer = BytesIO()
    overlay = Image.composite(color.convert("RGB"), small.convert("RGB"), mask)
    overlay.save(buffer, "PNG", compress_level=_PNG_LEVEL, compress_type=zlib.Z_HUFFMAN_ONLY)
    return buffer.getvalue()
