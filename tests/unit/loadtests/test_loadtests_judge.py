"""Objectives, knee, comparison and report on runs that were made by hand."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from cxr_loadtests.compare import compare
from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.histogram import bucket, percentile
from cxr_loadtests.judge import Objectives, judge, junit, read_objectives
from cxr_loadtests.report import render, summary
from cxr_loadtests.results import (
    CodeRecord,
    Generator,
    Reconciliation,
    Result,
    Series,
    knee,
    load_result,
    saturated,
    steps,
)
from cxr_loadtests.server_side import reconcile
from support.loadtests import START, make_phase, make_result, make_steps, record

ROOT = Path(__file__).parents[3]


def objectives(**promises: Any) -> Objectives:
    return Objectives.model_validate({"objectives": [{"name": "all", **promises}]})


FLAT = {second: [0.1] * 20 for second in range(30)}


def test_a_percentile_is_within_half_a_percent() -> None:
    values = [0.001 * (number + 1) for number in range(1000)]
    counts: dict[int, int] = {}
    for value in values:
        counts[bucket(value)] = counts.get(bucket(value), 0) + 1
    for share, expected in ((0.5, 0.5), (0.95, 0.95), (0.99, 0.99)):
        assert percentile(counts, share) == pytest.approx(expected, rel=0.005)
    assert percentile({}, 0.5) is None


@pytest.mark.parametrize(
    ("promise", "kept"),
    [
        ({"p95_seconds": 0.11}, True),
        ({"p95_seconds": 0.09}, False),
        ({"p99_seconds": 0.09}, False),
        ({"error_ratio": 0.01}, True),
        ({"min_throughput": 19.0}, True),
        ({"min_throughput": 21.0}, False),
    ],
)
def test_each_objective_can_be_kept_and_broken(promise: dict[str, float], kept: bool) -> None:
    result = make_result(FLAT, failures={"503": 3})
    assert judge(result, objectives(**promise)).passed == kept


def test_an_error_ratio_is_broken_and_says_by_what() -> None:
    verdict = judge(make_result(FLAT, failures={"503": 30}), objectives(error_ratio=0.01))
    (broken,) = [check for check in verdict.checks if not check.passed]
    assert "30 x 503" in broken.observed


def test_a_wrong_answer_fails_whatever_the_objectives() -> None:
    result = make_result(FLAT, failures={"wrong answer": 1})
    assert not judge(result, objectives(error_ratio=1.0)).passed


def test_objectives_apply_by_scenario_and_protocol() -> None:
    slow = make_result({second: [1.0] for second in range(30)}, scenario="grpc", protocol="grpc")
    result = make_result(FLAT)
    both = result.model_copy(update={"bins": [*result.bins, *slow.bins]})
    by_scenario = judge(both, objectives(by="scenario", p95_seconds=0.5))
    assert {check.name for check in by_scenario.checks if not check.passed} == {"all (grpc): p95"}
    only = judge(both, objectives(protocol="v1", p95_seconds=0.5))
    assert only.passed
    with pytest.raises(LoadTestError, match="nothing that this run has asked"):
        judge(both, objectives(scenario="dicom", p95_seconds=0.5))


def test_by_protocol_takes_the_scenarios_of_each_together() -> None:
    """One of two scenarios over V1 fails, so that V1 as a whole does; V2 and gRPC do not."""
    parts = [
        make_result(FLAT, scenario="rest-v1", protocol="v1", failures={"503": 60}),
        make_result(FLAT, scenario="rest-raw", protocol="v1"),
        make_result(FLAT, scenario="v2-json", protocol="v2", failures={"503": 6}),
        make_result({second: [0.4] * 20 for second in range(30)}, scenario="grpc", protocol="grpc"),
    ]
    result = parts[0].model_copy(update={"bins": [item for part in parts for item in part.bins]})
    verdict = judge(result, objectives(by="protocol", error_ratio=0.04, p95_seconds=0.2))
    found = {
        check.name: (check.observed, check.passed)
        for check in verdict.checks
        if check.name.startswith("all")
    }
    assert found == {
        "all (grpc): errors": ("0.00% of 600", True),
        # 400 ms to 0.5 %.
        "all (grpc): p95": ("402 ms", False),
        "all (v1): errors": ("4.76% of 1260 (60 x 503)", False),
        "all (v1): p95": ("100 ms", True),
        "all (v2): errors": ("0.99% of 606 (6 x 503)", True),
        "all (v2): p95": ("100 ms", True),
    }
    # All together, the failures are few enough.
    assert judge(result, objectives(error_ratio=0.04)).passed


def test_bad_input_makes_no_latency_better() -> None:
    quick = make_result({second: [0.001] * 500 for second in range(30)}, scenario="bad-input")
    result = make_result({second: [1.0] for second in range(30)})
    both = result.model_copy(update={"bins": [*result.bins, *quick.bins]})
    assert not judge(both, objectives(p95_seconds=0.5)).passed


def test_only_judged_seconds_count() -> None:
    latencies = {second: [9.0 if second < 10 else 0.1] for second in range(30)}
    phases = [
        make_phase("warm-up", 0, 8),
        make_phase("judged", 8, 31, judged=True, settle=2.0),
    ]
    assert judge(make_result(latencies, phases=phases), objectives(p99_seconds=0.2)).passed


# Every 50 ms for 40 s: good answers for 10 s, then none within the timeout of 30 s.
FREEZE = [
    (number / 20, 0.1, "") if number < 200 else (number / 20, 30.0, "timeout")
    for number in range(800)
]


def at_rate(requests: Any, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A run of one judged phase of 40 s, from what its clients did."""
    recorder = record(monkeypatch, requests)
    phase = make_phase("rate", 0, 40, users=None, rate=20.0, judged=True)
    unfinished = recorder.cut_off()
    generator = Generator(workers=1, lost=0, busy=False, lag_p99=0.0, unfinished=unfinished)
    return make_result(FLAT, phases=[phase], bins=recorder.records(), generator=generator)


