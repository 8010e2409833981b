"""The simulation: its queueing, its autoscaler, and what it said of a measured case."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from cxr.cli import main
from cxr_loadtests.capacity import Case, measured_service, read_case, replicas_for
from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.results import Result
from cxr_loadtests.simulation import (
    Outcome,
    Rate,
    Scaling,
    Service,
    erlang_c,
    interpolated,
    simulate,
)
from support.loadtests import make_result, make_steps

# Of a cluster: the load of a day, and a jump. docs/reliability.md says what they are.
DAY, JUMP = (Path(__file__).with_name(f"measured_{name}.json") for name in ("day", "jump"))


def service(*, mean: float = 0.1, sigma: float = 0.0, parallel: int = 1) -> Service:
    drawn = np.random.default_rng(0).lognormal(math.log(mean), sigma, 2000)
    return Service(drawn, parallel, (1.0,) * parallel)


def constant(rate: float) -> Rate:
    return interpolated([(0.0, rate)])


def still(replicas: int) -> Scaling:
    return Scaling(metric="none", min=replicas, max=replicas)


def test_erlang_s_formula() -> None:
    # Of one server, the chance to wait is its load; the second value is from Erlang's tables.
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(10, 8.0) == pytest.approx(0.409, abs=0.001)


@pytest.mark.parametrize(("load", "parallel"), [(0.5, 1), (0.8, 1), (0.7, 4)])
def test_waiting_is_what_queueing_theory_says(load: float, parallel: int) -> None:
    """Of a single replica with equal service times, both ways (M/D/1: the mean wait is exact)."""
    one = service(parallel=parallel)
    rate = load * one.throughput
    exact = simulate(constant(rate), one, still(1), 3000, exact=True)
    fluid = simulate(constant(rate), one, still(1), 3000)
    if parallel == 1:
        values = np.concatenate(exact.latencies)
        assert values.mean() == pytest.approx(0.1 * (1 + load / 2 / (1 - load)), rel=0.05)
    for share in (0.5, 0.95):
        assert fluid.percentile(share) == pytest.approx(exact.percentile(share), rel=0.15)


def test_how_a_gateway_deals_requests_out_is_in_the_latency() -> None:
    """Events and flow; four replicas at 60 and 80 % of what they can."""
    one = service(sigma=0.1)
    for load in (0.6, 0.8):
        rate = load * 4 * one.throughput
        found = []
        for balancing in ("turn", "rounds", "random"):
            scaling = still(4).model_copy(update={"balancing": balancing})
            exact = simulate(constant(rate), one, scaling, 600, exact=True)
            fluid = simulate(constant(rate), one, scaling, 600)
            found.append(exact.percentile(0.95))
            assert fluid.percentile(0.95) == pytest.approx(found[-1], rel=0.15)
        assert found == sorted(found)
        assert found[2] > 1.5 * found[0]


def test_the_flow_agrees_with_the_events_while_it_scales() -> None:
    points = [(0.0, 5.0), (60.0, 5.0), (61.0, 25.0), (240.0, 25.0), (241.0, 5.0), (300.0, 5.0)]
    scaling = Scaling(target=1.5, scrape=5, interval=5, down_stabilization=30, cold_start=10)
    one = service(sigma=0.3)
    # What a jump costs depends on when the next scrape and decision come: the mean of several.
    exact, fluid = (
        [
            simulate(interpolated(points), one, scaling, 300, exact=exact, seed=seed)
            for seed in range(16)
        ]
        for exact in (True, False)
    )
    assert {max(outcome.ready) for outcome in exact + fluid} == {4}

    def mean(outcomes: list[Outcome], what: Callable[[Outcome], float]) -> float:
        return float(np.mean([what(outcome) for outcome in outcomes]))

    tolerances: list[tuple[Callable[[Outcome], float], float]] = [
        (lambda outcome: outcome.mean_ready, 0.1),
        (lambda outcome: outcome.replica_hours, 0.1),
        (lambda outcome: outcome.percentile(0.95), 0.2),
    ]
    for what, tolerance in tolerances:
        assert mean(fluid, what) == pytest.approx(mean(exact, what), rel=tolerance)


class TestScaler:
    def test_a_cold_start_delays_the_second_replica(self) -> None:
        rate = interpolated([(0, 1), (100, 1), (101, 25)])
        for seconds in (10, 60):
            scaling = Scaling(target=1.5, scrape=5, interval=5, cold_start=seconds)
            ready = simulate(rate, service(), scaling, 400).ready
            asked = simulate(rate, service(), scaling, 400).asked
            wanted = next(i for i, count in enumerate(asked) if count > 1)
            came = next(i for i, count in enumerate(ready) if count > 1)
            assert came - wanted == pytest.approx(seconds, abs=1)

    def test_stabilisation_keeps_replicas_after_a_peak(self) -> None:
        rate = interpolated([(0, 25), (300, 25), (301, 1)])
        ends = []
        for window in (0, 300):
            scaling = Scaling(
                target=1.5, min=1, scrape=5, interval=5, cold_start=5, down_stabilization=window
            )
            asked = simulate(rate, service(), scaling, 1200).asked
            ends.append(max(i for i, count in enumerate(asked) if count > 1))
        assert ends[1] - ends[0] == pytest.approx(300, abs=30)

    def test_at_most_four_or_twice_as_many_come_in_15_seconds(self) -> None:
        scaling = Scaling(target=0.1, max=100, scrape=5, interval=5, cold_start=1000)
        asked = simulate(constant(9.0), service(), scaling, 120).asked
        for second in range(len(asked) - 15):
            assert asked[second + 15] <= max(asked[second] + 8, 4 * asked[second])
        assert asked[10] <= 5

    def test_cpu_use_is_a_metric_too(self) -> None:
        scaling = Scaling(
            metric="cpu", target=0.7, max=10, cold_start=5, cpu_seconds=0.1, interval=5
        )
        # 5 cores are used; 0.7 of a core a replica.
        assert simulate(constant(50.0), service(), scaling, 900).asked[-1] in (7, 8)

    def test_what_does_not_fit_into_the_queue_is_refused(self) -> None:
        scaling = Scaling(metric="none", min=1, max=1, max_queue=20)
        for exact in (True, False):
            outcome = simulate(constant(20.0), service(), scaling, 300, exact=exact)
            assert outcome.refused == pytest.approx(300 * 10, rel=0.1)
            assert outcome.percentile(0.95) == pytest.approx(2.0, rel=0.15)


def test_a_service_is_read_off_a_step_test() -> None:
    """Two at once, and slower together: 50/s with one client, 80/s with two and more."""
    one = measured_service(make_steps({1: 50, 2: 80, 4: 80}), 1)
    assert one.parallel == 2
    assert one.throughput == pytest.approx(80, rel=0.02)
    assert one.slowdown == pytest.approx((1.0, 1.25), rel=0.02)
    # The next request begins while an answer is on its way: 9/s with one client, 10/s with two.
    overlapping = measured_service(make_steps({1: 9, 2: 10}), 1)
    assert overlapping.parallel == 1
    assert overlapping.throughput == pytest.approx(10, rel=0.02)
    alone = simulate(constant(0.1), overlapping, still(1), 3000, exact=True)
    assert alone.percentile(0.5) == pytest.approx(1 / 9, rel=0.02)
    # The same figures from two replicas: one request at once each.
    assert measured_service(make_steps({1: 50, 2: 80, 4: 80}), 2).parallel == 1
    with pytest.raises(LoadTestError, match="no step test"):
        measured_service(make_result({0: [0.1]}), 1)


def test_replicas_for_a_rate() -> None:
    one = service(sigma=0.3)
    count, p95 = replicas_for(100.0, one, p95=1.0, headroom=0.3)
    assert count == math.ceil(100 / (0.7 * one.throughput))
    assert p95 < 1.0
    more, quicker = replicas_for(100.0, one, p95=0.2, headroom=0.0)
    assert quicker <= 0.2
    assert more > math.ceil(100 / one.throughput)
    with pytest.raises(LoadTestError, match="Even an idle replica"):
        replicas_for(100.0, one, p95=0.05, headroom=0.3)


def test_a_day_of_a_thousand_replicas() -> None:
    """The shipped case, and an hour of it about the first spike."""
    case = read_case(None)
    assert case.scaling.max == 1000
    rate = case.rate()
    assert rate(11 * 3600) == pytest.approx(20_000)
    assert rate(23 * 3600) == pytest.approx(1_500, rel=0.01)
    assert rate(8 * 3600 + 60) == pytest.approx(1.5 * rate(8 * 3600 - 60), rel=0.02)
    scaling = case.scaling.model_copy(update={"min": 700})
    hour = simulate(
        lambda now: rate(now + 7.75 * 3600), service(mean=0.035, sigma=0.3), scaling, 3600
    )
    assert max(hour.ready) == 1000
    assert np.sum(hour.rates) > 5e7


def recorded(path: Path) -> tuple[dict[str, Any], Service, Case]:
    """What was measured, one replica, and the case."""
    record = json.loads(path.read_text(encoding="utf-8"))
    one = measured_service(Result.model_validate_json(json.dumps(record["steps"])), 1)
    return record["measured"], one, Case.model_validate(record["case"])


@pytest.mark.parametrize("exact", [True, False])
def test_replicas_and_p95_of_a_measured_day_are_predicted_within_15_per_cent(exact: bool) -> None:
    measured, one, case = recorded(DAY)
    outcomes = [
        simulate(case.rate(), one, case.scaling, case.seconds, exact=exact, seed=seed)
        for seed in range(8)
    ]
    replicas = np.mean([outcome.mean_ready for outcome in outcomes])
    p95s = [outcome.percentile(0.95) for outcome in outcomes]
    for expected, found in ((measured["replicas"], replicas), (measured["p95"], np.mean(p95s))):
        assert list(expected) == pytest.approx([found] * len(expected), rel=0.15)
    # The case determines it: hardly a draw is far from the others.
    assert np.mean(np.abs(np.asarray(p95s) / np.median(p95s) - 1) < 0.15) > 0.8


def test_the_replicas_of_a_measured_jump_are_predicted_but_its_p95_is_luck() -> None:
    measured, one, case = recorded(JUMP)
    for exact in (True, False):
        outcomes = [
            simulate(case.rate(), one, case.scaling, case.seconds, exact=exact, seed=seed)
            for seed in range(12)
        ]
        mean = np.mean([outcome.mean_ready for outcome in outcomes])
        assert mean == pytest.approx(measured["replicas"], rel=0.15)
        assert {max(outcome.ready) for outcome in outcomes} == {measured["most"]}
        if exact:
            p95s = [outcome.percentile(0.95) for outcome in outcomes]
            assert min(p95s) < measured["p95"] < max(p95s)
            assert max(p95s) > 5 * min(p95s)


class TestCommand:
    def test_plan(self, tmp_path: Path) -> None:
        make_steps({1: 50, 2: 80, 4: 80}).save(tmp_path)
        options = ["--rate", "400", "--p95", "0.5", "--price", "0.2", "--json"]
        done = CliRunner().invoke(main, ["capacity", "plan", str(tmp_path), *options])
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)
        assert found["replicas"] == math.ceil(400 / (0.7 * found["throughput_per_replica"]))
        assert found["cost_per_hour"] == pytest.approx(0.2 * found["replicas"])

    def test_simulate(self, tmp_path: Path) -> None:
        make_steps({1: 50, 2: 80, 4: 80}).save(tmp_path)
        case = tmp_path / "case.yaml"
        case.write_text(
            yaml.safe_dump({"seconds": 120, "points": [[0, 10], [120, 100]], "scaling": {}}),
            encoding="utf-8",
        )
        series = tmp_path / "series.csv"
        arguments = ["capacity", "simulate", str(tmp_path), f"--case={case}", f"--series={series}"]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        assert "replicas mean" in done.output
        assert len(series.read_text(encoding="utf-8").splitlines()) == 121

    def test_several_runs_say_how_much_is_luck(self, tmp_path: Path) -> None:
        """A jump is met sooner or later, as the clocks of scrapes and decisions have it."""
        make_steps({1: 10, 2: 10}).save(tmp_path)
        jump = [[0, 2], [60, 2], [61, 20], [120, 20]]
        case = tmp_path / "case.yaml"
        scaling = {"target": 1.2, "scrape": 15, "interval": 15, "cold_start": 5}
        case.write_text(yaml.safe_dump({"seconds": 120, "points": jump, "scaling": scaling}))
        options = [f"--case={case}", "--runs=8", "--json"]
        done = CliRunner().invoke(main, ["capacity", "simulate", str(tmp_path), *options])
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)
        assert found["p95_lowest"] < found["p95_seconds"] < found["p95_highest"]
        assert found["p95_highest"] > 1.2 * found["p95_lowest"]

    @pytest.mark.parametrize(
        ("document", "words"),
        [
            ({"scaling": {}}, "has points or a day"),
            ({"points": [[0, 1]], "scaling": {"min": 5, "max": 4}}, "must not be more"),
            ({"points": [[0, 1]], "scaling": {"metric": "luck"}}, "scaling.metric"),
        ],
    )
    def test_a_bad_case_is_one_sentence(
        self, tmp_path: Path, document: dict[str, object], words: str
    ) -> None:
        make_steps({1: 50, 2: 80, 4: 80}).save(tmp_path)
        case = tmp_path / "case.yaml"
        case.write_text(yaml.safe_dump(document), encoding="utf-8")
        done = CliRunner().invoke(main, ["capacity", "simulate", str(tmp_path), f"--case={case}"])
        assert done.exit_code == 1
        assert words in done.output
        assert len(done.output.splitlines()) == 1
