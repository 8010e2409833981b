"""Whether one run is worse than another."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.histogram import merged, percentile
from cxr_loadtests.results import (
    BinRecord,
    Check,
    PhaseRecord,
    Result,
    Verdict,
    figures,
    judged_phases,
    knee,
    steps,
)
from cxr_loadtests.scenarios import WRONG_ANSWER

# Blocks of seconds are drawn again and again: neighbouring answers wait in the same queue, so that
# single ones say less than their number.
_BLOCK_SECONDS = 5
_ROUNDS = 400
_FEWEST_BLOCKS = 4
# By how much two runs may differ and be alike. A phase ends with a tick of a second.
_LIKE = 0.05
_LIKE_SECONDS = 2.0


def compare(before: Result, after: Result, allowed: float) -> Verdict:
    """Whether the second run is worse by more than is allowed, and more than by chance.

    Latencies are compared only under the same load. Where each run found its own (a share of its
    knee, or the clients at it), and these differ, a note says so, and the knee remains.

    Args:
        before: the run to measure against.
        after: the run to judge.
        allowed: share by which a latency may rise or a throughput fall.

    Raises:
        LoadTestError: the runs cannot be compared.
    """
    if before.shape != after.shape:
        raise LoadTestError(
            f"The runs have different shapes, {before.shape} and {after.shape}; compare like with "
            "like."
        )
    if before.profile != after.profile:
        raise LoadTestError("The runs have different profiles; compare like with like.")
    scenarios = [{item.scenario for item in result.bins} for result in (before, after)]
    if scenarios[0] != scenarios[1]:
        raise LoadTestError("The runs have asked different scenarios; compare like with like.")
    _refuse_other_loads(before, after)
    notes = _other_loads_found(before, after)
    checks = [_wrong(before, after), _errors(before, after, allowed)]
    for scenario in ("", *sorted(scenarios[0] - {"bad-input"})) if not notes else ():
        checks += [_latency(before, after, scenario, share, allowed) for share in (0.5, 0.95, 0.99)]
    open_model = all(phase.rate is not None for phase in judged_phases(after))
    if not open_model:
        checks.append(_throughput(before, after, allowed))
    knees = knee(steps(before)), knee(steps(after))
    if knees[0] is not None and knees[1] is not None:
        floor = knees[0].throughput * (1 - allowed)
        checks.append(
            Check(
                name="throughput at the knee",
                promised=f"at least {floor:.1f}/s ({knees[0].throughput:.1f}/s before)",
                observed=f"{knees[1].throughput:.1f}/s",
                passed=knees[1].throughput >= floor,
            )
        )
    return Verdict(passed=all(check.passed for check in checks), checks=checks, notes=notes)


def _refuse_other_loads(before: Result, after: Result) -> None:
    """Refuse runs that were asked for another load or length, or that were ended early."""
    # Which steps there are is a finding: they end after the knee.
    plain = [[phase for phase in result.phases if not phase.step] for result in (before, after)]
    if [phase.name for phase in plain[0]] != [phase.name for phase in plain[1]]:
        raise LoadTestError("The runs have different phases; compare like with like.")
    if bool(steps(before)) != bool(steps(after)):
        raise LoadTestError("Only one of the runs has steps; compare like with like.")
    users = {phase.users: phase for phase in after.phases if phase.step}
    stepped = [
        (phase, users[phase.users])
        for phase in before.phases
        if phase.step and phase.users in users
    ]
    found = _found_rates(before)
    for one, other in [*zip(*plain, strict=True), *stepped]:
        pairs = [("clients", one.users, other.users, 0.0)]
        if one.name not in found:
            pairs.append(("requests a second", one.rate, other.rate, 0.0))
        pairs.append(("seconds", one.seconds, other.seconds, _LIKE_SECONDS))
        for unit, old, new, slack in pairs:
            if not _like(old, new, slack):
                raise LoadTestError(
                    f"The phase {one.name} had {_shown(old)} {unit} in one run and {_shown(new)} "
                    "in the other; compare like with like."
                )


def _found_rates(result: Result) -> set[str]:
    """Phases whose rate came from the knee of the run itself, not from `--rate`."""
    shape = result.profile.shapes.get(result.shape)
    if shape is None or not steps(result):
        return set()
    return {phase.name for phase in shape.phases if phase.knee_share is not None}


def _other_loads_found(before: Result, after: Result) -> list[str]:
    """Why latencies cannot be compared, though both runs were asked for the same."""
    phases = [judged_phases(result) for result in (before, after)]
    return [
        f"Latencies are not compared: {one.name} had {_load(one)} before and {_load(other)} after, "
        "as each run's own knee has it."
        for one, other in zip(*phases, strict=False)
        if not (_like(one.users, other.users) and _like(one.rate, other.rate))
    ]


def _like(old: float | None, new: float | None, slack: float = 0.0) -> bool:
    if old is None or new is None:
        return old is new
    return abs(new - old) <= max(slack, _LIKE * old)


def _shown(value: float | None) -> str:
    return "no" if value is None else f"{value:.3g}"


def _load(phase: PhaseRecord) -> str:
    return f"{phase.users} clients" if phase.rate is None else f"{phase.rate:.1f} requests/s"


def _wrong(before: Result, after: Result) -> Check:
    wrong = [
        sum(item.failures.get(WRONG_ANSWER, 0) for item in result.bins)
        for result in (before, after)
    ]
    return Check(
        name="wrong answers",
        promised=f"none ({wrong[0]} before)",
        observed=str(wrong[1]),
        passed=wrong[1] == 0,
    )


def _errors(before: Result, after: Result, allowed: float) -> Check:
    found = [figures(result, judged_phases(result)) for result in (before, after)]
    # One or two failures more are chance (three times the square root of what was expected).
    requests = found[1].answered + found[1].failed
    usual = (found[0].error_ratio if found[0].failed else 0.0) * requests
    most = usual * (1 + allowed) + 3 * (usual + 1) ** 0.5
    return Check(
        name="errors",
        promised=f"at most {most:.0f} of {requests} ({found[0].failed} of "
        f"{found[0].answered + found[0].failed} before)",
        observed=str(found[1].failed),
        passed=found[1].failed <= most,
    )


def _latency(before: Result, after: Result, scenario: str, share: float, allowed: float) -> Check:
    name = f"p{share * 100:.0f}" + (f" of {scenario}" if scenario else "")
    blocks = [_blocks(result, scenario) for result in (before, after)]
    points = [percentile(merged(found), share) for found in blocks]
    if points[0] is None or points[1] is None:
        missing = points[1] is None and points[0] is not None
        return Check(
            name=name, promised="an answer", observed="none in one run", passed=not missing
        )
    ratio = points[1] / points[0]
    interval = _interval(blocks[0], blocks[1], share)
    worse = ratio > 1 + allowed and (interval is None or interval[0] > 1)
    shown = "too short for an interval"
    if interval is not None:
        shown = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"
    return Check(
        name=name,
        promised=f"at most {1 + allowed:.2f} times {points[0] * 1000:.0f} ms",
        observed=f"{points[1] * 1000:.0f} ms, {ratio:.2f} times ({shown})",
        passed=not worse,
    )


def _throughput(before: Result, after: Result, allowed: float) -> Check:
    found = [figures(result, judged_phases(result)) for result in (before, after)]
    floor = found[0].throughput * (1 - allowed)
    return Check(
        name="throughput",
        promised=f"at least {floor:.1f}/s ({found[0].throughput:.1f}/s before)",
        observed=f"{found[1].throughput:.1f}/s",
        passed=found[1].throughput >= floor,
    )


def _blocks(result: Result, scenario: str) -> list[dict[int, int]]:
    """Latencies of each block of some seconds of the judged phases."""
    phases = judged_phases(result)
    found: dict[int, list[BinRecord]] = defaultdict(list)
    for item in result.bins:
        wanted = item.scenario == scenario if scenario else item.scenario != "bad-input"
        if wanted and any(phase.holds(item.second) for phase in phases):
            found[item.second // _BLOCK_SECONDS].append(item)
    return [dict(merged(item.buckets for item in items)) for items in found.values()]


def _interval(
    before: Sequence[dict[int, int]], after: Sequence[dict[int, int]], share: float
) -> tuple[float, float] | None:
    """95 % interval of the ratio of a percentile, by a block bootstrap; None with few blocks."""
    if min(len(before), len(after)) < _FEWEST_BLOCKS:
        return None
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(_ROUNDS):
        drawn = [
            percentile(
                merged(blocks[i] for i in random.integers(0, len(blocks), len(blocks))), share
            )
            for blocks in (before, after)
        ]
        if drawn[0] and drawn[1]:
            ratios.append(drawn[1] / drawn[0])
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
