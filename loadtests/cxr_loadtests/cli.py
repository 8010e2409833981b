"""`cxr loadtest`: run a load test, judge it, and compare two."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cxr_loadtests.errors import LoadTestError

if TYPE_CHECKING:
    from cxr_loadtests.results import Result, Verdict

_PORT = 5557
_EXISTING = click.Path(exists=True, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(context_settings={"auto_envvar_prefix": "CXR_LOADTEST"})
def loadtest() -> None:
    """Load tests of a running service, judged by objectives.

    Each option can be given as an environment variable: --images of `run` as
    CXR_LOADTEST_RUN_IMAGES.
    """


@loadtest.command(context_settings={"show_default": True})
@click.option("--host", help="URL of the service's REST endpoint, or of the gateway.")
@click.option(
    "--serve",
    "archive_to_serve",
    type=_FILE,
    metavar="ARCHIVE",
    help="Instead of --host: serve this archive here for the run.",
)
@click.option("--grpc", help="HOST:PORT of gRPC; grpcs://HOST:PORT with TLS.")
@click.option("--host-header", help="Host name to send over REST, where it is not the URL's.")
@click.option("--authority", help="Host name to send over gRPC, where it is not the address's.")
@click.option(
    "--header", "headers", multiple=True, metavar="NAME=VALUE", help="Sent with every request."
)
@click.option("--model", default="cxr", help="Name of the model.")
@click.option("--shape", default="smoke", help="A shape of the profile.")
@click.option("--profile", type=_FILE, help="Images, scenarios, think times and shapes.")
@click.option("--objectives", type=_FILE, help="What must be kept.")
@click.option(
    "--scenario", "scenarios", multiple=True, help="Only this scenario; can be given repeatedly."
)
@click.option(
    "--archive",
    "archives",
    multiple=True,
    type=_FILE,
    help="Whose answers are right, one a model version. Without it, the service is asked by one "
    "client first.",
)
@click.option("--images", type=_EXISTING, help="Folder of images to send; phantoms without it.")
@click.option("--users", type=click.IntRange(1), help="Clients, instead of the shape's.")
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Requests/s, instead of the shape's."
)
@click.option(
    "--seconds", type=click.FloatRange(1), help="Of each judged phase, instead of the shape's."
)
@click.option("--metrics", help="URL of the one server's /metrics, to compare counts.")
@click.option("--prometheus", help="URL of Prometheus: counts, stages, replicas, queue.")
@click.option(
    "--selector", default="", help="Labels of the service's series: 'namespace=\"imaging\"'."
)
@click.option(
    "--workers", default=0, type=click.IntRange(0), help="Wait for so many `cxr loadtest worker`."
)
@click.option("--port", default=_PORT, type=click.IntRange(1, 65535), help="On which they come.")
@click.option(
    "--out",
    default=Path("runs/loadtest"),
    type=click.Path(file_okay=False, path_type=Path),
    help="Where result.json, verdict.json, junit.xml and report.html go.",
)
@click.option("--upload", metavar="s3://BUCKET/PREFIX", help="Copy these files there, too.")
def run(
    *,
    host: str | None,
    archive_to_serve: Path | None,
    grpc: str | None,
    host_header: str | None,
    authority: str | None,
    headers: tuple[str, ...],
    model: str,
    shape: str,
    profile: Path | None,
    objectives: Path | None,
    scenarios: tuple[str, ...],
    archives: tuple[Path, ...],
    images: Path | None,
    users: int | None,
    rate: float | None,
    seconds: float | None,
    metrics: str | None,
    prometheus: str | None,
    selector: str,
    workers: int,
    port: int,
    out: Path,
    upload: str | None,
) -> None:
    """Put a load on a service, check every answer, and judge.

    \b
    cxr loadtest run --serve cxr.mar --shape ship
    cxr loadtest run --host http://127.0.0.1:8080 --grpc 127.0.0.1:8081 --archive cxr.mar
    cxr loadtest run --host https://cxr.example.org --shape arrival --rate 20

    Ctrl-C ends the run early; what there is will be judged. Exit code 0 when every objective was
    kept, 1 when one was broken, 2 when there was no run to judge, 3 when every objective was kept,
    but the results could not be written or uploaded.
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    if (host is None) == (archive_to_serve is None):
        raise click.UsageError("Name the service with --host, or an archive with --serve.")
    if archive_to_serve is not None and (grpc or metrics or prometheus or workers):
        raise click.UsageError(
            "--serve knows its own ports; leave --grpc, --metrics, --prometheus and --workers out."
        )
    if archive_to_serve is not None and archives and archives[0] != archive_to_serve:
        raise click.UsageError("With --serve, the archive's own answers are the right ones.")
    # Before anything that waits: Locust replaces blocking calls in the whole process.
    from cxr_loadtests.run import Job, execute, write  # noqa: PLC0415, I001
    from cxr_loadtests.judge import read_objectives  # noqa: PLC0415
    from cxr_loadtests.profile import read_profile, scaled  # noqa: PLC0415
    from cxr_loadtests.server_side import Prometheus  # noqa: PLC0415
    from cxr_loadtests.store import split_uri, upload as copy  # noqa: PLC0415
    from cxr_loadtests.target import Target  # noqa: PLC0415

    try:
        out.mkdir(parents=True, exist_ok=True)
        described = read_profile(profile)
        if upload:
            split_uri(upload)
        target = host and Target(
            rest=host,
            grpc=grpc,
            host_header=host_header,
            authority=authority,
            headers=_pairs(headers),
            model=model,
        )
        job = Job(
            target=target or None,
            profile=described,
            shape_name=shape,
            shape=scaled(described.shape(shape), users=users, rate=rate, seconds=seconds),
            objectives=read_objectives(objectives),
            scenarios=scenarios,
            archives=archives or ((archive_to_serve,) if archive_to_serve else ()),
            images=images,
            metrics=metrics,
            prometheus=Prometheus(prometheus, selector) if prometheus else None,
            workers=workers,
            port=port,
            out=out,
        )
        result = execute(job, click.echo)
    except LoadTestError as error:
        raise _stop(str(error)) from error
    except OSError as error:
        raise _stop(f"Cannot write to {out}: {error.strerror}.") from error
    verdict = result.verdict
    assert verdict is not None  # noqa: S101 - `execute` has judged
    # From here on there is a verdict, and what else fails must not hide it.
    lost = ""
    try:
        write(result, out)
    except OSError as error:
        lost = f"Cannot write to {out}: {error.strerror}."
    _tell(result, verdict)
    if not lost:
        click.echo(f"The report: {out / 'report.html'}")
        try:
            for uri in copy(out, upload) if upload else ():
                click.echo(uri)
        except LoadTestError as error:
            lost = str(error)
    if lost:
        click.echo(f"Error: {lost}", err=True)
    sys.exit(1 if not verdict.passed else 3 if lost else 0)


