"""What those on call see of service and portal: metrics, rules, dashboards and alerts, live.

Windows are shortened by values, so that alerts fire and clear within a test.
"""

import json
import runpy
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cxr_loadtests.results import load_result
from support import portal_release
from support.chaos import STUTTER, workers
from support.charts import CHART
from support.cluster import Gateway, Load, Namespace, setting, wait_for
from support.figures import report
from support.loadtests import loadtest, write_inputs
from support.portal_release import Portal
from support.portals import files
from support.prometheus import Prometheus
from support.volumes import local_volume

pytestmark = pytest.mark.timeout(600)

SHORT = {
    "monitoring": {
        "podMonitor": {"enabled": True, "interval": "5s", "nativeHistograms": True},
        "rules": {"enabled": True},
        "dashboards": {"enabled": True},
        "slo": {
            "period": "10m",
            "minimumFailures": 2,
            "burnRates": [
                {"long": "1m", "short": "30s", "factor": 2, "for": "0s", "severity": "critical"}
            ],
        },
        "thresholds": {
            "noReadyReplica": {"for": "0s"},
            "modelNotLoading": {"window": "1m", "for": "5s"},
            "workerRestarts": {"window": "1m", "count": 1},
            "drift": {"window": "1m", "minimum": 20, "for": "0s"},
            "portalBreakerOpen": {"window": "30s", "for": "0s"},
        },
    }
}
PORTAL_HOST = "portal.observed.cxr.e2e.example.org"


@pytest.fixture(scope="module")
def observed(
    installed: Namespace, tmp_path_factory: pytest.TempPathFactory, prometheus: Prometheus
) -> Iterator[Namespace]:
    """The installation with monitoring on, and a portal in front of it; afterwards as it was."""
    values = tmp_path_factory.mktemp("values") / "monitoring.yaml"
    values.write_text(yaml.safe_dump(SHORT), encoding="utf-8")
    before = json.loads(installed.helm("status", "-o", "json"))["version"]
    with local_volume("cxr-e2e-observed", portal_release.image()) as storage_class:
        own = portal_release.values(PORTAL_HOST, storage_class)
        begin = time.monotonic()
        # The load comes from one caller.
        limit = "portal.limits.imagesPerMinute=100000"
        installed.upgrade(*own, limit, flags=("-f", str(values)))
        installed.rolled_out()
        try:
            up = f'cxr_ready{{namespace="{installed.name}"}}'
            wait_for(lambda: prometheus.value(up) == 1, "scrape", 120)
            yield installed
            fired = prometheus.fired(time.monotonic() - begin)
            alerts = [path.stem for path in (CHART / "files" / "alerts").glob("*.yaml")]
            names = ", ".join(sorted(fired))
            report("alerts", f"{len(fired)} of {len(alerts)} fired live: {names}")
        finally:
            installed.helm("rollback", str(before))
            installed.rolled_out()
            # Its volume goes next.
            installed.kubectl(
                *("wait", "--for=delete", "pod", "-l", "app.kubernetes.io/component=portal"),
                "--timeout=120s",
            )


@pytest.fixture(scope="module")
def portal(observed: Namespace, prometheus: Prometheus) -> Portal:
    """The installation's portal, scraped, and a key for it."""
    found = Portal(cluster=observed, host=PORTAL_HOST)
    found.rolled_out()
    found.make_key()
    with found.http() as http:
        wait_for(lambda: http.get("/v1/models").status_code == 200, "the model", 60)
    up = f'up{{namespace="{observed.name}", service="{found.name}"}}'
    wait_for(lambda: prometheus.value(up) == 1, "scrape of the portal", 120)
    return found


def wait_for_alert(prometheus: Prometheus, alert: str, timeout: float = 90) -> float:
    return wait_for(lambda: alert in prometheus.alerts(), alert, timeout)


def wait_until_clear(prometheus: Prometheus, alert: str, timeout: float = 150) -> float:
    return wait_for(lambda: alert not in prometheus.alerts(), f"end of {alert}", timeout)


