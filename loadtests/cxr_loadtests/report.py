"""The report: one HTML file that needs nothing else."""

import math
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_loadtests.results import (
    BinRecord,
    PhaseRecord,
    Result,
    Series,
    figures,
    judged_phases,
    knee,
    pooled,
    steps,
)

_POINTS = 120
_PERCENTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
_GROUPS = (
    ("stages", "stage, ms", 1000.0),
    ("replicas", "replicas", 1.0),
    ("queue", "queue", 1.0),
    ("memory", "memory, MiB", 1.0),
)


def render(result: Result) -> str:
    """The report of a run as HTML."""
    environment = Environment(
        loader=PackageLoader("cxr_loadtests", "data"), autoescape=select_autoescape(default=True)
    )
    found = steps(result)
    return environment.get_template("report.html.j2").render(
        result=result,
        checks=result.verdict.checks if result.verdict else [],
        judged=[phase.name for phase in judged_phases(result)],
        rows=_rows(result),
        failures=_failures(result),
        steps=found,
        knee=knee(found),
        timeline=_timeline(result),
        curve=_curve(result) if found else "",
        open_model=any(phase.rate is not None for phase in result.phases),
        closed_model=any(phase.users is not None for phase in result.phases),
    )


def _rows(result: Result) -> list[dict[str, Any]]:
    phases = judged_phases(result)
    pairs = sorted({(item.scenario, item.protocol) for item in result.bins})
    rows = []
    for scenario, protocol in pairs:

        def wanted(item: BinRecord, pair: tuple[str, str] = (scenario, protocol)) -> bool:
            return (item.scenario, item.protocol) == pair

        some = figures(result, phases, wanted)
        rows.append(
            {
                "scenario": scenario,
                "protocol": protocol,
                "answered": some.answered,
                "failed": some.failed,
                "throughput": some.throughput,
                **{name: some.percentile(share) for name, share in _PERCENTILES},
            }
        )
    return rows


def _failures(result: Result) -> list[tuple[str, str, int]]:
    """Scenario, what went wrong, how often; of the whole run."""
    counts: dict[tuple[str, str], int] = {}
    for item in result.bins:
        for kind, count in item.failures.items():
            counts[item.scenario, kind] = counts.get((item.scenario, kind), 0) + count
    return [(*key, count) for key, count in sorted(counts.items())]


def _timeline(result: Result) -> str:
    """Latency, throughput and the server's figures on one time axis, as SVG."""
    groups = [
        (group, label, factor)
        for group, label, factor in _GROUPS
        if any(series.group == group for series in result.server)
    ]
    rows = 2 + len(groups)
    figure = Figure(figsize=(9.5, 1.9 * rows), layout="constrained")
    axes: Sequence[Axes] = list(figure.subplots(rows, 1, sharex=True))
    start = result.phases[0].start
    _latency(axes[0], result, start)
    _throughput(axes[1], result, start)
    for axis, (group, label, factor) in zip(axes[2:], groups, strict=True):
        _server(axis, [item for item in result.server if item.group == group], start, factor)
        axis.set_ylabel(label)
    for axis in axes:
        _phases(axis, result.phases, start)
        axis.margins(x=0)
        axis.grid(alpha=0.25)
    axes[-1].set_xlabel("seconds since the start")
    return _svg(figure)