def test_a_freeze_until_the_end_belongs_to_the_phase_it_was_asked_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What hangs ends after the phase."""
    result = at_rate(FREEZE, monkeypatch)
    promises = objectives(error_ratio=0.5, p99_seconds=1.0, min_throughput=6.0)
    verdict = judge(result, promises)
    found = {check.name: check.observed for check in verdict.checks if not check.passed}
    # The last second is not whole.
    assert found == {
        "all: errors": "74.36% of 780 (580 x timeout)",
        "all: throughput": "5.1/s",
    }
    good = at_rate([(number / 20, 0.1, "") for number in range(800)], monkeypatch)
    assert judge(good, promises).passed
    worse = {check.name for check in compare(good, result, 0.15).checks if not check.passed}
    assert worse == {"errors"}


def test_a_freeze_that_no_timeout_ends_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = [(asked, seconds if not failure else None, "") for asked, seconds, failure in FREEZE]
    verdict = judge(at_rate(endless, monkeypatch), objectives(error_ratio=0.5))
    assert {check.name: check.observed for check in verdict.checks if not check.passed} == {
        "all: errors": "74.36% of 780 (580 x no outcome when the run ended)",
        "the load generator is whole": "0 workers lost, 600 requests unfinished",
    }


def test_answers_that_come_after_the_phase_are_late_and_no_throughput(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty a second are due, ten are answered: the others wait, and come by and by."""
    behind = [(number / 20, 0.1 + number / 20, "") for number in range(800)]
    verdict = judge(at_rate(behind, monkeypatch), objectives(p95_seconds=1.0, min_throughput=19))
    assert {check.name: check.observed for check in verdict.checks if not check.passed} == {
        "all: p95": "37175 ms",
        "all: throughput": "10.0/s",
    }


def test_a_phase_that_nothing_was_asked_in_keeps_no_promise() -> None:
    """All clients still wait for answers to what they asked in the warm-up."""
    phases = [make_phase("warm-up", 0, 31), make_phase("judged", 31, 60, judged=True)]
    verdict = judge(make_result(FLAT, phases=phases), objectives(error_ratio=0.5))
    assert {check.name: check.observed for check in verdict.checks if not check.passed} == {
        "all: errors": "no request"
    }


def test_a_lost_worker_and_other_counts_fail() -> None:
    lost = Generator(workers=2, lost=1, busy=False, lag_p99=None, unfinished=0)
    counts = Reconciliation(source="x", sent=600, answered=600, counted=590, by_code=[])
    for change in ({"generator": lost}, {"reconciliation": counts}):
        assert not judge(make_result(FLAT, **change), objectives(error_ratio=0.0)).passed


