"""A run from beginning to end: prepare, drive, count, judge; and its files."""

# First: Locust replaces blocking calls in the whole process.
from cxr_loadtests.drive import Crew, drive  # isort: skip

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cxr
from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.images import make_samples
from cxr_loadtests.judge import Objectives, judge, junit
from cxr_loadtests.plan import Plan, choose_scenarios
from cxr_loadtests.profile import Profile, Shape
from cxr_loadtests.reference import from_archives, from_service
from cxr_loadtests.report import render
from cxr_loadtests.results import Result
from cxr_loadtests.served import served
from cxr_loadtests.server_side import Counts, Prometheus, scrape, with_metrics, with_prometheus
from cxr_loadtests.target import Target


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run is asked to do.

    Attributes:
        target: the service; None to serve `archives[0]` here.
        profile: what is asked.
        shape_name: of `shape`.
        shape: how much.
        objectives: what must be kept.
        scenarios: only these; empty for all of the profile.
        archives: whose answers are right; empty to ask the service first.
        images: folder of images to send; None for phantoms.
        metrics: URL of the one server's `/metrics`.
        prometheus: to be asked instead of that.
        workers: processes that send the requests; 0 for this one.
        port: on which they come.
        out: folder for the results.
    """

    target: Target | None
    profile: Profile
    shape_name: str
    shape: Shape
    objectives: Objectives
    scenarios: Sequence[str]
    archives: Sequence[Path]
    images: Path | None
    metrics: str | None
    prometheus: Prometheus | None
    workers: int
    port: int
    out: Path


def execute(job: Job, say: Callable[[str], None]) -> Result:
    """Run, and judge.

    Raises:
        LoadTestError: there was no run that could be judged. What there is of it is in
            `result.json`.
    """
    with ExitStack() as stack:
        if job.target is None:
            server = stack.enter_context(served(job.archives[0]))
            target = Target(rest=server.rest, grpc=server.grpc)
            job = replace(job, target=target, metrics=server.metrics)
        result = _measured(job, say)
    try:
        verdict = judge(result, job.objectives)
    except LoadTestError:
        result.save(job.out)
        raise
    return result.model_copy(update={"verdict": verdict})


def write(result: Result, folder: Path) -> None:
    """Write `result.json`, `verdict.json`, `junit.xml` and `report.html` of a judged run.

    Raises:
        OSError: the folder cannot be written.
    """
    verdict = result.verdict
    assert verdict is not None  # noqa: S101 - `execute` has judged
    result.save(folder)
    (folder / "verdict.json").write_text(verdict.model_dump_json(indent=1), encoding="utf-8")
    (folder / "junit.xml").write_text(junit(verdict, result.shape), encoding="utf-8")
    (folder / "report.html").write_text(render(result), encoding="utf-8")


def _measured(job: Job, say: Callable[[str], None]) -> Result:
    target, profile = job.target, job.profile
    assert target is not None  # noqa: S101 - `execute` has made one
    samples = make_samples(profile.images, job.images, profile.seed)
    # Workers that come now hear so if there is nothing for them to do.
    with Crew(job.workers, job.port) as crew:
        if job.archives:
            reference = from_archives(job.archives, samples)
        else:
            reference = from_service(target, profile.timeout_seconds, samples)
        scenarios, left_out = choose_scenarios(profile, job.scenarios, target, reference)
        for sentence in left_out:
            say(sentence)
        workers = max(1, crew.workers)
        plan = Plan(target, profile, samples, reference.expectations, scenarios, workers)
        before = scrape(job.metrics) if job.metrics else Counts()
        if job.prometheus is not None:
            # The requests for the reference do not count.
            job.prometheus.wait_for_scrape()
        started = time.time()
        driven = drive(plan, job.shape, crew, say)
    result = Result(
        tool=cxr.__version__,
        shape=job.shape_name,
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        target=target.described(),
        reference=reference.source,
        versions=sorted(reference.expectations),
        left_out=left_out,
        profile=profile,
        phases=driven.phases,
        bins=driven.bins,
        codes=driven.codes,
        generator=driven.generator,
    )
    if job.prometheus is not None:
        return with_prometheus(result, job.prometheus, started)
    return with_metrics(result, job.metrics, before) if job.metrics else result
