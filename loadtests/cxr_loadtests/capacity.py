"""How many replicas a load needs, and what they cost."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.histogram import seconds_of
from cxr_loadtests.profile import Positive, Strict, read_yaml
from cxr_loadtests.results import Result, figures, knee, steps
from cxr_loadtests.simulation import (
    Outcome,
    Rate,
    Scaling,
    Service,
    interpolated,
    simulate,
)

_DAY = 86_400.0
_HOUR = 3600.0
# Requests of the profile, beside those that must be refused.
_SAMPLE = 2000
# Of a fleet that does not change, long enough for a steady queue.
_STEADY_SECONDS = 900.0
_LARGEST = 100_000


class Day(Strict):
    """A rate that rises and falls once a day, as work in hospitals does.

    Attributes:
        low: requests a second at its lowest, twelve hours from the peak.
        peak: requests a second at its highest.
        peak_hour: of the day, 0 to 24.
    """

    low: Annotated[float, Field(ge=0)]
    peak: Positive
    peak_hour: Annotated[float, Field(ge=0, lt=24)] = 11.0


class Spike(Strict):
    """More for a while.

    Attributes:
        at: seconds since the start.
        seconds: how long.
        factor: times the rate.
    """

    at: Annotated[float, Field(ge=0)]
    seconds: Positive
    factor: Positive


class Case(Strict):
    """A file for `cxr capacity simulate`.

    Attributes:
        seconds: length.
        points: seconds and requests a second, straight lines between them; or
        day: a daily curve.
        spikes: on top of either.
        price: of a replica-hour.
    """

    seconds: Positive = _DAY
    points: list[tuple[float, float]] | None = None
    day: Day | None = None
    spikes: list[Spike] = Field(default_factory=list)
    scaling: Scaling
    price: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _one_curve(self) -> Self:
        if (self.points is None) == (self.day is None):
            raise ValueError("a case has points or a day")
        if self.scaling.min > self.scaling.max:
            raise ValueError("scaling.min must not be more than scaling.max")
        return self

    def rate(self) -> Rate:
        """Requests a second, by seconds since the start."""
        if self.points is not None:
            curve = interpolated(self.points)
        else:
            day = self.day
            assert day is not None  # noqa: S101 - one of the two is there

            def curve(now: float) -> float:
                angle = 2 * math.pi * (now / _HOUR - day.peak_hour) / 24
                return day.low + (day.peak - day.low) * (1 + math.cos(angle)) / 2

        def with_spikes(now: float) -> float:
            factor = 1.0
            for spike in self.spikes:
                if spike.at <= now < spike.at + spike.seconds:
                    factor *= spike.factor
            return curve(now) * factor

        return with_spikes


def read_case(path: Path | None) -> Case:
    """A case file; without one, a day of a thousand replicas.

    Raises:
        LoadTestError: it cannot be read, or something in it is not valid.
    """
    return read_yaml(path, "case.yaml", Case)


def measured_service(result: Result, replicas: int) -> Service:
    """One replica, from a step test.

    Args:
        result: with a step of one client, whose latency is what requests take by themselves, and
            steps up to the knee, whose throughput says how many a replica works on at once.
        replicas: that were there during the test.

    Raises:
        LoadTestError: the run has no such steps.
    """
    found = steps(result)
    at = knee(found)
    single = [phase for phase in result.phases if phase.step and phase.users == 1]
    if at is None or not single or len(found) < 2:  # noqa: PLR2004
        raise LoadTestError(
            "The run has no step test to plan by: make one with `cxr loadtest run --shape step`."
        )
    alone = figures(result, single, lambda item: item.scenario != "bad-input").buckets
    values = np.repeat(
        [seconds_of(number) for number in sorted(alone)],
        [alone[number] for number in sorted(alone)],
    )
    rng = np.random.default_rng(0)
    seconds = rng.choice(values, _SAMPLE) if len(values) > _SAMPLE else values
    highest = max(step.throughput for step in found) / replicas
    mean = float(values.mean())
    parallel = max(1, round(highest * mean))
    slowdown = []
    for busy in range(1, parallel + 1):
        # Clients are dealt out evenly; between steps, straight lines.
        throughput = float(
            np.interp(
                busy * replicas,
                [step.users for step in found],
                [step.throughput for step in found],
            )
        )
        slowdown.append(max(1.0, busy * replicas / throughput / mean) if throughput else 1.0)
    # More answers than latencies allow: not all of a request's time is spent at the replica.
    last = parallel / (highest * mean)
    slowdown[-1] = max(1.0, last)
    return Service(np.asarray(seconds), parallel, tuple(slowdown), held=min(1.0, last))


def replicas_for(
    rate: float, service: Service, *, p95: float, headroom: float
) -> tuple[int, float]:
    """The fewest replicas for a constant rate, and the p95 that they have.

    Args:
        rate: requests a second.
        service: one replica.
        p95: seconds that may not be exceeded.
        headroom: share of the capacity that stays free.

    Raises:
        LoadTestError: no number of replicas is fast enough.
    """
    count = max(1, math.ceil(rate / (service.throughput * (1 - headroom))))
    while count <= _LARGEST:
        still = Scaling(metric="none", min=count, max=count)
        outcome = simulate(lambda now: rate, service, still, _STEADY_SECONDS)  # noqa: ARG005
        found = outcome.percentile(0.95)
        if found <= p95:
            return count, found
        alone = float(np.quantile(service.seconds, 0.95))
        if alone > p95:
            raise LoadTestError(
                f"Even an idle replica has a p95 of {alone * 1000:.0f} ms; more replicas do not "
                "make a request faster."
            )
        count += max(1, count // 20)
    raise LoadTestError("No number of replicas keeps that p95.")


def described(outcome: Outcome, price: float) -> dict[str, Any]:
    """The figures of a simulation as plain data."""
    asked = float(np.sum(outcome.rates))
    return {
        "requests": round(asked),
        "refused": round(outcome.refused),
        "p50_seconds": outcome.percentile(0.50),
        "p95_seconds": outcome.percentile(0.95),
        "p99_seconds": outcome.percentile(0.99),
        "replicas_mean": outcome.mean_ready,
        "replicas_max": max(outcome.ready),
        "replica_hours": outcome.replica_hours,
        "cost": outcome.replica_hours * price,
    }


def summarised(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several runs of the same case: means, the most replicas, and how far p95 varies.

    Args:
        runs: figures of each, as `described`.
    """
    if len(runs) == 1:
        return runs[0]
    means: dict[str, Any] = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    p95s = [run["p95_seconds"] for run in runs]
    return means | {
        "replicas_max": max(run["replicas_max"] for run in runs),
        "p95_lowest": min(p95s),
        "p95_highest": max(p95s),
    }
