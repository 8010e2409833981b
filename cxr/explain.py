"""From a model's evidence to a heat map over the image that was sent."""

from io import BytesIO

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
    width, height = view.right - view.left, view.bottom - view.top
    # Pillow wants the way back: which part of the evidence the whole image is.
    left, top = -view.left / width * columns, -view.top / height * rows
    box = (left, top, left + columns / width, top + rows / height)
    # Repeated by one place all round, so that interpolation does not fade at the view's edge.
    padded = Image.fromarray(np.pad(evidence, 1, mode="edge"))
    box = (box[0] + 1, box[1] + 1, box[2] + 1, box[3] + 1)
    wide = padded.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    x = (np.arange(size[0]) + 0.5) / size[0]
    y = (np.arange(size[1]) + 0.5) / size[1]
    seen = np.outer((y > view.top) & (y < view.bottom), (x > view.left) & (x < view.right))
    return np.where(seen, np.asarray(wide, dtype=np.float32), np.float32(0))


def _overlay(image: Image.Image, view: View, evidence: npt.NDArray[np.float32]) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE), Image.Resampling.BOX)
    amount = _over_the_image(evidence, view, small.size) * _OPACITY * _MAX_VALUE
    for color, share in ((_FOR, amount), (_AGAINST, -amount)):
        mask = Image.fromarray(share.clip(0, _MAX_VALUE).astype(np.uint8))
        small.paste(color, mask=mask)
    buffer = BytesIO()
    small.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()