def _seconds(result: Result) -> tuple[int, int, int]:
    """First and last second of the run, and how many of them make one point."""
    first, last = int(result.phases[0].start), int(result.phases[-1].end)
    return first, last, max(1, (last - first) // _POINTS)


def _latency(axis: Axes, result: Result, start: float) -> None:
    first, last, width = _seconds(result)
    blocks: dict[int, list[BinRecord]] = {}
    for item in result.bins:
        if item.scenario != "bad-input":
            blocks.setdefault((item.second - first) // width, []).append(item)
    places = sorted(blocks)
    for name, share in _PERCENTILES:
        points = [pooled(blocks[place], width).percentile(share) for place in places]
        axis.plot(
            [first + (place + 0.5) * width - start for place in places],
            [math.nan if point is None else point * 1000 for point in points],
            label=name,
            linewidth=1.2,
        )
    axis.set_ylabel("latency, ms")
    axis.set_yscale("log")
    axis.set_xlim(0, last - start)
    axis.legend(loc="upper left", ncols=3, fontsize=8)


def _throughput(axis: Axes, result: Result, start: float) -> None:
    first, last, width = _seconds(result)
    answers: Counter[int] = Counter()
    failed: Counter[int] = Counter()
    for item in result.bins:
        place = (item.second - first) // width
        answers[place] += item.answers
        failed[place] += sum(item.failures.values())
    # Where nothing came, the line goes down to 0.
    places = range((last - first) // width + 1)
    times = [first + (place + 0.5) * width - start for place in places]
    axis.plot(times, [answers[place] / width for place in places], label="as expected")
    axis.plot(times, [failed[place] / width for place in places], label="failed", color="firebrick")
    axis.set_ylabel("requests/s")
    axis.legend(loc="upper left", ncols=2, fontsize=8)


def _server(axis: Axes, found: Sequence[Series], start: float, factor: float) -> None:
    for series in found:
        axis.plot(
            [at - start for at in series.times],
            [value * factor for value in series.values],
            label=series.name,
            linewidth=1.2,
        )
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper left", ncols=3, fontsize=8)


def _phases(axis: Axes, phases: Sequence[PhaseRecord], start: float) -> None:
    for phase in phases:
        axis.axvline(phase.start - start, color="grey", linewidth=0.6, linestyle=":")
        if phase.judged:
            axis.axvspan(
                phase.start + phase.settle - start, phase.end - start, color="tab:green", alpha=0.07
            )


def _curve(result: Result) -> str:
    """Throughput and latency against the number of clients, with the knee, as SVG."""
    found = steps(result)
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis: Axes = figure.subplots()
    users = [step.users for step in found]
    axis.plot(users, [step.throughput for step in found], "o-", label="throughput")
    axis.set_xlabel("clients without a pause")
    axis.set_ylabel("answers as expected/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    at = knee(found)
    if at is not None:
        axis.axvline(at.users, color="black", linewidth=0.8, linestyle="--")
        axis.annotate(
            f"knee: {at.users} clients, {at.throughput:.1f}/s",
            (at.users, at.throughput),
            textcoords="offset points",
            # Towards the middle, where there is room.
            ha="left" if at.users <= max(users) / 2 else "right",
            xytext=(6 if at.users <= max(users) / 2 else -6, -16),
            fontsize=9,
        )
    other = axis.twinx()
    other.plot(
        users,
        [math.nan if step.p95 is None else step.p95 * 1000 for step in found],
        "s:",
        color="tab:orange",
        label="p95",
    )
    other.set_ylabel("p95, ms")
    other.set_ylim(bottom=0)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text as text: smaller, and found by a search.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cxr"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def summary(result: Result) -> list[list[str]]:
    """Rows of scenario, protocol, answers, failures, throughput and percentiles, for a terminal."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value * 1000:.0f}"

    rows = [
        [
            row["scenario"],
            row["protocol"],
            str(row["answered"]),
            str(row["failed"]),
            f"{row['throughput']:.1f}",
            *(shown(row[name]) for name, _ in _PERCENTILES),
        ]
        for row in _rows(result)
    ]
    phases = judged_phases(result)
    good = figures(result, phases, lambda item: item.scenario != "bad-input")
    every = figures(result, phases)
    rows.append(
        [
            "all",
            "",
            str(every.answered),
            str(every.failed),
            f"{every.throughput:.1f}",
            *(shown(good.percentile(share)) for _, share in _PERCENTILES),
        ]
    )
    return rows
