"""Writes files/dashboards/*.json, the chart's Grafana dashboards.

.venv/bin/python charts/cxr-serve/ci/dashboards.py

Words in capitals between two underscores are values, which the chart puts in their place
(templates/monitoring/dashboards.yaml).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

FOLDER = Path(__file__).parents[1] / "files" / "dashboards"
TAG = "cxr-serve"

# Series of the chosen service; with `VERSION` joined, of the chosen version alone.
S = 'namespace="$namespace", service=~"$service"'
# Of its portal, which the chart names so.
P = 'namespace="$namespace", service=~"${service}-portal"'
METHODS = 'method=~"__METHODS__"'
FAILED = 'code=~"__FAILURES__"'
VERSION = f'* on (namespace, pod) group_left (version) cxr_model_info{{{S}, version=~"$version"}}'
RATE = "[$__rate_interval]"

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True)
class Value:
    """A number that the chart has."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        description: what it means, and when to worry.
        queries: PromQL, and the legend of each.
        unit: Grafana's name of the unit.
        single: one number instead of lines.
        steps: from which value which colour begins; the first one's value is not read.
        most: end of the axis, where there is one.
        events_only: there is data only after something has gone wrong.
        nothing: what to show without data.
    """

    title: str
    description: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    single: bool = False
    steps: Sequence[tuple[float | Value | None, str]] = ((None, GREEN),)
    most: float | None = None
    events_only: bool = False
    nothing: str = "no data: is the service scraped?"


@dataclass(frozen=True, kw_only=True)
class Board:
    """One dashboard.

    Attributes:
        name: of its file, and its address in Grafana.
        title: what Grafana calls it.
        description: for whom it is.
        rows: title and panels of each row.
    """

    name: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]


def rate(metric: str, by: str, *labels: str, series: str = S) -> str:
    """Events per second, by these labels."""
    return f"sum by ({by}) (rate({metric}{{{', '.join((series, *labels))}}}{RATE}))"


def by_version(metric: str, *labels: str) -> str:
    """Events per second, by model version."""
    return f"sum by (version) (rate({metric}{{{', '.join((S, *labels))}}}{RATE}) {VERSION})"


def quantile(part: float, metric: str, by: str = "", *labels: str, series: str = S) -> str:
    """A quantile of a histogram, estimated from its buckets."""
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({part}, {rate(f'{metric}_bucket', groups, *labels, series=series)})"


def budget_left(failed: str, objective: str) -> str:
    """Part of the error budget of the period that is left."""
    return (
        f"1 - sum(cxr:{failed}:increase__PERIOD__{{{S}}})"
        f" / (sum(cxr:requests:increase__PERIOD__{{{S}}}) * (1 - {objective}))"
    )


READY = Panel(
    title="Ready replicas",
    description="Pods that answer. 0: every request fails; see __RUNBOOKS__/CXRNoReadyReplica.md",
    queries=[(f"sum(cxr_ready{{{S}}})", "ready")],
    single=True,
    steps=[(None, RED), (1, GREEN)],
)
REQUESTS = Panel(
    title="Requests by answer",
    description="Per second, for predictions and explanations. 4xx: the client's fault; 5xx: ours.",
    queries=[(rate("cxr_requests_total", "protocol, code", METHODS), "{{protocol}} {{code}}")],
    unit="reqps",
)
FAILURES = Panel(
    title="Failed requests",
    description="Part that failed because of the service; see "
    "__RUNBOOKS__/CXRAvailabilityBudgetBurn.md",
    queries=[
        (
            f"sum(rate(cxr_requests_total{{{S}, {METHODS}, {FAILED}}}{RATE}))"
            f" / sum(rate(cxr_requests_total{{{S}, {METHODS}}}{RATE}))",
            "failed",
        )
    ],
    unit="percentunit",
    steps=[(None, GREEN), (Value("UNAVAILABILITY"), RED)],
)
LATENCY = Panel(
    title="Time to answer",
    description="From the first byte of the request to the answer; see "
    "__RUNBOOKS__/CXRLatencyBudgetBurn.md",
    queries=[
        (quantile(part, "cxr_request_duration_seconds"), f"p{round(100 * part)}")
        for part in (0.5, 0.95, 0.99)
    ],
    unit="s",
)
QUEUE = Panel(
    title="Images that wait",
    description="By pod. They grow where more comes than is answered; see "
    "__RUNBOOKS__/CXRQueueSaturated.md",
    queries=[(f"sum by (pod) (cxr_images_queued{{{S}}})", "{{pod}}")],
)
IN_FLIGHT = Panel(
    title="Requests in flight",
    description="Being answered now, by pod. KEDA adds replicas by it.",
    queries=[(f"sum by (pod) (cxr_requests_in_flight{{{S}}})", "{{pod}}")],
)
WORKERS = Panel(
    title="Workers with the model loaded",
    description="By pod; as many as cores, unless values say otherwise.",
    queries=[(f"sum by (pod) (cxr_workers_ready{{{S}}})", "{{pod}}")],
)
RESTARTS = Panel(
    title="Worker restarts",
    description="In the last 15 minutes, by pod; see __RUNBOOKS__/CXRWorkerRestarts.md",
    queries=[(f"sum by (pod) (increase(cxr_worker_restarts_total{{{S}}}[15m]))", "{{pod}}")],
    steps=[(None, GREEN), (1, YELLOW), (Value("RESTARTS"), RED)],
)

BOARDS = [
    Board(
        name="cxr-overview",
        title="CXR / Service overview",
        description="Is the service well, and how much of its error budget is left?",
        rows=[
            (
                "Objectives",
                [
                    READY,
                    Panel(
                        title="Availability budget left",
                        description="Of __PERIOD__, at an objective of __AVAILABILITY__.",
                        queries=[(budget_left("requests_failed", "__AVAILABILITY__"), "left")],
                        unit="percentunit",
                        single=True,
                        steps=[(None, RED), (0.01, YELLOW), (0.5, GREEN)],
                    ),
                    Panel(
                        title="Latency budget left",
                        description="Of __PERIOD__: __LATENCY__ within __LATENCY_SECONDS__ s.",
                        queries=[(budget_left("requests_slow", "__LATENCY__"), "left")],
                        unit="percentunit",
                        single=True,
                        steps=[(None, RED), (0.01, YELLOW), (0.5, GREEN)],
                    ),
                    Panel(
                        title="Alerts",
                        description="Pending and firing; each has a runbook in __RUNBOOKS__.",
                        queries=[
                            (
                                'sum by (alertname) (ALERTS{namespace="$namespace", '
                                'alertname=~"CXR.*", alertstate="firing"})',
                                "{{alertname}}",
                            )
                        ],
                        single=True,
                        steps=[(None, GREEN), (1, RED)],
                        events_only=True,
                        nothing="none",
                    ),
                ],
            ),
            ("Requests", [REQUESTS, FAILURES, LATENCY]),
            ("Load", [IN_FLIGHT, QUEUE]),
        ],
    ),
    Board(
        name="cxr-inference",
        title="CXR / Inference",
        description="Where the time goes, and how the workers are.",
        rows=[
            (
                "Time",
                [
                    LATENCY,
                    Panel(
                        title="Mean time of each step",
                        description="Of an image: queue is waiting for a worker, and the way to it "
                        "and back; the others are the worker's own.",
                        queries=[
                            (
                                f"{rate('cxr_stage_duration_seconds_sum', 'stage')}"
                                f" / {rate('cxr_stage_duration_seconds_count', 'stage')}",
                                "{{stage}}",
                            )
                        ],
                        unit="s",
                    ),
                    Panel(
                        title="Images answered together",
                        description="Mean batch that an image was in: 1 on a CPU; more where the "
                        "archive asks for batches on a GPU, and load fills them.",
                        queries=[
                            (
                                f"{rate('cxr_batch_images_sum', 'service')}"
                                f" / {rate('cxr_batch_images_count', 'service')}",
                                "{{service}}",
                            )
                        ],
                    ),
                    Panel(
                        title="Time to answer by protocol (p95)",
                        description="Slow over REST only: slow clients, whose bodies count.",
                        queries=[
                            (
                                quantile(0.95, "cxr_request_duration_seconds", "protocol"),
                                "{{protocol}}",
                            )
                        ],
                        unit="s",
                    ),
                    Panel(
                        title="Images per request",
                        description="Average batch that clients send.",
                        queries=[
                            (
                                f"sum(rate(cxr_images_total{{{S}}}{RATE}))"
                                f" / sum(rate(cxr_requests_total{{{S}, {METHODS}}}{RATE}))",
                                "images",
                            )
                        ],
                    ),
                    Panel(
                        title="Received images",
                        description="Bytes per second, as encoded.",
                        queries=[(rate("cxr_received_bytes_total", "pod"), "{{pod}}")],
                        unit="Bps",
                    ),
                ],
            ),
            ("Workers", [WORKERS, RESTARTS, QUEUE]),
            (
                "Process",
                [
                    Panel(
                        title="Memory of the container",
                        description="What cannot be reclaimed, as part of the limit; see "
                        "__RUNBOOKS__/CXRMemoryNearLimit.md",
                        queries=[
                            (
                                f"max by (pod) (cxr_memory_working_set_bytes{{{S}}}"
                                f" / cxr_memory_limit_bytes{{{S}}})",
                                "{{pod}}",
                            )
                        ],
                        unit="percentunit",
                        steps=[(None, GREEN), (Value("MEMORY"), RED)],
                        most=1,
                        nothing="no memory limit",
                    ),
                    Panel(
                        title="CPU of the serving process",
                        description="Cores, without workers and TorchServe. Near 1: the protocols "
                        "are the bottleneck; add replicas.",
                        queries=[(rate("process_cpu_seconds_total", "pod"), "{{pod}}")],
                        steps=[(None, GREEN), (0.8, YELLOW)],
                    ),
                    Panel(
                        title="Open files of the serving process",
                        description="Connections, mostly.",
                        queries=[(f"sum by (pod) (process_open_fds{{{S}}})", "{{pod}}")],
                    ),
                ],
            ),
        ],
    ),
    Board(
        name="cxr-capacity",
        title="CXR / Scaling and capacity",
        description="How many replicas there are, whether they suffice, and how fast they start.",
        rows=[
            (
                "Replicas",
                [
                    Panel(
                        title="Replicas",
                        description="Scraped and ready, and the most that values allow; see "
                        "__RUNBOOKS__/CXRReplicasAtMaximum.md",
                        queries=[
                            (f"count(up{{{S}}})", "there"),
                            (f"sum(cxr_ready{{{S}}})", "ready"),
                            ("vector(__MAX_REPLICAS__)", "most"),
                        ],
                    ),
                    Panel(
                        title="In flight per replica",
                        description="What scaling.keda.inFlightPerReplica aims at.",
                        queries=[
                            (
                                f"sum(cxr_requests_in_flight{{{S}}}) / sum(cxr_ready{{{S}}})",
                                "in flight",
                            )
                        ],
                    ),
                    Panel(
                        title="Queue, of its capacity",
                        description="At 1, images are turned away.",
                        queries=[
                            (
                                f"max by (pod) (cxr_images_queued{{{S}}}"
                                f" / cxr_queue_capacity_images{{{S}}})",
                                "{{pod}}",
                            )
                        ],
                        unit="percentunit",
                        steps=[(None, GREEN), (Value("QUEUE"), RED)],
                        most=1,
                    ),
                    Panel(
                        title="Requests per second and replica",
                        description="Compare with the capacity that load tests have shown.",
                        queries=[
                            (
                                f"sum(rate(cxr_requests_total{{{S}, {METHODS}}}{RATE}))"
                                f" / sum(cxr_ready{{{S}}})",
                                "requests",
                            )
                        ],
                        unit="reqps",
                    ),
                ],
            ),
            (
                "Cold starts",
                [
                    Panel(
                        title="Start of each pod, by step",
                        description="Seconds from the start of the process until it was ready; see "
                        "__RUNBOOKS__/CXRColdStartSlow.md",
                        queries=[
                            (
                                f"max by (phase) (cxr_startup_phase_seconds{{{S}}})",
                                "{{phase}}",
                            )
                        ],
                        unit="s",
                    ),
                    Panel(
                        title="Age of the pods",
                        description="Since the start of the process.",
                        queries=[
                            (
                                f"time() - max by (pod) (process_start_time_seconds{{{S}}})",
                                "{{pod}}",
                            )
                        ],
                        unit="s",
                    ),
                ],
            ),
            (
                "GPU (NVIDIA DCGM exporter)",
                [
                    Panel(
                        title="GPU utilisation",
                        description="Of the namespace's pods, where the exporter runs.",
                        queries=[
                            (
                                'avg by (pod) (DCGM_FI_DEV_GPU_UTIL{namespace="$namespace"}) / 100',
                                "{{pod}}",
                            )
                        ],
                        unit="percentunit",
                        most=1,
                        events_only=True,
                        nothing="no GPU, or no DCGM exporter",
                    ),
                    Panel(
                        title="GPU memory",
                        description="Used, of the namespace's pods, where the exporter runs.",
                        queries=[
                            (
                                'sum by (pod) (DCGM_FI_DEV_FB_USED{namespace="$namespace"})',
                                "{{pod}}",
                            )
                        ],
                        unit="decmbytes",
                        events_only=True,
                        nothing="no GPU, or no DCGM exporter",
                    ),
                ],
            ),
        ],
    ),
    Board(
        name="cxr-model",
        title="CXR / Model quality",
        description="What the model answers, and what it is sent.",
        rows=[
            (
                "Answers",
                [
                    Panel(
                        title="Classes",
                        description="Part of the answers, by most probable class. A shift without "
                        "a reason in the clinic is a reason to look at the images.",
                        queries=[
                            (
                                f"{rate('cxr_predictions_total', 'label')} / ignoring (label) "
                                f"group_left sum(rate(cxr_predictions_total{{{S}}}{RATE}))",
                                "{{label}}",
                            )
                        ],
                        unit="percentunit",
                        most=1,
                    ),
                    Panel(
                        title="Confidence",
                        description="Probability of the most probable class, from buckets.",
                        queries=[
                            (quantile(part, "cxr_prediction_confidence"), f"p{round(100 * part)}")
                            for part in (0.1, 0.5, 0.9)
                        ],
                        unit="percentunit",
                        most=1,
                    ),
                ],
            ),
            (
                "Images",
                [
                    Panel(
                        title="Images by outcome",
                        description="Answered, or the reason of the rejection.",
                        queries=[(rate("cxr_images_total", "outcome"), "{{outcome}}")],
                        unit="ops",
                    ),
                    Panel(
                        title="Rejected images",
                        description="Part that could not be used; see "
                        "__RUNBOOKS__/CXRRejectionSurge.md",
                        queries=[
                            (
                                f'sum(rate(cxr_images_total{{{S}, outcome!="answered"}}{RATE}))'
                                f" / sum(rate(cxr_images_total{{{S}}}{RATE}))",
                                "rejected",
                            )
                        ],
                        unit="percentunit",
                        steps=[(None, GREEN), (Value("REJECTIONS"), RED)],
                    ),
                    Panel(
                        title="Flagged images",
                        description="What the guards have found, by reason; one image can have "
                        "several.",
                        queries=[(rate("cxr_images_flagged_total", "reason"), "{{reason}}")],
                        unit="ops",
                    ),
                    Panel(
                        title="Scores of the guards",
                        description="The highest twentieth of each score, from buckets. A limit "
                        "of the model's makes it a reason.",
                        queries=[(quantile(0.95, "cxr_quality_score", "score"), "{{score}}")],
                    ),
                ],
            ),
            (
                "Drift",
                [
                    Panel(
                        title="Population stability index",
                        description="How far each number of the answers is from its distribution "
                        "in training; see __RUNBOOKS__/CXRDrift.md",
                        queries=[
                            (f"max by (summary) (cxr:drift_images:psi{{{S}}})", "{{summary}}")
                        ],
                        steps=[(None, GREEN), (0.1, YELLOW), (Value("DRIFT"), RED)],
                        nothing="no rules (monitoring.rules), or a model without a reference",
                    ),
                    Panel(
                        title="Distance from the training images",
                        description="Part of the images in each tenth of the training's "
                        "validation images, nearest first; 10 % each without drift.",
                        queries=[
                            (
                                "avg by (bin) (cxr:drift_images:ratio"
                                f'{{{S}, summary="out_of_distribution"}})',
                                "{{bin}}",
                            )
                        ],
                        unit="percentunit",
                        nothing="no rules (monitoring.rules), or a model without guards",
                    ),
                ],
            ),
            (
                "Models",
                [
                    Panel(
                        title="Replicas by model",
                        description="Version, runtime and execution provider of what is served.",
                        queries=[
                            (
                                "count by (name, version, runtime, provider) "
                                f"(cxr_model_info{{{S}}})",
                                "{{name}} {{version}} ({{runtime}}, {{provider}})",
                            )
                        ],
                    )
                ],
            ),
        ],
    ),
    Board(
        name="cxr-canary",
        title="CXR / Versions and canary",
        description="Versions side by side; choose All services, or those to compare.",
        rows=[
            (
                "Traffic",
                [
                    Panel(
                        title="Requests by version",
                        description="A canary gets the part that canary.weight says.",
                        queries=[(by_version("cxr_requests_total", METHODS), "{{version}}")],
                        unit="reqps",
                    ),
                    Panel(
                        title="Failed requests by version",
                        description="Part that failed because of the service.",
                        queries=[
                            (
                                f"{by_version('cxr_requests_total', METHODS, FAILED)}"
                                f" / {by_version('cxr_requests_total', METHODS)}",
                                "{{version}}",
                            )
                        ],
                        unit="percentunit",
                        steps=[(None, GREEN), (Value("UNAVAILABILITY"), RED)],
                    ),
                ],
            ),
            (
                "Answers",
                [
                    Panel(
                        title="Mean time to answer by version",
                        description="A canary that is slower needs more replicas when promoted.",
                        queries=[
                            (
                                f"{by_version('cxr_request_duration_seconds_sum', METHODS)}"
                                f" / {by_version('cxr_request_duration_seconds_count', METHODS)}",
                                "{{version}}",
                            )
                        ],
                        unit="s",
                    ),
                    Panel(
                        title="Mean confidence by version",
                        description="Of the most probable class.",
                        queries=[
                            (
                                f"{by_version('cxr_prediction_confidence_sum')}"
                                f" / {by_version('cxr_prediction_confidence_count')}",
                                "{{version}}",
                            )
                        ],
                        unit="percentunit",
                    ),
                    Panel(
                        title="Classes by version",
                        description="Part of the answers. The same patients should give about the "
                        "same parts.",
                        queries=[
                            (
                                "sum by (version, label) "
                                f"(rate(cxr_predictions_total{{{S}}}{RATE}) {VERSION})"
                                " / ignoring (label) group_left "
                                f"{by_version('cxr_predictions_total')}",
                                "{{version}} {{label}}",
                            )
                        ],
                        unit="percentunit",
                    ),
                ],
            ),
        ],
    ),
    Board(
        name="cxr-portal",
        title="CXR / Portal",
        description="Do people and applications get answers, and do jobs move?",
        rows=[
            (
                "Health",
                [
                    Panel(
                        title="Replicas of the portal",
                        description="That answer Prometheus; see __RUNBOOKS__/CXRPortalDown.md",
                        queries=[(f"sum(up{{{P}}})", "up")],
                        single=True,
                        steps=[(None, RED), (1, GREEN)],
                    ),
                    Panel(
                        title="Portal's availability budget left",
                        description="Of __PERIOD__, at an objective of __AVAILABILITY__; see "
                        "__RUNBOOKS__/CXRPortalBudgetBurn.md",
                        queries=[
                            (
                                f"1 - sum(cxr_portal:requests_failed:increase__PERIOD__{{{P}}})"
                                f" / (sum(cxr_portal:requests:increase__PERIOD__{{{P}}})"
                                " * (1 - __AVAILABILITY__))",
                                "left",
                            )
                        ],
                        unit="percentunit",
                        single=True,
                        steps=[(None, RED), (0.01, YELLOW), (0.5, GREEN)],
                        nothing="no rules (monitoring.rules), or no requests",
                    ),
                    Panel(
                        title="Replicas that leave the model alone",
                        description="Their circuit breaker is open; see "
                        "__RUNBOOKS__/CXRPortalBreakerOpen.md",
                        queries=[(f"sum(cxr_portal_breaker_open{{{P}}})", "open")],
                        single=True,
                        steps=[(None, GREEN), (1, RED)],
                    ),
                    Panel(
                        title="Images of jobs that wait",
                        description="In the database; see __RUNBOOKS__/CXRPortalBacklogStuck.md",
                        queries=[(f"max(cxr_portal_job_images_open{{{P}}})", "images")],
                        single=True,
                    ),
                ],
            ),
            (
                "Requests",
                [
                    Panel(
                        title="Requests by answer",
                        description="Per second. 4xx: the caller's fault; 5xx: ours; gone: the "
                        "caller had left.",
                        queries=[
                            (
                                rate("cxr_portal_requests_total", "route, code", series=P),
                                "{{route}} {{code}}",
                            )
                        ],
                        unit="reqps",
                    ),
                    Panel(
                        title="Time to answer (p95)",
                        description="By route, receiving the files included.",
                        queries=[
                            (
                                quantile(
                                    0.95,
                                    "cxr_portal_request_duration_seconds",
                                    "route",
                                    'route=~"/v1/.*"',
                                    series=P,
                                ),
                                "{{route}}",
                            )
                        ],
                        unit="s",
                    ),
                    Panel(
                        title="Callers turned away",
                        description="Per second, by reason. Many `invalid`: somebody guesses keys; "
                        "`rate`: somebody needs a higher limit.",
                        queries=[
                            (
                                rate("cxr_portal_refused_callers_total", "reason", series=P),
                                "{{reason}}",
                            )
                        ],
                        unit="reqps",
                        events_only=True,
                        nothing="none",
                    ),
                ],
            ),
            (
                "Images and the model",
                [
                    Panel(
                        title="Images by outcome",
                        description="Per second, of requests and jobs.",
                        queries=[
                            (
                                rate("cxr_portal_images_total", "way, outcome", series=P),
                                "{{way}} {{outcome}}",
                            )
                        ],
                    ),
                    Panel(
                        title="Calls of the model",
                        description="Per second, by gRPC status.",
                        queries=[
                            (rate("cxr_portal_model_calls_total", "code", series=P), "{{code}}")
                        ],
                        unit="reqps",
                    ),
                    Panel(
                        title="Time of a call of the model",
                        description="As the portal sees it, retries included.",
                        queries=[
                            (
                                quantile(part, "cxr_portal_model_call_duration_seconds", series=P),
                                f"p{round(100 * part)}",
                            )
                            for part in (0.5, 0.95)
                        ],
                        unit="s",
                    ),
                    Panel(
                        title="Images of requests in flight",
                        description="By pod; beyond portal.limits.maxInFlight, callers get 503.",
                        queries=[(f"sum by (pod) (cxr_portal_images_in_flight{{{P}}})", "{{pod}}")],
                    ),
                    Panel(
                        title="Storage of limits away",
                        description="Times per second that it did not answer; meanwhile each "
                        "replica counts by itself.",
                        queries=[
                            (
                                rate("cxr_portal_rate_storage_errors_total", "pod", series=P),
                                "{{pod}}",
                            )
                        ],
                    ),
                    Panel(
                        title="CPU of the portal",
                        description="Cores, by pod. It uses one at most.",
                        queries=[(rate("process_cpu_seconds_total", "pod", series=P), "{{pod}}")],
                        steps=[(None, GREEN), (0.8, YELLOW)],
                    ),
                ],
            ),
        ],
    ),
]


def build(board: Board) -> dict[str, Any]:
    """The dashboard as Grafana's JSON."""
    builder = (
        builders.Dashboard(board.title)
        .uid(board.name)
        .description(board.description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("Other dashboards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .link(
            builders.DashboardLink("Runbooks")
            .type(models.DashboardLinkType.LINK)
            .url("__RUNBOOKS__")
            .target_blank(True)
        )
    )
    for variable in variables():
        builder = builder.with_variable(variable)
    for title, panels in board.rows:
        builder = builder.with_row(builders.Row(title))
        for panel in panels:
            builder = builder.with_panel(widget(panel, 24 // beside(panels)))
    document: dict[str, Any] = json.loads(json.dumps(builder.build(), cls=JSONEncoder))
    return document


def beside(panels: Sequence[Panel]) -> int:
    """How many panels of a row stand beside each other."""
    if all(panel.single for panel in panels):
        return len(panels)
    return 2 if len(panels) in (2, 4) else min(3, len(panels))


def variables() -> Iterable[Any]:
    """Data source, namespace, service and version."""
    yield builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    yield (
        query_variable("namespace", "label_values(cxr_model_info, namespace)").label("Namespace")
    )
    yield (
        query_variable("service", 'label_values(cxr_model_info{namespace="$namespace"}, service)')
        .label("Service")
        .multi(True)
        .include_all(True)
    )
    yield (
        query_variable("version", f"label_values(cxr_model_info{{{S}}}, version)")
        .label("Version")
        .multi(True)
        .include_all(True)
    )


def query_variable(name: str, query: str) -> Any:
    """A variable whose values Prometheus knows."""
    return (
        builders.QueryVariable(name)
        .datasource(source())
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def source() -> Any:
    """The chosen data source."""
    return models.DataSourceRef(type_val="prometheus", uid="${datasource}")


def step(value: float | Value | None) -> Any:
    """Where a colour begins; the quotes around a value's name go with it."""
    return f"__{value.name}__" if isinstance(value, Value) else value


def widget(panel: Panel, width: int) -> Any:
    """Grafana's panel for a panel."""
    builder: Any = stat.Panel() if panel.single else timeseries.Panel()
    builder = (
        builder.title(panel.title)
        .description(panel.description)
        .datasource(source())
        .unit(panel.unit)
        .no_value(panel.nothing)
        .span(width)
        .height(5 if panel.single else 8)
        .min(0)
        .thresholds(
            builders.ThresholdsConfig()
            .mode(models.ThresholdsMode.ABSOLUTE)
            .steps(
                [models.Threshold(value=step(value), color=color) for value, color in panel.steps]
            )
        )
    )
    if panel.most is not None:
        builder = builder.max(panel.most)
    if not panel.single:
        builder = builder.fill_opacity(10).legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        if len(panel.steps) > 1:
            builder = builder.thresholds_style(
                common_builders.GraphThresholdsStyleConfig().mode(
                    common.GraphTresholdsStyleMode.DASHED
                )
            )
    for number, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend)
        query = query.ref_id(chr(ord("A") + number)).datasource(source())
        builder = builder.with_target(query.instant() if panel.single else query.range())
    return builder


def texts() -> dict[str, str]:
    """Name of each file, and what it should hold."""
    return {
        f"{board.name}.json": json.dumps(build(board), indent=1, sort_keys=True) + "\n"
        for board in BOARDS
    }


def main() -> None:
    """Write the files."""
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
