"""`cxr loadtest compare`: like with like, and what it says of two runs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from click.testing import Result as Done

from cxr_loadtests.cli import loadtest
from cxr_loadtests.compare import compare
from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.results import Result
from support.loadtests import make_phase, make_result, make_steps


def at_rate(rate: int, seconds: float, *, length: int = 30) -> Result:
    """A run of a shape with a rate, in which every answer takes so many seconds."""
    phase = make_phase("rate", 0, length + 2, users=None, rate=float(rate), judged=True)
    latencies = {second: [seconds] * rate for second in range(length)}
    return make_result(latencies, shape="open", phases=[phase])


def with_clients(users: int, *, judged_from: int = 0) -> Result:
    phase = make_phase("two", judged_from, 32, users=users, judged=True)
    return make_result({second: [0.1] * 20 for second in range(30)}, phases=[phase])


def at_half_of_the_knee(knee: int, seconds: float, *, steps: Sequence[int] = (1, 2)) -> Result:
    """A run of a shape that finds its knee, then sends half of that."""
    phases = [make_phase("warm-up", 0, 4)]
    latencies: dict[int, list[float]] = {}
    for users in steps:
        start = 4 * users
        phases.append(make_phase(f"{users}", start, start + 4, users=users, step=True))
        for second in range(start, start + 4):
            latencies[second] = [0.02] * (knee if users > 1 else knee // 2)
    rate = knee // 2
    phases.append(make_phase("half", 20, 52, users=None, rate=float(rate), judged=True))
    latencies |= {second: [seconds] * rate for second in range(20, 50)}
    return make_result(latencies, shape="all", phases=phases)


def told(folder: Path, before: Result, after: Result, *options: str) -> Done:
    """`cxr loadtest compare` of two folders."""
    folders = []
    for name, result in (("before", before), ("after", after)):
        folders.append(str(folder / name))
        (folder / name).mkdir()
        result.save(folder / name)
    return CliRunner().invoke(loadtest, ["compare", *folders, *options])


def test_the_command_finds_no_regression(tmp_path: Path) -> None:
    done = told(tmp_path, at_rate(20, 0.1), at_rate(20, 0.11))
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "No regression."
    assert "at most 1.15 times 100 ms" in done.output
    assert "BROKEN" not in done.output


def test_the_command_finds_a_regression_and_takes_what_is_allowed(tmp_path: Path) -> None:
    done = told(tmp_path, at_rate(20, 0.1), at_rate(20, 0.13))
    assert done.exit_code == 1, done.output
    assert done.output.splitlines()[-1] == "Worse than before."
    broken = [line.split()[1] for line in done.output.splitlines() if line.startswith("BROKEN")]
    assert broken[:3] == ["p50", "p95", "p99"]
    again = ["compare", str(tmp_path / "before"), str(tmp_path / "after"), "--allowed=0.5"]
    assert CliRunner().invoke(loadtest, again).exit_code == 0


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            at_rate(40, 0.1),
            at_rate(5, 0.1),
            "The phase rate had 40 requests a second in one run and 5 in the other",
        ),
        (
            at_rate(20, 0.1),
            at_rate(20, 0.1, length=60),
            "The phase rate had 32 seconds in one run and 62 in the other",
        ),
        (
            with_clients(2),
            with_clients(4),
            "The phase two had 2 clients in one run and 4 in the other",
        ),
        (
            at_half_of_the_knee(40, 0.1),
            make_result({0: [0.1]}, shape="all"),
            "The runs have different phases",
        ),
        (at_rate(20, 0.1), with_clients(2), "different shapes, open and closed"),
    ],
)
def test_the_command_refuses_runs_with_other_loads(
    tmp_path: Path, before: Result, after: Result, words: str
) -> None:
    done = told(tmp_path, before, after)
    assert done.exit_code == 2
    assert words in done.output
    assert "compare like with like." in done.output
    assert len(done.output.splitlines()) == 1


def test_the_command_refuses_what_is_no_result(tmp_path: Path) -> None:
    done = told(tmp_path, at_rate(20, 0.1), at_rate(20, 0.1))
    assert done.exit_code == 0
    (tmp_path / "after" / "result.json").write_text("{}", encoding="utf-8")
    again = ["compare", str(tmp_path / "before"), str(tmp_path / "after")]
    done = CliRunner().invoke(loadtest, again)
    assert done.exit_code == 2
    assert "is not the result of a load test" in done.output


def test_runs_that_differ_by_a_tick_are_alike() -> None:
    assert compare(with_clients(2), with_clients(2, judged_from=1), 0.15).passed


def test_a_higher_knee_is_no_regression_of_latency(tmp_path: Path) -> None:
    """Twice the load at 130 ms is not worse than half of it at 100 ms."""
    done = told(tmp_path, at_half_of_the_knee(40, 0.1), at_half_of_the_knee(80, 0.13))
    assert done.exit_code == 0, done.output
    assert (
        "Latencies are not compared: half had 20.0 requests/s before and 40.0 requests/s after"
        in done.output
    )
    assert done.output.splitlines()[-1] == "No regression in what was compared."
    assert "throughput at the knee" in done.output
    assert "p95" not in done.output


def test_a_lower_knee_is_a_regression_whatever_the_latency_below_it(tmp_path: Path) -> None:
    done = told(tmp_path, at_half_of_the_knee(80, 0.1), at_half_of_the_knee(40, 0.05))
    assert done.exit_code == 1, done.output
    broken = [line for line in done.output.splitlines() if line.startswith("BROKEN")]
    assert len(broken) == 1
    assert "throughput at the knee" in broken[0]
    assert done.output.splitlines()[-1] == "Worse than before."


def test_with_the_same_knee_latencies_are_compared() -> None:
    verdict = compare(at_half_of_the_knee(40, 0.1), at_half_of_the_knee(40, 0.13), 0.15)
    assert not verdict.notes
    assert {check.name for check in verdict.checks if not check.passed} >= {"p50", "p95", "p99"}


def test_more_steps_in_one_run_are_a_finding_of_it() -> None:
    longer = at_half_of_the_knee(40, 0.1, steps=(1, 2, 3))
    assert compare(at_half_of_the_knee(40, 0.1), longer, 0.15).passed
    set_by_hand = longer.model_copy(
        update={"phases": [phase for phase in longer.phases if not phase.step]}
    )
    with pytest.raises(LoadTestError, match="Only one of the runs has steps"):
        compare(longer, set_by_hand, 0.15)


def test_at_another_knee_a_step_test_compares_throughput_alone() -> None:
    verdict = compare(make_steps({1: 50, 2: 100}), make_steps({1: 50, 2: 60, 4: 100}), 0.15)
    assert verdict.notes == [
        "Latencies are not compared: 2 had 2 clients before and 4 clients after, as each run's own "
        "knee has it."
    ]
    assert not any(check.name.startswith("p") for check in verdict.checks)
