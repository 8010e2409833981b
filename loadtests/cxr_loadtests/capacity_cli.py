"""`cxr capacity`: replicas and cost for a load, from a step test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cxr_loadtests.errors import LoadTestError

_EXISTING = click.Path(exists=True, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_step_test = click.argument("step_test", type=_EXISTING)
_replicas = click.option(
    "--measured-replicas",
    default=1,
    type=click.IntRange(1),
    help="Replicas that the step test was made with.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def capacity() -> None:
    """Plan replicas and cost from a step test of `cxr loadtest`."""


@capacity.command(context_settings={"show_default": True})
@_step_test
@click.option("--rate", required=True, type=click.FloatRange(0, min_open=True), help="Requests/s.")
@click.option(
    "--p95", default=1.0, type=click.FloatRange(0, min_open=True), help="Seconds, at most."
)
@click.option(
    "--headroom",
    default=0.3,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the capacity that stays free.",
)
@click.option("--price", default=0.0, type=click.FloatRange(0), help="Of a replica-hour.")
@_replicas
@_json
def plan(
    *,
    step_test: Path,
    rate: float,
    p95: float,
    headroom: float,
    price: float,
    measured_replicas: int,
    as_json: bool,
) -> None:
    """Replicas for a constant rate. STEP_TEST is a folder of `cxr loadtest run --shape step`."""

    def work() -> dict[str, Any]:
        from cxr_loadtests.capacity import measured_service, replicas_for  # noqa: PLC0415
        from cxr_loadtests.results import load_result  # noqa: PLC0415

        service = measured_service(load_result(step_test), measured_replicas)
        count, expected = replicas_for(rate, service, p95=p95, headroom=headroom)
        return {
            "rate": rate,
            "replicas": count,
            "p95_seconds": expected,
            "throughput_per_replica": service.throughput,
            "parallel_per_replica": service.parallel,
            "cost_per_hour": count * price,
        }

    _print(work, as_json)


@capacity.command(context_settings={"show_default": True})
@_step_test
@click.option(
    "--case",
    type=_FILE,
    help="Load and scaling. Without it: a day of up to 1,000 replicas, with spikes.",
)
@click.option("--exact", is_flag=True, help="Each request is an event: small cases only.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Of clocks, gaps and times.")
@click.option(
    "--runs",
    default=1,
    type=click.IntRange(1),
    help="With so many seeds: means, and how far p95 varies.",
)
@click.option(
    "--series",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write each second (of the first run), CSV.",
)
@_replicas
@_json
def simulate(
    *,
    step_test: Path,
    case: Path | None,
    exact: bool,
    seed: int,
    runs: int,
    series: Path | None,
    measured_replicas: int,
    as_json: bool,
) -> None:
    """What autoscaling would do with a load: replicas, latency, refusals, cost.

    STEP_TEST is a folder of `cxr loadtest run --shape step`.
    """

    def work() -> dict[str, Any]:
        from cxr_loadtests.capacity import (  # noqa: PLC0415
            described,
            measured_service,
            read_case,
            summarised,
        )
        from cxr_loadtests.results import load_result  # noqa: PLC0415
        from cxr_loadtests.simulation import simulate as run  # noqa: PLC0415

        wanted = read_case(case)
        service = measured_service(load_result(step_test), measured_replicas)
        outcomes = [
            run(wanted.rate(), service, wanted.scaling, wanted.seconds, exact=exact, seed=number)
            for number in range(seed, seed + runs)
        ]
        if series is not None:
            outcome = outcomes[0]
            rows = zip(outcome.times, outcome.rates, outcome.ready, outcome.asked, strict=True)
            lines = ["second,rate,ready,asked"]
            lines += [f"{at:.0f},{rate:.3f},{ready},{asked}" for at, rate, ready, asked in rows]
            series.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return summarised([described(outcome, wanted.price) for outcome in outcomes])

    _print(work, as_json)


def _print(work: Callable[[], dict[str, Any]], as_json: bool) -> None:
    try:
        found = work()
    except LoadTestError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(found))
        return
    from tabulate import tabulate  # noqa: PLC0415

    rows = [
        (name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
        for name, value in found.items()
    ]
    click.echo(tabulate(rows, tablefmt="plain", disable_numparse=True))