def test_a_generator_that_is_late_is_no_failure_and_is_said() -> None:
    late = Generator(workers=1, lost=0, busy=True, lag_p99=0.5, unfinished=0)
    result = make_result(FLAT, generator=late)
    verdict = judge(result, objectives(error_ratio=0.0))
    assert verdict.passed
    text = render(result.model_copy(update={"verdict": verdict}))
    assert "up to 500 ms late (p99): some of the latency is its own" in text


def test_requests_without_an_answer_may_be_counted_or_not() -> None:
    codes = [
        CodeRecord(protocol="v1", code="200", from_server=True, count=90),
        CodeRecord(protocol="v1", code="502", from_server=False, count=4),
        CodeRecord(protocol="v1", code="", from_server=False, count=6),
    ]
    for counted, agrees in ((89, False), (90, True), (100, True), (101, False)):
        found = reconcile(codes, {("v1", "200"): counted}, "x")  # type: ignore[arg-type]
        result = make_result(FLAT, reconciliation=found)
        assert judge(result, objectives(error_ratio=0.0)).passed == agrees


def test_the_knee_is_where_more_clients_bring_nothing() -> None:
    result = make_steps({1: 50, 2: 98, 4: 100, 8: 99, 16: 101})
    found = steps(result)
    at = knee(found)
    assert at is not None
    assert at.users == 2
    assert saturated(found)
    assert not saturated(found[:3])
    assert knee([]) is None
    # Without a judged phase, a step test is judged at its knee.
    assert judge(result, objectives(p99_seconds=0.03)).passed
    assert not judge(result, objectives(p99_seconds=0.01)).passed


def test_the_default_objectives_allow_no_error_in_a_soak() -> None:
    """One request of 600 is within the 0.5 % of every other run."""
    defaults = read_objectives(None)
    for shape, kept in (("soak", False), ("ship", True)):
        verdict = judge(make_result(FLAT, failures={"503": 1}, shape=shape), defaults)
        found = {check.name: check.observed for check in verdict.checks if not check.passed}
        assert list(found) == ([] if kept else ["soak: errors"])
        assert verdict.passed == kept
    assert judge(make_result(FLAT, shape="soak"), defaults).passed


def test_the_docs_show_the_default_objectives() -> None:
    text = (ROOT / "docs" / "loadtesting.md").read_text(encoding="utf-8")
    shown = text.split("```yaml\nobjectives:\n")[1].split("```")[0]
    assert Objectives.model_validate(yaml.safe_load("objectives:\n" + shown)) == (
        read_objectives(None)
    )


@pytest.mark.parametrize(("last", "kept"), [(103.0, True), (120.0, False)])
def test_memory_that_grows_is_broken(last: float, kept: bool) -> None:
    values = [100.0] * 15 + [last] * 15
    times = [START + float(second) for second in range(30)]
    memory = Series(name="m", group="memory", unit="MiB", times=times, values=values)
    result = make_result(FLAT, server=[memory])
    assert judge(result, objectives(memory_growth=0.05)).passed == kept
    # Without Prometheus there is nothing to look at.
    assert judge(make_result(FLAT), objectives(memory_growth=0.05)).passed


@pytest.mark.parametrize("seconds", [range(0), range(15)])
def test_memory_that_prometheus_does_not_know_is_broken(seconds: range) -> None:
    """No series at all, or one that ends half way."""
    times = [START + float(second) for second in seconds]
    memory = Series(
        name="m", group="memory", unit="MiB", times=times, values=[100.0 for _ in times]
    )
    server = [memory] if times else []
    verdict = judge(
        make_result(FLAT, server=server, prometheus=True), objectives(memory_growth=0.05)
    )
    (broken,) = [check for check in verdict.checks if not check.passed]
    assert broken.name == "all: memory"
    assert broken.observed == (
        "not known: Prometheus has no memory of the service at the beginning and the end of two"
    )


