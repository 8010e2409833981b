"""Writes files/dashboards/*.json, the chart's Grafana dashboards.

.venv/bin/python charts/cxr-serve/ci/dashboards.py

Words in capitals between two underscores are values, which the chart puts in their place
(templates/monitoring/dashboards.yaml).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
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
        queries: PromQL, by legend.
        unit: Grafana's name of the unit.
        single: one number instead of lines.
        steps: from which value which colour begins; the first one's value is not read.
        most: end of the axis, where there is one.
        events_only: when there is data, where that is not always so under load.
        nothing: what to show without data.
    """

    title: str
    description: str
    queries: Mapping[str, str]
    unit: str = "short"
    single: bool = False
    steps: Sequence[tuple[float | Value | None, str]] = ((None, GREEN),)
    most: float | None = None
    events_only: str = ""
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
    """Events per second, by these labels or in all."""
    events = f"(rate({metric}{{{', '.join((series, *labels))}}}{RATE}))"
    return f"sum by ({by}) {events}" if by else f"sum{events}"


def by_version(metric: str, *labels: str) -> str:
    """Events per second, by model version."""
    return f"sum by (version) (rate({metric}{{{', '.join((S, *labels))}}}{RATE}) {VERSION})"


def mean(metric: str, by: str) -> str:
    """Mean of what a histogram has counted, by these labels."""
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def mean_by_version(metric: str, *labels: str) -> str:
    """Mean of what a histogram has counted, by model version."""
    return f"{by_version(f'{metric}_sum', *labels)} / {by_version(f'{metric}_count', *labels)}"


def quantile(part: float, metric: str, by: str = "", *labels: str, series: str = S) -> str:
    """A quantile of a histogram, estimated from its buckets."""
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({part}, {rate(f'{metric}_bucket', groups, *labels, series=series)})"


def quantiles(metric: str, *parts: float, series: str = S) -> dict[str, str]:
    """Queries for quantiles of a histogram, by legend."""
    return {f"p{round(100 * part)}": quantile(part, metric, series=series) for part in parts}


def budget(
    title: str,
    description: str,
    objective: str,
    *,
    failed: str = "cxr:requests_failed",
    series: str = S,
) -> Panel:
    """What is left of the error budget of the period.

    Args:
        title: of the panel.
        description: of the panel.
        objective: name of the value that says it.
        failed: the recording rule of what uses the budget up.
        series: whose it is.
    """
    whole = f"{failed.partition(':')[0]}:requests"
    used, requests = (f"sum({rule}:increase__PERIOD__{{{series}}})" for rule in (failed, whole))
    return Panel(
        title=title,
        description=description,
        queries={"left": f"1 - {used} / ({requests} * (1 - {objective}))"},
        unit="percentunit",
        single=True,
        steps=[(None, RED), (0.01, YELLOW), (0.5, GREEN)],
        nothing="no rules (monitoring.rules), or no requests",
    )


