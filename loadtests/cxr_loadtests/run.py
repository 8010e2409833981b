"""A run from beginning to end: prepare, drive, count, judge, write."""

# First: Locust replaces blocking calls in the whole process.
from cxr_loadtests.drive import Crew, Driven, drive  # isort: skip

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cxr
from cxr_loadtests.images import make_samples
from cxr_loadtests.judge import Objectives, judge, junit
from cxr_loadtests.plan import Plan, choose_scenarios
from cxr_loadtests.profile import Profile, Shape
from cxr_loadtests.reference import from_archives, from_service
from cxr_loadtests.report import render
from cxr_loadtests.results import Result
from cxr_loadtests.served import served
from cxr_loadtests.server_side import Counts, Prometheus, reconcile, scrape, settled_counts
from cxr_loadtests.store import upload
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
        upload_to: `s3://` URI for the same, or None.
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
    upload_to: str | None


def execute(job: Job, say: Callable[[str], None]) -> Result:
    """Run, judge, and write `result.json`, `verdict.json`, `junit.xml` and `report.html`.

    Raises:
        LoadTestError: there was no run that could be judged.
    """
    with ExitStack() as stack:
        if job.target is None:
            server = stack.enter_context(served(job.archives[0]))
            target = Target(rest=server.rest, grpc=server.grpc)
            job = replace(job, target=target, metrics=server.metrics)
        result = _measured(job, say)
    verdict = judge(result, job.objectives)
    result = result.model_copy(update={"verdict": verdict})
    result.save(job.out)
    (job.out / "verdict.json").write_text(verdict.model_dump_json(indent=1), encoding="utf-8")
    (job.out / "junit.xml").write_text(junit(verdict, job.shape_name), encoding="utf-8")
    (job.out / "report.html").write_text(render(result), encoding="utf-8")
    if job.upload_to:
        for uri in upload(job.out, job.upload_to):
            say(uri)
    return result


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
    return result.model_copy(update=_server_side(job, driven, before, started))


def _server_side(job: Job, driven: Driven, before: Counts, started: float) -> dict[str, object]:
    """What the servers say of the run."""
    if job.prometheus is not None:
        answered = sum(code.count for code in driven.codes if code.from_server)
        counts = settled_counts(job.prometheus, started, answered)
        return {
            "reconciliation": reconcile(driven.codes, counts, "Prometheus"),
            "server": job.prometheus.series(started, driven.phases[-1].end),
        }
    if job.metrics:
        counts = scrape(job.metrics) - before
        return {"reconciliation": reconcile(driven.codes, counts, "the server's metrics")}
    return {}