def test_the_servers_count_what_the_clients_count(
    observed: Namespace, gateway: Gateway, image: bytes, prometheus: Prometheus
) -> None:
    (pod,) = observed.ready_pods()
    requests = f'sum(cxr_requests_total{{pod="{pod}", method=~"predict|infer"}})'
    before = prometheus.value(requests)
    with Load(gateway, image) as load:
        time.sleep(20)
    for _ in range(5):
        assert gateway.rest("/v1/models/cxr:predict", b"no image").status == 400
    sent = load.requests + 5

    wait_for(lambda: prometheus.value(requests) - before >= sent, "the last scrape", 30)
    # Nothing comes after it: one scrape more says the same.
    time.sleep(6)
    assert prometheus.value(requests) - before == sent
    assert not load.failures
    report("counts", f"clients {sent}, servers {sent}")


def test_a_load_test_reconciles_with_prometheus(
    observed: Namespace, gateway: Gateway, tmp_path: Path
) -> None:
    done = loadtest(
        "run",
        f"--host=http://{gateway.address}",
        f"--host-header={gateway.host}",
        f"--prometheus={setting('CXR_E2E_PROMETHEUS_URL', 'URL of Prometheus, from here')}",
        f'--selector=namespace="{observed.name}"',
        "--shape=closed",
        *write_inputs(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = load_result(tmp_path / "out")
    counts = result.reconciliation
    assert counts is not None
    assert counts.sent == counts.counted > 5
    assert {series.group for series in result.server} == {"stages", "replicas", "queue", "memory"}


def ask_for(portal: Portal, image: bytes, seconds: float) -> None:
    """A job, a caller without a key, and predictions one after the other, through the portal."""
    upload = files(image)
    start = time.monotonic()
    with portal.http() as http:
        assert http.post("/v1/jobs", files=upload).status_code == 202
        stranger = {"Authorization": "Bearer cxr_000000000000_wrong"}
        assert http.post("/v1/predictions", files=upload, headers=stranger).status_code == 401
        while time.monotonic() - start < seconds:
            assert http.post("/v1/predictions", files=upload).status_code == 200


def test_every_panel_has_data(
    observed: Namespace, portal: Portal, gateway: Gateway, image: bytes, prometheus: Prometheus
) -> None:
    """Of every dashboard, as the chart has installed it, while requests come."""
    boards = runpy.run_path(str(CHART / "ci" / "dashboards.py"))["BOARDS"]
    events = {
        (board.name, panel.title): panel.events_only
        for board in boards
        for _, panels in board.rows
        for panel in panels
        if panel.events_only
    }
    names = {
        "$namespace": observed.name,
        "$service": observed.service,
        "${service}": observed.service,
        "$version": ".*",
        "$__rate_interval": "1m",
    }
    with Load(gateway, image):
        ask_for(portal, image, 30)
        for path in sorted((CHART / "files" / "dashboards").glob("*.json")):
            installed = observed.get("configmap", f"{observed.service}-{path.stem}")
            panels = json.loads(installed["data"][path.name])["panels"]
            panels = [panel for panel in panels if panel["type"] != "row"]
            empty = set()
            for panel in panels:
                for target in panel["targets"]:
                    query = target["expr"]
                    for name, value in names.items():
                        query = query.replace(name, value)
                    if not prometheus.query(query):
                        empty.add(panel["title"])
            excuses = {title: events.get((path.stem, title)) for title in sorted(empty)}
            only = "".join(f"; {title}: only {excuse}" for title, excuse in excuses.items())
            report(path.stem, f"panels with data {len(panels) - len(empty)} of {len(panels)}{only}")
            assert all(excuses.values()), path.stem


def test_recording_rules_have_values(
    observed: Namespace, portal: Portal, prometheus: Prometheus
) -> None:
    rules = observed.get("prometheusrule", observed.service)["spec"]["groups"]
    records = {rule["record"] for group in rules for rule in group["rules"] if "record" in rule}
    assert len(records) == 27
    for record in records:
        found = prometheus.query(f'{record}{{namespace="{observed.name}"}}')
        service = portal.name if record.startswith("cxr_portal:") else observed.service
        assert {item["metric"]["service"] for item in found} == {service}, record
    # The load above is one image, again and again.
    assert prometheus.alerts() <= {"CXRDrift"}


@pytest.mark.parametrize(
    "metric", ["cxr_request_duration_seconds", "cxr_portal_request_duration_seconds"]
)
def test_histograms_are_native_ones_too(
    observed: Namespace, portal: Portal, prometheus: Prometheus, metric: str
) -> None:
    with portal.http() as http:
        assert http.get("/v1/models").status_code == 200
    own = f'namespace="{observed.name}"'

    def same() -> bool:
        native = prometheus.value(f"histogram_count(sum({metric}{{{own}}}))")
        return native == prometheus.value(f"sum({metric}_count{{{own}}})") > 0

    wait_for(same, "the same counts in both", 60)


def test_other_images_than_in_training_are_an_alert(
    observed: Namespace, gateway: Gateway, image: bytes, prometheus: Prometheus
) -> None:
    with Load(gateway, image) as load:
        fired = wait_for_alert(prometheus, "CXRDrift")
        index = prometheus.value(f'max(cxr:drift_images:psi{{namespace="{observed.name}"}})')
    cleared = wait_until_clear(prometheus, "CXRDrift")
    assert not load.failures
    report("one image only", f"index {index:.1f}, alert after {fired:.0f} s, clear {cleared:.0f} s")


def test_killed_workers_are_an_alert(
    observed: Namespace, gateway: Gateway, image: bytes, prometheus: Prometheus
) -> None:
    kill = workers("os.kill(int(pid), signal.SIGKILL); break")
    with Load(gateway, image) as load:
        observed.execute("python", "-c", kill)
        fired = wait_for_alert(prometheus, "CXRWorkerRestarts")
    cleared = wait_until_clear(prometheus, "CXRWorkerRestarts")
    report(
        "worker killed",
        f"alert after {fired:.0f} s, clear {cleared:.0f} s later; {load.requests} requests, "
        f"{len(load.failures)} failures while this replica's worker came back",
    )
    assert gateway.predict(image)


def test_latency_is_an_alert(
    observed: Namespace, gateway: Gateway, image: bytes, prometheus: Prometheus
) -> None:
    """Workers that stand still for three seconds, again and again."""
    with Load(gateway, image) as load:
        start = time.monotonic()
        while "CXRLatencyBudgetBurn" not in prometheus.alerts():
            assert time.monotonic() - start < 120, "no alert"
            observed.execute("python", "-c", STUTTER)
        fired = time.monotonic() - start
    assert not load.failures
    with Load(gateway, image):
        cleared = wait_until_clear(prometheus, "CXRLatencyBudgetBurn")
    report("injected latency", f"alert after {fired:.0f} s, clear {cleared:.0f} s later")


def test_a_bad_model_is_an_alert(
    observed: Namespace, gateway: Gateway, image: bytes, prometheus: Prometheus, models: str
) -> None:
    with Load(gateway, image) as load:
        observed.upgrade(f"model.storageUri={models}/damaged")
        try:
            fired = wait_for_alert(prometheus, "CXRModelNotLoading")
        finally:
            observed.helm("rollback")
            observed.rolled_out()
        cleared = wait_until_clear(prometheus, "CXRModelNotLoading")
    report("bad model", f"alert after {fired:.0f} s, clear {cleared:.0f} s later")
    assert not load.failures


def test_a_service_that_is_away_is_an_alert_and_so_is_its_portal(
    observed: Namespace, portal: Portal, gateway: Gateway, image: bytes, prometheus: Prometheus
) -> None:
    alerts = {"CXRNoReadyReplica", "CXRPortalBreakerOpen", "CXRPortalBudgetBurn"}
    annotate = ("annotate", f"isvc/{observed.service}", "--overwrite")
    upload = files(image)
    with portal.http() as http:

        def firing() -> set[str]:
            """Those of them that fire, after one more request."""
            status = http.post("/v1/predictions", files=upload).status_code
            assert status == 200 or status >= 500
            return alerts & prometheus.alerts()

        observed.kubectl(*annotate, "serving.kserve.io/stop=true")
        try:
            fired = wait_for(lambda: firing() == alerts, f"{alerts}, all of them")
        finally:
            observed.kubectl(*annotate, "serving.kserve.io/stop=false")
            wait_for(observed.ready_pods, "replica", 180)
        cleared = wait_for(lambda: not firing(), f"end of {alerts}", 150)
        assert http.post("/v1/predictions", files=upload).status_code == 200
    report(
        "no replica",
        f"{', '.join(sorted(alerts))} after {fired:.0f} s, clear {cleared:.0f} s after it is back",
    )
    assert gateway.predict(image)