def test_junit_has_a_case_for_each_check() -> None:
    verdict = judge(make_result(FLAT), objectives(p95_seconds=0.05, error_ratio=0.0))
    suite = ET.fromstring(junit(verdict, "closed")).find("testsuite")  # noqa: S314 - our own
    assert suite is not None
    assert int(suite.attrib["tests"]) == len(verdict.checks) == len(suite.findall("testcase"))
    (failure,) = suite.iter("failure")
    assert failure.attrib["message"].startswith("promised at most 50 ms, observed 100 ms")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"objectives": [{"name": "x"}]}, "needs p95_seconds"),
        ({"objectives": [{"name": "x", "p95_seconds": -1}]}, "greater than 0"),
        ({"objectives": [{"name": "x", "error_ratio": 2}]}, "less than or equal to 1"),
        ({"objectives": [{"name": "x", "p96_seconds": 1}]}, "not permitted"),
        ({}, "Field required"),
    ],
)
def test_a_bad_objectives_file_is_one_sentence(
    tmp_path: Path, document: dict[str, Any], words: str
) -> None:
    path = tmp_path / "o.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(LoadTestError) as error:
        read_objectives(path)
    assert str(error.value).startswith("o.yaml, ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


class TestCompare:
    def test_the_same_run_is_no_regression(self) -> None:
        assert compare(make_result(FLAT), make_result(FLAT), 0.15).passed

    def test_a_slower_run_is_one(self) -> None:
        slower = make_result({second: [0.13] * 20 for second in range(30)})
        verdict = compare(make_result(FLAT), slower, 0.15)
        assert {c.name for c in verdict.checks if not c.passed} >= {"p50", "p95", "p99"}
        assert compare(make_result(FLAT), slower, 0.5).passed

    def test_a_few_slow_seconds_are_chance(self) -> None:
        """One of six blocks is slow: the interval of the ratio holds 1."""
        unlucky = {second: [0.1 if second < 28 else 0.4] * 20 for second in range(30)}
        verdict = compare(make_result(FLAT), make_result(unlucky), 0.15)
        assert verdict.passed, verdict

    def test_fewer_answers_and_more_errors_are_regressions(self) -> None:
        fewer = make_result({second: [0.1] * 10 for second in range(30)})
        assert not compare(make_result(FLAT), fewer, 0.15).passed
        failing = make_result(FLAT, failures={"503": 30})
        assert not compare(make_result(FLAT), failing, 0.15).passed
        assert compare(make_result(FLAT), make_result(FLAT, failures={"503": 1}), 0.15).passed
        wrong = make_result(FLAT, failures={"wrong answer": 1})
        assert not compare(make_result(FLAT), wrong, 0.15).passed

    def test_a_lower_knee_is_a_regression(self) -> None:
        verdict = compare(make_steps({1: 50, 2: 100}), make_steps({1: 50, 2: 60}), 0.15)
        assert "throughput at the knee" in {c.name for c in verdict.checks if not c.passed}

    def test_unlike_runs_are_refused(self) -> None:
        for other in (make_result(FLAT, shape="open"), make_result(FLAT, scenario="dicom")):
            with pytest.raises(LoadTestError, match="compare like with like"):
                compare(make_result(FLAT), other, 0.15)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = make_result(FLAT)
    result.save(tmp_path)
    assert load_result(tmp_path) == load_result(tmp_path / "result.json") == result
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(LoadTestError, match="not the result"):
        load_result(tmp_path)
    with pytest.raises(LoadTestError, match="Cannot read"):
        load_result(tmp_path / "nowhere")


def test_the_report_needs_nothing_else_and_shows_the_knee() -> None:
    result = make_steps({1: 50, 2: 98, 4: 100})
    series = [
        Series(
            name=name, group=group, unit="", times=[float(START), START + 9.0], values=[1.0, 2.0]
        )
        for name, group in (("decode", "stages"), ("ready", "replicas"), ("wait", "queue"))
    ]
    verdict = judge(result, objectives(error_ratio=0.0))
    text = render(result.model_copy(update={"verdict": verdict, "server": series}))
    assert "http" not in text.replace("http://127.0.0.1", "").replace("http://www.w3.org", "")
    assert "<script" not in text
    assert text.count("<svg") == 2
    assert "knee: 2 clients, 98.0/s" in text
    assert "stage, ms" in text
    assert "coordinated omission" in text
    assert summary(result)[-1][0] == "all"
