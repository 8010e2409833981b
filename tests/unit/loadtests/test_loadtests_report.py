"""The charts of the HTML report, as a reader sees them."""

import re
from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree as ET

import pytest

from cxr_loadtests.report import render
from cxr_loadtests.results import Result, Series, Verdict
from support.loadtests import START, make_result

_LABELS = ("latency, ms", "requests/s", "stage, ms", "replicas", "queue", "memory, MiB")
_SVG = "{http://www.w3.org/2000/svg}"
Group = Literal["stages", "replicas", "queue", "memory"]


def server_series(group: Group, name: str) -> Series:
    """A figure that the server has for a part of the run only: from second 8 to 20."""
    times = [START + 8.0, START + 20.0]
    return Series(name=name, group=group, unit="", times=times, values=[1.0, 2.0])


@pytest.fixture(scope="module")
def charts() -> dict[str, ET.Element]:
    """The charts over time by the label of their y axis, in order."""
    # 10 ms to 1 s each second.
    latencies = {second: [0.01 * (n + 1) for n in range(100)] for second in range(30)}
    result: Result = make_result(latencies).model_copy(
        update={
            "verdict": Verdict(passed=True, checks=[]),
            "server": [
                server_series("stages", "decode"),
                server_series("replicas", "ready replicas"),
                server_series("queue", "images that wait"),
                server_series("queue", "requests in flight"),
                server_series("memory", "of the largest replica"),
            ],
        }
    )
    found = charts_of(result)
    assert len(found) == len(_LABELS)
    return found


def charts_of(result: Result) -> dict[str, ET.Element]:
    """The charts over time of a run."""
    text = render(result)
    root = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])  # noqa: S314 - ours
    axes = [group for group in root.iter(f"{_SVG}g") if group.get("id", "").startswith("axes_")]
    found = {label: group for group in axes for label in _LABELS if label in words(group)}
    assert list(found.values()) == axes
    return found


def words(chart: ET.Element) -> list[str]:
    return [(item.text or "").strip() for item in chart.iter(f"{_SVG}text")]


def line(chart: ET.Element, number: int) -> list[tuple[float, float]]:
    """The points of a line of a chart in the picture; y grows downwards."""
    lines = [group for group in chart if group.get("id", "").startswith("line2d_")]
    path = lines[number].find(f"{_SVG}path")
    assert path is not None
    found = re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])
    return [(float(x), float(y)) for x, y in found]


def ticks(chart: ET.Element) -> Sequence[float]:
    """Where the marks of the time axis are in the picture."""
    groups = [group for group in chart.iter(f"{_SVG}g") if "xtick_" in group.get("id", "")]
    return [float(use.attrib["x"]) for group in groups for use in group.iter(f"{_SVG}use")]


def test_percentiles_are_lines_over_time(charts: dict[str, ET.Element]) -> None:
    chart = charts["latency, ms"]
    assert [word for word in words(chart) if word in ("p50", "p95", "p99")] == ["p50", "p95", "p99"]
    heights = []
    for number in range(3):
        points = line(chart, number)
        assert len(points) > 20
        heights.append(points[0][1])
    # 0.5, 0.95 and 0.99 s, from below to above.
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 3


def test_the_server_s_stages_replicas_queue_and_memory_are_shown(
    charts: dict[str, ET.Element],
) -> None:
    for label, names in {
        "stage, ms": ["decode"],
        "replicas": ["ready replicas"],
        "queue": ["images that wait", "requests in flight"],
        "memory, MiB": ["of the largest replica"],
    }.items():
        assert [word for word in words(charts[label]) if word in names] == names
        for number in range(len(names)):
            assert len(line(charts[label], number)) == 2


def test_client_and_server_share_one_time_axis(charts: dict[str, ET.Element]) -> None:
    marks = ticks(charts["latency, ms"])
    assert len(marks) > 4
    assert all(ticks(chart) == marks for chart in charts.values())
    *_, last = charts.values()
    seconds = [int(word) for word in words(last) if word.isdigit()][: len(marks)]
    scale = (marks[-1] - marks[0]) / (seconds[-1] - seconds[0])
    for label in ("stage, ms", "replicas", "queue", "memory, MiB"):
        places = [x for x, _ in line(charts[label], 0)]
        assert places == pytest.approx([marks[0] + scale * (at - seconds[0]) for at in (8, 20)])
    # Half a second after the start is the middle of the clients' first second.
    assert line(charts["latency, ms"], 0)[0][0] == pytest.approx(marks[0] + scale * 0.5)


def test_a_pause_of_the_service_is_a_gap_in_throughput() -> None:
    seconds = [*range(10), *range(20, 30)]
    result = make_result({second: [0.1] * 20 for second in seconds})
    found = charts_of(result.model_copy(update={"verdict": Verdict(passed=True, checks=[])}))
    heights = [y for _, y in line(found["requests/s"], 0)]
    assert len(set(heights[:10])) == len(set(heights[10:20])) == 1
    # y grows downwards.
    assert heights[15] > heights[5] == heights[25]
