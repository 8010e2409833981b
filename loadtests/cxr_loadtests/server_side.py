"""The server's own figures: its counters, and what Prometheus has kept of a run."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import urllib3

from cxr_loadtests.errors import LoadTestError
from cxr_loadtests.results import CodeRecord, Reconciliation, Result, Series

_REQUESTS = "cxr_requests_total"
_METHODS = "predict|infer|explain"
_TIMEOUT = 10.0
_POINTS = 240
# How long the next scrape may take to come.
_SCRAPE_SECONDS = 35.0

Counts = Counter[tuple[str, str]]


class _Query(NamedTuple):
    group: Literal["stages", "replicas", "queue", "memory"]
    unit: str
    expression: str
    name: str


# `{}` stands for the selector of the service; names with `$` are a label of the answer.
_QUERIES = (
    _Query(
        "stages",
        "s",
        "sum by (stage) (rate(cxr_stage_duration_seconds_sum{{{}}}[{window}])) / "
        "sum by (stage) (rate(cxr_stage_duration_seconds_count{{{}}}[{window}]))",
        "$stage",
    ),
    _Query("replicas", "", "sum(cxr_ready{{{}}})", "ready replicas"),
    _Query("queue", "", "sum(cxr_images_queued{{{}}})", "images that wait"),
    _Query("queue", "", "sum(cxr_requests_in_flight{{{}}})", "requests in flight"),
    _Query(
        "memory",
        "MiB",
        "max(cxr_memory_working_set_bytes{{{}}}) / 1048576",
        "of the largest replica",
    ),
)


class Prometheus:
    """A Prometheus server."""

    def __init__(self, url: str, selector: str) -> None:
        """Prepare to ask.

        Args:
            url: of the server.
            selector: what tells the service's series from others, such as `namespace="imaging"`.

        Raises:
            LoadTestError: the URL is none.
        """
        if urlsplit(url).scheme not in ("http", "https"):
            raise LoadTestError("--prometheus must be a URL.")
        self._url = url.rstrip("/")
        self._selector = selector
        self._pool = urllib3.PoolManager(retries=2, timeout=_TIMEOUT)

    def wait_for_scrape(self) -> None:
        """Wait until Prometheus has seen what every replica has counted until now.

        Raises:
            LoadTestError: it does not scrape the service.
        """
        since, deadline = time.time(), time.monotonic() + _SCRAPE_SECONDS
        while True:
            answer = self._ask("query", {"query": f"timestamp(cxr_ready{{{self._selector}}})"})
            times = [float(item["value"][1]) for item in answer]
            if times and min(times) > since:
                return
            if time.monotonic() > deadline:
                raise LoadTestError(
                    f"Prometheus has no new samples of the service; is {self._selector!r} right?"
                )
            time.sleep(1)

    def counts(self, start: float, end: float) -> Counts:
        """What all replicas have counted between two times, by protocol and code.

        From the samples themselves: `increase()` extrapolates. A replica that came in between
        counts from 0. Of one that ended, what it counted after its last scrape is lost.
        """
        before = 60
        window = int(end - start) + before
        selector = ",".join(part for part in (self._selector, f'method=~"{_METHODS}"') if part)
        answer = self._ask(
            "query", {"query": f"{_REQUESTS}{{{selector}}}[{window}s]", "time": str(end)}
        )
        total: Counts = Counter()
        for series in answer:
            labels = series["metric"]
            previous = 0.0
            grown = 0.0
            for at, text in series["values"]:
                value = float(text)
                if at > start:
                    # A smaller value is a counter that has begun again.
                    grown += value - previous if value >= previous else value
                previous = value
            total[labels["protocol"], labels["code"]] += round(grown)
        return total

    def series(self, start: float, end: float) -> list[Series]:
        """Stages, replicas, queue and memory over the time of a run."""
        step = max(1, round((end - start) / _POINTS))
        window = f"{max(15, 4 * step)}s"
        found = []
        for query in _QUERIES:
            expression = query.expression.format(self._selector, self._selector, window=window)
            answer = self._ask(
                "query_range",
                {"query": expression, "start": str(start), "end": str(end), "step": str(step)},
            )
            for item in answer:
                points = [(float(at), float(text)) for at, text in item["values"]]
                points = [(at, value) for at, value in points if value == value]  # noqa: PLR0124 - NaN
                label = query.name.removeprefix("$")
                found.append(
                    Series(
                        name=item["metric"].get(label, label),
                        group=query.group,
                        unit=query.unit,
                        times=[at for at, _ in points],
                        values=[value for _, value in points],
                    )
                )
        return found

    def _ask(self, path: str, fields: Mapping[str, str]) -> list[dict[str, Any]]:
        try:
            answer = self._pool.request("POST", f"{self._url}/api/v1/{path}", fields=dict(fields))
            document = answer.json()
            if document["status"] == "success":
                result: list[dict[str, Any]] = document["data"]["result"]
                return result
            refusal = document["error"]
        except (urllib3.exceptions.HTTPError, ValueError, KeyError, TypeError) as error:
            raise LoadTestError("Prometheus does not answer.") from error
        raise LoadTestError(f"Prometheus refuses a query: {refusal}.")


def with_prometheus(result: Result, prometheus: Prometheus, start: float) -> Result:
    """A run with the counts and figures of all replicas, or with why these are missing.

    Args:
        result: what the clients have seen.
        prometheus: to be asked.
        start: Unix time from which requests count.
    """
    result = result.model_copy(update={"prometheus": True})
    answered = sum(code.count for code in result.codes if code.from_server)
    # A run may have taken an hour: what Prometheus does not say must not cost the rest.
    try:
        counts = settled_counts(prometheus, start, answered)
        found = reconcile(result.codes, counts, "Prometheus")
        result = result.model_copy(update={"reconciliation": found})
        end = result.phases[-1].end if result.phases else start
        return result.model_copy(update={"server": prometheus.series(start, end)})
    except LoadTestError as error:
        return result.model_copy(update={"unknown": str(error)})


def with_metrics(result: Result, url: str, before: Counts) -> Result:
    """A run with the counts of one server, or with why these are missing.

    Args:
        result: what the clients have seen.
        url: of the server's metrics.
        before: what it had counted before the run.
    """
    try:
        counts = scrape(url) - before
    except LoadTestError as error:
        return result.model_copy(update={"unknown": str(error)})
    found = reconcile(result.codes, counts, "the server's metrics")
    return result.model_copy(update={"reconciliation": found})


def scrape(url: str) -> Counts:
    """What one server has counted until now, from its own `/metrics`.

    Raises:
        LoadTestError: it does not answer.
    """
    try:
        answer = urllib3.PoolManager(retries=2, timeout=_TIMEOUT).request("GET", url)
    except urllib3.exceptions.HTTPError as error:
        raise LoadTestError("The metrics' URL does not answer.") from error
    if answer.status != HTTPStatus.OK:
        raise LoadTestError(f"The metrics' URL answers with {answer.status}.")
    total: Counts = Counter()
    for line in answer.data.decode().splitlines():
        name, _, rest = line.partition("{")
        if name == _REQUESTS:
            text, _, value = rest.partition("}")
            labels = dict(part.split("=", 1) for part in text.split(","))
            if labels["method"].strip('"') in _METHODS.split("|"):
                key = (labels["protocol"].strip('"'), labels["code"].strip('"'))
                total[key] += round(float(value))
    return total


def settled_counts(prometheus: Prometheus, start: float, answered: int) -> Counts:
    """The counts of all replicas once the scrapes have caught up, or after a while.

    Raises:
        LoadTestError: Prometheus has not answered by then.
    """
    deadline = time.monotonic() + _SCRAPE_SECONDS
    while True:
        try:
            counts = prometheus.counts(start, time.time())
        except LoadTestError:
            if time.monotonic() > deadline:
                raise
        else:
            if sum(counts.values()) >= answered or time.monotonic() > deadline:
                return counts
        time.sleep(2)


def reconcile(codes: Sequence[CodeRecord], counts: Counts, source: str) -> Reconciliation:
    """Set what the clients counted beside what the servers did."""
    clients: Counts = Counter()
    for record in codes:
        if record.from_server:
            clients[record.protocol, record.code] += record.count
    keys = sorted(clients.keys() | {key for key, count in counts.items() if count})
    return Reconciliation(
        source=source,
        sent=sum(record.count for record in codes),
        answered=sum(clients.values()),
        counted=sum(counts.values()),
        by_code=[
            (protocol, code, clients[protocol, code], counts[protocol, code])
            for protocol, code in keys
        ],
    )
