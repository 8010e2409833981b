"""What those on call see of the service: metrics, rules, dashboards and alerts, live.

Windows are shortened by values, so that alerts fire and clear within a test.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cxr_loadtests.results import load_result
from support.chaos import STUTTER, workers
from support.charts import CHART
from support.cluster import Gateway, Load, Namespace, setting, wait_for
from support.figures import report
from support.loadtests import loadtest, write_inputs
from support.prometheus import Prometheus

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
            "modelNotLoading": {"window": "1m", "for": "5s"},
            "workerRestarts": {"window": "1m", "count": 1},
            "drift": {"window": "1m", "minimum": 20, "for": "0s"},
        },
    }
}
# Only after something went wrong, or with hardware that is not everywhere.
EVENTS = ("GPU utilisation", "GPU memory", "Alerts")


@pytest.fixture(scope="module")
def observed(
    installed: Namespace, tmp_path_factory: pytest.TempPathFactory, prometheus: Prometheus
) -> Iterator[Namespace]:
    """The installation with monitoring on; afterwards as it was."""
    values = tmp_path_factory.mktemp("values") / "monitoring.yaml"
    values.write_text(yaml.safe_dump(SHORT), encoding="utf-8")
    before = json.loads(installed.helm("status", "-o", "json"))["version"]
    installed.upgrade(flags=("-f", str(values)))
    installed.rolled_out()
    try:
        wait_for(lambda: prometheus.value('cxr_ready{namespace="cxr-e2e"}') == 1, "scrape", 120)
        yield installed
    finally:
        installed.helm("rollback", str(before))
        installed.rolled_out()


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


def test_every_panel_has_data(
    observed: Namespace, gateway: Gateway, image: bytes, prometheus: Prometheus
) -> None:
    """Of every dashboard, as the chart has installed it, while requests come."""
    names = {
        "$namespace": observed.name,
        "$service": observed.service,
        "$version": ".*",
        "$__rate_interval": "1m",
    }
    with Load(gateway, image):
        time.sleep(30)
        for path in sorted((CHART / "files" / "dashboards").glob("*.json")):
            if path.stem == "cxr-portal":
                continue  # there is none here
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
            report(path.stem, f"panels with data {len(panels) - len(empty)} of {len(panels)}")
            assert empty <= set(EVENTS), path.stem


def test_recording_rules_have_values(observed: Namespace, prometheus: Prometheus) -> None:
    rules = observed.get("prometheusrule", observed.service)["spec"]["groups"]
    records = {rule["record"] for group in rules for rule in group["rules"] if "record" in rule}
    assert len(records) == 18
    for record in records:
        found = prometheus.query(f'{record}{{namespace="{observed.name}"}}')
        assert {item["metric"]["service"] for item in found} == {observed.service}, record
    # The load above is one image, again and again.
    assert prometheus.alerts() <= {"CXRDrift"}


def test_histograms_are_native_ones_too(observed: Namespace, prometheus: Prometheus) -> None:
    own = f'cxr_request_duration_seconds{{namespace="{observed.name}"}}'
    native = prometheus.value(f"histogram_count(sum({own}))")
    assert native > 0
    classic = own.replace("seconds{", "seconds_count{")
    assert prometheus.value(f"sum({classic})") == native


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
