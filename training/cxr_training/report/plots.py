"""The report's plots, as SVG text that stands inside the page and takes its colours."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from cxr_training.calibration import BINS, ReliabilityBin

# Near Okabe and Ito's colours, which most colour-blind people can tell apart; they stand out on
# white and on near-black.
COLORS = ("#1f83c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", "--", "-.", ":")
# Stands for the page's text colour until the SVG is written.
_INK = "#010203"
# Any: matplotlib's types want each key as a literal.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cxr",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def roc_plot(
    truth: npt.NDArray[np.int_], probabilities: npt.NDArray[np.float64], labels: Sequence[str]
) -> str:
    """ROC curves, each class against the rest; classes that do not occur are left out."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.7, alpha=0.5)
        for index, name in _drawable(truth, labels):
            fallout, recall, _ = roc_curve(truth == index, probabilities[:, index])
            axes.plot(fallout, recall, label=name, **_line(index))
        axes.set(xlabel="1 - specificity", ylabel="sensitivity")
        _unit_square(axes)
        axes.legend(loc="lower right")

    return _svg("roc", "ROC curves, each class against the rest", draw)


def precision_recall_plot(
    truth: npt.NDArray[np.int_], probabilities: npt.NDArray[np.float64], labels: Sequence[str]
) -> str:
    """Precision-recall curves, each class against the rest."""

    def draw(axes: Axes) -> None:
        for index, name in _drawable(truth, labels):
            precision, recall, _ = precision_recall_curve(truth == index, probabilities[:, index])
            axes.plot(recall, precision, label=name, drawstyle="steps-post", **_line(index))
        axes.set(xlabel="sensitivity (recall)", ylabel="precision")
        _unit_square(axes)
        axes.legend(loc="lower left")

    return _svg("pr", "Precision-recall curves, each class against the rest", draw)


def reliability_plot(tables: Mapping[str, Sequence[ReliabilityBin]]) -> str:
    """How often the most probable class is right, by its probability; a point's area is images."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.7, alpha=0.5)
        for index, (name, table) in enumerate(tables.items()):
            filled = [row for row in table if row.images]
            confidence = [row.confidence or 0.0 for row in filled]
            accuracy = [row.accuracy or 0.0 for row in filled]
            sizes = [8 + 120 * row.images / sum(row.images for row in filled) for row in filled]
            axes.plot(confidence, accuracy, label=name, **_line(index))
            axes.scatter(confidence, accuracy, s=sizes, color=COLORS[index], alpha=0.7)
        axes.set(xlabel=f"highest probability ({BINS} bins)", ylabel="share that is right")
        _unit_square(axes)
        axes.legend(loc="lower right")

    return _svg("reliability", "Reliability of the probabilities", draw)


def curves_plot(epochs: Sequence[Mapping[str, Any]]) -> str:
    """Loss by epoch of fine-tuning."""

    def draw(axes: Axes) -> None:
        numbers = [epoch["epoch"] for epoch in epochs]
        for index, name in enumerate(("training_loss", "validation_loss")):
            values = [epoch[name] for epoch in epochs]
            axes.plot(numbers, values, label=name.replace("_", " "), **_line(index))
        axes.set(xlabel="epoch", ylabel="cross-entropy")
        axes.legend()

    return _svg("curves", "Loss by epoch", draw)


def _drawable(truth: npt.NDArray[np.int_], labels: Sequence[str]) -> list[tuple[int, str]]:
    return [
        (index, name)
        for index, name in enumerate(labels)
        if 0 < int((truth == index).sum()) < len(truth)
    ]


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 1.8,
    }


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")


def _svg(name: str, title: str, draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 4.0), layout="constrained")
        draw(figure.add_subplot())
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # No addresses, and ids that are unique within the page.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # The page scales it.
    svg = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
