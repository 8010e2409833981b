"""Report data to one HTML file."""

from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cxr.config import Interval
from cxr_training.calibration import reliability
from cxr_training.report.collect import ReportData, collect
from cxr_training.report.plots import (
    curves_plot,
    precision_recall_plot,
    reliability_plot,
    roc_plot,
)
from cxr_training.shortcuts import SHORTCUTS_FILE

_TEMPLATE = "report.html.j2"
# Names of figures as readers know them.
_USUAL = {"roc auc": "ROC-AUC", "average precision": "PR-AUC", " f1": " F1", "brier": "Brier"}


def write_report(
    folder: Path,
    out: Path,
    *,
    cache: Path | None = None,
    examples: int = 0,
    audit: bool = True,
) -> ReportData:
    """Write the report of a run, and its shortcut audit into the run folder.

    Args:
        folder: the run folder.
        out: the HTML file; its folder is made if needed.
        cache: folder for extracted features; `None` keeps none.
        examples: wrongly, and as many rightly classified test images to show. They are radiographs
            of people: give none unless whoever gets the report may see them.
        audit: make the shortcut audit.

    Raises:
        TrainingError: the folder is not a run, or an image cannot be used.
        DataError: the manifest is damaged.
        OSError: a file cannot be written.
    """
    data = collect(folder, cache=cache, examples=examples, audit=audit)
    if data.audit is not None:
        text = data.audit.model_dump_json(indent=2) + "\n"
        (folder / SHORTCUTS_FILE).write_text(text, encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(data), encoding="utf-8")
    return data


def render(data: ReportData) -> str:
    """The report as HTML text, without any reference to another file or host."""
    environment = Environment(
        loader=PackageLoader("cxr_training.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"interval": _interval, "words": _words, "share": _share}
    labels = data.run.record.labels
    truth = np.asarray(labels)[data.truth]
    tables = {
        "uncalibrated": reliability(data.uncalibrated, truth, labels),
        f"temperature {data.temperature:.2f}": reliability(data.probabilities, truth, labels),
    }
    plots = {
        "roc": roc_plot(data.truth, data.probabilities, labels),
        "pr": precision_recall_plot(data.truth, data.probabilities, labels),
        "reliability": reliability_plot(tables),
    }
    if data.curves:
        plots["curves"] = curves_plot(data.curves)
    return environment.get_template(_TEMPLATE).render(
        data=data,
        record=data.run.record,
        labels=labels,
        # The plots are our own, and hold no text of the user's but class names, which matplotlib
        # escapes.
        plots={name: Markup(svg) for name, svg in plots.items()},  # noqa: S704
        reliability_tables=tables,
    )


def _interval(interval: Interval | None) -> Markup:
    if interval is None:
        return Markup("&ndash;")
    return Markup('<span class="figure">{} <small>{}&ndash;{}</small></span>').format(
        f"{interval.value:.3f}", f"{interval.low:.2f}", f"{interval.high:.2f}"
    )


def _words(name: str) -> str:
    words = name.replace("_", " ")
    for plain, usual in _USUAL.items():
        words = words.replace(plain, usual)
    return words


def _share(value: float) -> str:
    return f"{value:.1%}"
