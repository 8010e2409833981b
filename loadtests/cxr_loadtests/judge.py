"""Whether a run has kept its objectives."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean
from typing import Annotated, Literal, Self
from xml.etree import ElementTree as ET

from pydantic import Field, model_validator

from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.profile import Positive, Strict, read_yaml
from cxr_loadtests.results import (
    BinRecord,
    Check,
    Figures,
    Result,
    Verdict,
    figures,
    judged_phases,
)
from cxr_loadtests.scenarios import WRONG_ANSWER


class Objective(Strict):
    """One line of an objectives file; it may promise several things.

    Attributes:
        scenario: which scenarios, with `*` and `?`. Bad input counts for `error_ratio` only, where
            it is not named.
        protocol: which protocols (`v1`, `v2`, `grpc`), the same.
        by: one check for all of these together, or one for each scenario or protocol.
        shape: runs of which shapes, the same.
        p95_seconds: of the answers that are as expected.
        error_ratio: highest share of requests that are not answered as expected; broken without
            any.
        min_throughput: answers as expected that come, a second.
        memory_growth: share by which the mean memory of the largest replica may be more in the last
            third of a judged phase than in the first; looked at where Prometheus was asked, and
            broken where that does not know.
    """

    name: str
    scenario: str = "*"
    protocol: str = "*"
    by: Literal["all", "scenario", "protocol"] = "all"
    shape: str = "*"
    p95_seconds: Positive | None = None
    p99_seconds: Positive | None = None
    error_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    min_throughput: Positive | None = None
    memory_growth: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _promises_something(self) -> Self:
        promises = (
            self.p95_seconds,
            self.p99_seconds,
            self.error_ratio,
            self.min_throughput,
            self.memory_growth,
        )
        if all(promise is None for promise in promises):
            raise ValueError(
                "an objective needs p95_seconds, p99_seconds, error_ratio, min_throughput or "
                "memory_growth"
            )
        return self


class Objectives(Strict):
    """An objectives file."""

    objectives: Annotated[list[Objective], Field(min_length=1)]


def read_objectives(path: Path | None) -> Objectives:
    """An objectives file; without one, the default objectives.

    Raises:
        LoadTestError: it cannot be read, or something in it is not valid.
    """
    return read_yaml(path, "objectives.yaml", Objectives)


def judge(result: Result, objectives: Objectives) -> Verdict:
    """Check a run against objectives, and against what every run must keep.

    Raises:
        LoadTestError: an objective is about nothing that this run has asked.
    """
    checks = [*_always(result)]
    for objective in objectives.objectives:
        if fnmatchcase(result.shape, objective.shape):
            checks += _checks(result, objective)
            checks += _memory(result, objective)
    return Verdict(passed=all(check.passed for check in checks), checks=checks)


def _always(result: Result) -> Iterator[Check]:
    """Answers are right, the counts agree, and nothing is missing."""
    wrong = sum(item.failures.get(WRONG_ANSWER, 0) for item in result.bins)
    asked = sum(record.count for record in result.codes)
    yield Check(
        name="answers are the expected ones",
        promised="no wrong label or probability",
        observed=f"{wrong} wrong of {asked}",
        passed=wrong == 0 and asked > 0,
    )
    counts = result.reconciliation
    if counts is None and result.unknown:
        yield Check(
            name="clients and servers count the same",
            promised="the servers' counts",
            observed=f"not known: {result.unknown}",
            passed=False,
        )
    elif result.unknown:
        yield Check(
            name="the servers' figures over time",
            promised="stages, replicas, queue and memory",
            observed=f"not known: {result.unknown}",
            passed=False,
        )
    if counts is not None:
        # A request without an answer may or may not have been counted.
        open_ended = counts.sent - counts.answered
        yield Check(
            name="clients and servers count the same",
            promised=f"{counts.answered} to {counts.answered + open_ended} requests",
            observed=f"{counts.counted} in {counts.source}",
            passed=0 <= counts.counted - counts.answered <= open_ended,
        )
    generator = result.generator
    if generator.workers:
        yield Check(
            name="the load generator is whole",
            promised="no worker lost, no request without an outcome",
            observed=f"{generator.lost} workers lost, {generator.unfinished} requests unfinished",
            passed=not generator.lost and not generator.unfinished,
        )


def _checks(result: Result, objective: Objective) -> Iterator[Check]:
    matching = {
        (item.scenario, item.protocol)
        for item in result.bins
        if fnmatchcase(item.scenario, objective.scenario)
        and fnmatchcase(item.protocol, objective.protocol)
    }
    if not matching:
        if objective.scenario == objective.protocol == "*":
            raise LoadTestError("The run has no requests in it to judge.")
        raise LoadTestError(
            f"The objective {objective.name} is about nothing that this run has asked."
        )

    def key(pair: tuple[str, str]) -> str:
        return {"all": "", "scenario": pair[0], "protocol": pair[1]}[objective.by]

    phases = judged_phases(result)
    for group in sorted({key(pair) for pair in matching}):
        members = {pair for pair in matching if key(pair) == group}

        def wanted(item: BinRecord, members: set[tuple[str, str]] = members) -> bool:
            return (item.scenario, item.protocol) in members

        def good(item: BinRecord, members: set[tuple[str, str]] = members) -> bool:
            named = objective.scenario == "bad-input"
            return wanted(item, members) and (named or item.scenario != "bad-input")

        name = f"{objective.name} ({group})" if group else objective.name
        yield from _promises(
            objective, name, figures(result, phases, wanted), figures(result, phases, good)
        )


def _promises(objective: Objective, name: str, every: Figures, good: Figures) -> Iterator[Check]:
    asked = every.answered + every.failed
    if objective.error_ratio is not None:
        # No request is no success: clients may still wait for answers from an earlier phase.
        worst = ", ".join(f"{count} x {kind}" for kind, count in every.failures.most_common(3))
        yield Check(
            name=f"{name}: errors",
            promised=f"at most {objective.error_ratio:.2%}",
            observed=f"{every.error_ratio:.2%} of {asked}" + (f" ({worst})" if worst else "")
            if asked
            else "no request",
            passed=every.error_ratio <= objective.error_ratio,
        )
    if not good.answered + good.failed and asked:
        return  # a group of bad input alone has no latency to promise
    for share, promised in ((0.95, objective.p95_seconds), (0.99, objective.p99_seconds)):
        if promised is not None:
            observed = good.percentile(share)
            yield Check(
                name=f"{name}: p{share * 100:.0f}",
                promised=f"at most {promised * 1000:.0f} ms",
                observed="no answer" if observed is None else f"{observed * 1000:.0f} ms",
                passed=observed is not None and observed <= promised,
            )
    if objective.min_throughput is not None:
        yield Check(
            name=f"{name}: throughput",
            promised=f"at least {objective.min_throughput:g}/s",
            observed=f"{good.throughput:.1f}/s",
            passed=good.throughput >= objective.min_throughput,
        )


def _memory(result: Result, objective: Objective) -> Iterator[Check]:
    if objective.memory_growth is None:
        return
    for phase in judged_phases(result):
        start, third = phase.start + phase.settle, phase.seconds / 3
        seen = False
        for series in result.server:
            if series.group != "memory":
                continue
            points = list(zip(series.times, series.values, strict=True))
            first = [value for at, value in points if start <= at < start + third]
            last = [value for at, value in points if phase.end - third <= at <= phase.end]
            if not first or not last:
                continue
            seen = True
            growth = mean(last) / mean(first) - 1
            yield Check(
                name=f"{objective.name}: memory",
                promised=f"at most {objective.memory_growth:+.1%}",
                observed=f"{growth:+.1%} ({mean(first):.0f} to {mean(last):.0f} {series.unit})",
                passed=growth <= objective.memory_growth,
            )
        if result.prometheus and not seen:
            yield Check(
                name=f"{objective.name}: memory",
                promised=f"at most {objective.memory_growth:+.1%}",
                observed="not known: Prometheus has no memory of the service at the beginning and "
                f"the end of {phase.name}",
                passed=False,
            )


def junit(verdict: Verdict, shape: str) -> str:
    """The verdict as JUnit XML: one test case a check."""
    failed = [check for check in verdict.checks if not check.passed]
    suite = ET.Element(
        "testsuite",
        name=f"cxr loadtest {shape}",
        tests=str(len(verdict.checks)),
        failures=str(len(failed)),
        errors="0",
        skipped="0",
    )
    for check in verdict.checks:
        case = ET.SubElement(suite, "testcase", classname=f"loadtest.{shape}", name=check.name)
        said = f"promised {check.promised}, observed {check.observed}"
        if check.passed:
            ET.SubElement(case, "system-out").text = said
        else:
            ET.SubElement(case, "failure", message=said)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)