@loadtest.command(context_settings={"show_default": True})
@click.option("--master", required=True, help="Where `cxr loadtest run --workers` runs.")
@click.option("--port", default=_PORT, type=click.IntRange(1, 65535))
@click.option(
    "--wait",
    default=300.0,
    # Locust itself does not wait longer.
    type=click.FloatRange(0, 300, min_open=True),
    help="Seconds within which it must be there.",
)
def worker(*, master: str, port: int, wait: float) -> None:
    """Send requests for `cxr loadtest run --workers N` on another machine.

    It gets the profile, the images and the expected answers from there. Exit code 2 when there is
    no master, or it goes before the run is over.
    """
    from cxr_loadtests.drive import work  # noqa: PLC0415

    try:
        work(master, port, wait, click.echo)
    except LoadTestError as error:
        raise _stop(str(error)) from error


@loadtest.command(context_settings={"show_default": True})
@click.argument("before", type=_EXISTING)
@click.argument("after", type=_EXISTING)
@click.option(
    "--allowed",
    default=0.15,
    type=click.FloatRange(0),
    help="Share by which a latency may rise or a throughput fall.",
)
def compare(*, before: Path, after: Path, allowed: float) -> None:
    """Whether the run AFTER is worse than the run BEFORE; both are folders of `run`.

    A latency is worse where it is longer by more than is allowed and the 95 % interval of the ratio
    does not hold 1. Runs with other clients, rates or lengths are refused; where each has found its
    own knee, and so its own load, latencies are left out. Exit code 0 when nothing is worse, 1 when
    something is, 2 when the runs cannot be compared.
    """
    from cxr_loadtests.compare import compare as judged  # noqa: PLC0415
    from cxr_loadtests.results import load_result  # noqa: PLC0415

    try:
        verdict = judged(load_result(before), load_result(after), allowed)
    except LoadTestError as error:
        raise _stop(str(error)) from error
    _checks(verdict)
    for note in verdict.notes:
        click.echo(note)
    kept = "No regression in what was compared." if verdict.notes else "No regression."
    click.echo(kept if verdict.passed else "Worse than before.")
    sys.exit(0 if verdict.passed else 1)


def _pairs(headers: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for header in headers:
        name, equals, value = header.partition("=")
        if not name or not equals:
            raise LoadTestError("--header is NAME=VALUE.")
        found[name] = value
    return found


class _NoVerdictError(click.ClickException):
    """There is no verdict: not the exit code of a broken objective."""

    exit_code = 2


def _stop(sentence: str) -> click.ClickException:
    return _NoVerdictError(sentence)


def _tell(result: "Result", verdict: "Verdict") -> None:
    from tabulate import tabulate  # noqa: PLC0415

    from cxr_loadtests.report import summary  # noqa: PLC0415

    headers = ["scenario", "protocol", "as expected", "failed", "/s", "p50 ms", "p95 ms", "p99 ms"]
    click.echo()
    click.echo(tabulate(summary(result), headers=headers, disable_numparse=True))
    click.echo()
    _checks(verdict)
    if result.generator.note:
        click.echo(result.generator.note)
    click.echo("Passed." if verdict.passed else "Failed.")


def _checks(verdict: "Verdict") -> None:
    from tabulate import tabulate  # noqa: PLC0415

    rows = [
        ["kept" if check.passed else "BROKEN", check.name, check.promised, check.observed]
        for check in verdict.checks
    ]
    click.echo(tabulate(rows, headers=["", "what", "promised", "observed"], disable_numparse=True))