READY = Panel(
    title="Ready replicas",
    description="Pods that answer. 0: every request fails; see __RUNBOOKS__/CXRNoReadyReplica.md",
    queries={"ready": f"sum(cxr_ready{{{S}}})"},
    single=True,
    steps=[(None, RED), (1, GREEN)],
)
REQUESTS = Panel(
    title="Requests by answer",
    description="Per second, for predictions and explanations. 4xx: the client's fault; 5xx: ours.",
    queries={"{{protocol}} {{code}}": rate("cxr_requests_total", "protocol, code", METHODS)},
    unit="reqps",
)
FAILURES = Panel(
    title="Failed requests",
    description="Part that failed because of the service; see "
    "__RUNBOOKS__/CXRAvailabilityBudgetBurn.md",
    queries={
        "failed": f"{rate('cxr_requests_total', '', METHODS, FAILED)}"
        f" / {rate('cxr_requests_total', '', METHODS)}"
    },
    unit="percentunit",
    steps=[(None, GREEN), (Value("UNAVAILABILITY"), RED)],
)
LATENCY = Panel(
    title="Time to answer",
    description="From the first byte of the request to the answer; see "
    "__RUNBOOKS__/CXRLatencyBudgetBurn.md",
    queries=quantiles("cxr_request_duration_seconds", 0.5, 0.95, 0.99),
    unit="s",
)
QUEUE = Panel(
    title="Images that wait",
    description="By pod. They grow where more comes than is answered; see "
    "__RUNBOOKS__/CXRQueueSaturated.md",
    queries={"{{pod}}": f"sum by (pod) (cxr_images_queued{{{S}}})"},
)
IN_FLIGHT = Panel(
    title="Requests in flight",
    description="Being answered now, by pod. KEDA adds replicas by it.",
    queries={"{{pod}}": f"sum by (pod) (cxr_requests_in_flight{{{S}}})"},
)
WORKERS = Panel(
    title="Workers with the model loaded",
    description="By pod; as many as cores, unless values say otherwise.",
    queries={"{{pod}}": f"sum by (pod) (cxr_workers_ready{{{S}}})"},
)
RESTARTS = Panel(
    title="Worker restarts",
    description="In the last 15 minutes, by pod; see __RUNBOOKS__/CXRWorkerRestarts.md",
    queries={"{{pod}}": f"sum by (pod) (increase(cxr_worker_restarts_total{{{S}}}[15m]))"},
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
                    budget(
                        "Availability budget left",
                        "Of __PERIOD__, at an objective of __AVAILABILITY__.",
                        "__AVAILABILITY__",
                    ),
                    budget(
                        "Latency budget left",
                        "Of __PERIOD__: __LATENCY__ within __LATENCY_SECONDS__ s.",
                        "__LATENCY__",
                        failed="cxr:requests_slow",
                    ),
                    Panel(
                        title="Alerts",
                        description="Those that fire; each has a runbook in __RUNBOOKS__.",
                        queries={
                            "{{alertname}}": 'sum by (alertname) (ALERTS{namespace="$namespace", '
                            'alertname=~"CXR.*", alertstate="firing"})'
                        },
                        single=True,
                        steps=[(None, GREEN), (1, RED)],
                        events_only="while an alert fires",
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
                        queries={"{{stage}}": mean("cxr_stage_duration_seconds", "stage")},
                        unit="s",
                    ),
                    Panel(
                        title="Images answered together",
                        description="Mean batch that an image was in: 1 on a CPU; more where the "
                        "archive asks for batches on a GPU, and load fills them.",
                        queries={"{{service}}": mean("cxr_batch_images", "service")},
                    ),
                    Panel(
                        title="Time to answer by protocol (p95)",
                        description="Slow over REST only: slow clients, whose bodies count.",
                        queries={
                            "{{protocol}}": quantile(
                                0.95, "cxr_request_duration_seconds", "protocol"
                            )
                        },
                        unit="s",
                    ),
                    Panel(
                        title="Images per request",
                        description="Average batch that clients send.",
                        queries={
                            "images": f"{rate('cxr_images_total', '')}"
                            f" / {rate('cxr_requests_total', '', METHODS)}"
                        },
                    ),
                    Panel(
                        title="Received images",
                        description="Bytes per second, as encoded.",
                        queries={"{{pod}}": rate("cxr_received_bytes_total", "pod")},
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
                        queries={
                            "{{pod}}": f"max by (pod) (cxr_memory_working_set_bytes{{{S}}}"
                            f" / cxr_memory_limit_bytes{{{S}}})"
                        },
                        unit="percentunit",
                        steps=[(None, GREEN), (Value("MEMORY"), RED)],
                        most=1,
                        nothing="no memory limit",
                    ),
                    Panel(
                        title="CPU of the serving process",
                        description="Cores, without workers and TorchServe. Near 1: the protocols "
                        "are the bottleneck; add replicas.",
                        queries={"{{pod}}": rate("process_cpu_seconds_total", "pod")},
                        steps=[(None, GREEN), (0.8, YELLOW)],
                    ),
                    Panel(
                        title="Open files of the serving process",
                        description="Connections, mostly.",
                        queries={"{{pod}}": f"sum by (pod) (process_open_fds{{{S}}})"},
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
                        queries={
                            "there": f"count(up{{{S}}})",
                            "ready": f"sum(cxr_ready{{{S}}})",
                            "most": "vector(__MAX_REPLICAS__)",
                        },
                    ),
                    Panel(
                        title="In flight per replica",
                        description="What scaling.keda.inFlightPerReplica aims at.",
                        queries={
                            "in flight": f"sum(cxr_requests_in_flight{{{S}}})"
                            f" / sum(cxr_ready{{{S}}})"
                        },
                    ),
                    Panel(
                        title="Queue, of its capacity",
                        description="At 1, images are turned away.",
                        queries={
                            "{{pod}}": f"max by (pod) (cxr_images_queued{{{S}}}"
                            f" / cxr_queue_capacity_images{{{S}}})"
                        },
                        unit="percentunit",
                        steps=[(None, GREEN), (Value("QUEUE"), RED)],
                        most=1,
                    ),
                    Panel(
                        title="Requests per second and replica",
                        description="Compare with the capacity that load tests have shown.",
                        queries={
                            "requests": f"{rate('cxr_requests_total', '', METHODS)}"
                            f" / sum(cxr_ready{{{S}}})"
                        },
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
                        queries={"{{phase}}": f"max by (phase) (cxr_startup_phase_seconds{{{S}}})"},
                        unit="s",
                    ),
                    Panel(
                        title="Age of the pods",
                        description="Since the start of the process.",
                        queries={
                            "{{pod}}": f"time() - max by (pod) (process_start_time_seconds{{{S}}})"
                        },
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
                        queries={
                            "{{pod}}": "avg by (pod) "
                            '(DCGM_FI_DEV_GPU_UTIL{namespace="$namespace"}) / 100'
                        },
                        unit="percentunit",
                        most=1,
                        events_only="where there is a GPU",
                        nothing="no GPU, or no DCGM exporter that keeps its labels",
                    ),
                    Panel(
                        title="GPU memory",
                        description="Used, of the namespace's pods, where the exporter runs.",
                        queries={
                            "{{pod}}": 'sum by (pod) (DCGM_FI_DEV_FB_USED{namespace="$namespace"})'
                        },
                        unit="decmbytes",
                        events_only="where there is a GPU",
                        nothing="no GPU, or no DCGM exporter that keeps its labels",
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
                        queries={
                            "{{label}}": f"{rate('cxr_predictions_total', 'label')}"
                            f" / ignoring (label) group_left {rate('cxr_predictions_total', '')}"
                        },
                        unit="percentunit",
                        most=1,
                    ),
                    Panel(
                        title="Confidence",
                        description="Probability of the most probable class, from buckets.",
                        queries=quantiles("cxr_prediction_confidence", 0.1, 0.5, 0.9),
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
                        queries={"{{outcome}}": rate("cxr_images_total", "outcome")},
                        unit="ops",
                    ),
                    Panel(
                        title="Rejected images",
                        description="Part that could not be used; see "
                        "__RUNBOOKS__/CXRRejectionSurge.md",
                        queries={
                            "rejected": rate("cxr_images_total", "", 'outcome!="answered"')
                            + f" / {rate('cxr_images_total', '')}"
                        },
                        unit="percentunit",
                        steps=[(None, GREEN), (Value("REJECTIONS"), RED)],
                    ),
                    Panel(
                        title="Flagged images",
                        description="What the guards have found, by reason; one image can have "
                        "several.",
                        queries={"{{reason}}": rate("cxr_images_flagged_total", "reason")},
                        unit="ops",
                    ),
                    Panel(
                        title="Scores of the guards",
                        description="The highest twentieth of each score, from buckets. A limit "
                        "of the model's makes it a reason.",
                        queries={"{{score}}": quantile(0.95, "cxr_quality_score", "score")},
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
                        queries={"{{summary}}": f"max by (summary) (cxr:drift_images:psi{{{S}}})"},
                        steps=[(None, GREEN), (0.1, YELLOW), (Value("DRIFT"), RED)],
                        nothing="no rules (monitoring.rules), or a model without a reference",
                    ),
                    Panel(
                        title="Distance from the training images",
                        description="Part of the images in each tenth of the training's "
                        "validation images, nearest first; 10 % each without drift.",
                        queries={
                            "{{bin}}": "avg by (bin) (cxr:drift_images:ratio"
                            f'{{{S}, summary="out_of_distribution"}})'
                        },
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
                        queries={
                            "{{name}} {{version}} ({{runtime}}, {{provider}})": "count by "
                            f"(name, version, runtime, provider) (cxr_model_info{{{S}}})"
                        },
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
                        queries={"{{version}}": by_version("cxr_requests_total", METHODS)},
                        unit="reqps",
                    ),
                    Panel(
                        title="Failed requests by version",
                        description="Part that failed because of the service.",
                        queries={
                            "{{version}}": f"{by_version('cxr_requests_total', METHODS, FAILED)}"
                            f" / {by_version('cxr_requests_total', METHODS)}"
                        },
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
                        queries={
                            "{{version}}": mean_by_version("cxr_request_duration_seconds", METHODS)
                        },
                        unit="s",
                    ),
                    Panel(
                        title="Mean confidence by version",
                        description="Of the most probable class.",
                        queries={"{{version}}": mean_by_version("cxr_prediction_confidence")},
                        unit="percentunit",
                    ),
                    Panel(
                        title="Classes by version",
                        description="Part of the answers. The same patients should give about the "
                        "same parts.",
                        queries={
                            "{{version}} {{label}}": "sum by (version, label) "
                            f"(rate(cxr_predictions_total{{{S}}}{RATE}) {VERSION})"
                            " / ignoring (label) group_left "
                            f"{by_version('cxr_predictions_total')}"
                        },
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
                        queries={"up": f"sum(up{{{P}}})"},
                        single=True,
                        steps=[(None, RED), (1, GREEN)],
                    ),
                    budget(
                        "Portal's availability budget left",
                        "Of __PERIOD__, at an objective of __AVAILABILITY__; see "
                        "__RUNBOOKS__/CXRPortalBudgetBurn.md",
                        "__AVAILABILITY__",
                        failed="cxr_portal:requests_failed",
                        series=P,
                    ),
                    Panel(
                        title="Replicas that leave the model alone",
                        description="Their circuit breaker is open; see "
                        "__RUNBOOKS__/CXRPortalBreakerOpen.md",
                        queries={"open": f"sum(cxr_portal_breaker_open{{{P}}})"},
                        single=True,
                        steps=[(None, GREEN), (1, RED)],
                    ),
                    Panel(
                        title="Images of jobs that wait",
                        description="In the database; see __RUNBOOKS__/CXRPortalBacklogStuck.md",
                        queries={"images": f"max(cxr_portal_job_images_open{{{P}}})"},
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
                        queries={
                            "{{route}} {{code}}": rate(
                                "cxr_portal_requests_total", "route, code", series=P
                            )
                        },
                        unit="reqps",
                    ),
                    Panel(
                        title="Time to answer (p95)",
                        description="By route, receiving the files included.",
                        queries={
                            "{{route}}": quantile(
                                0.95,
                                "cxr_portal_request_duration_seconds",
                                "route",
                                'route=~"/v1/.*"',
                                series=P,
                            )
                        },
                        unit="s",
                    ),
                    Panel(
                        title="Callers turned away",
                        description="Per second, by reason. Many `invalid`: somebody guesses keys; "
                        "`rate`: somebody needs a higher limit.",
                        queries={
                            "{{reason}}": rate(
                                "cxr_portal_refused_callers_total", "reason", series=P
                            )
                        },
                        unit="reqps",
                        events_only="after somebody was turned away",
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
                        queries={
                            "{{way}} {{outcome}}": rate(
                                "cxr_portal_images_total", "way, outcome", series=P
                            )
                        },
                    ),
                    Panel(
                        title="Calls of the model",
                        description="Per second, by gRPC status.",
                        queries={
                            "{{code}}": rate("cxr_portal_model_calls_total", "code", series=P)
                        },
                        unit="reqps",
                    ),
                    Panel(
                        title="Time of a call of the model",
                        description="As the portal sees it, retries included.",
                        queries=quantiles(
                            "cxr_portal_model_call_duration_seconds", 0.5, 0.95, series=P
                        ),
                        unit="s",
                    ),
                    Panel(
                        title="Images of requests in flight",
                        description="By pod; beyond portal.limits.maxInFlight, callers get 503.",
                        queries={"{{pod}}": f"sum by (pod) (cxr_portal_images_in_flight{{{P}}})"},
                    ),
                    Panel(
                        title="Storage of limits away",
                        description="Times per second that it did not answer; meanwhile each "
                        "replica counts by itself.",
                        queries={
                            "{{pod}}": rate("cxr_portal_rate_storage_errors_total", "pod", series=P)
                        },
                    ),
                    Panel(
                        title="CPU of the portal",
                        description="Cores, by pod. It uses one at most.",
                        queries={"{{pod}}": rate("process_cpu_seconds_total", "pod", series=P)},
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
    for number, (legend, expression) in enumerate(panel.queries.items()):
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
