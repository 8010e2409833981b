"""What those on call see of the service: metrics, rules, dashboards and alerts, live.

Windows are shortened by values, so that alerts fire and clear within a test.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import urllib3
import yaml

from support.charts import CHART
from support.cluster import Gateway, Load, Namespace, setting, wait_for
from support.figures import report

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


class Prometheus:
    """The cluster's, from here."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool = urllib3.PoolManager(retries=3)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What a query gives now: labels under `metric`, the number under `value`."""
        response = self._pool.request(
            "POST", f"{self._url}/api/v1/query", fields={"query": expression}
        )
        assert response.status == 200, f"{expression}\n{response.data[:500]!r}"
        found: list[dict[str, Any]] = response.json()["data"]["result"]
        return found

    def value(self, expression: str) -> float:
        """The one number of a query; NaN where there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else float("nan")

    def alerts(self) -> set[str]:
        """Names of the alerts that fire."""
        firing = self.query('ALERTS{namespace="cxr-e2e", alertstate="firing"}')
        return {item["metric"]["alertname"] for item in firing}


@pytest.fixture(scope="module")
def prometheus() -> Prometheus:
    return Prometheus(setting("CXR_E2E_PROMETHEUS_URL", "URL of Prometheus, from here"))


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
    stutter = (
        workers("stopped.append(int(pid)); os.kill(int(pid), signal.SIGSTOP)")
        + "time.sleep(3.5)\n"
        + "for pid in stopped: os.kill(pid, signal.SIGCONT)\n"
    )
    with Load(gateway, image) as load:
        start = time.monotonic()
        while "CXRLatencyBudgetBurn" not in prometheus.alerts():
            assert time.monotonic() - start < 120, "no alert"
            observed.execute("python", "-c", stutter)
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


def workers(action: str) -> str:
    """A program that does something to each process that runs the model."""
    marks = ("model_service_worker", "cxr_server/worker.py")
    return (
        "import os, pathlib, signal, time\n"
        "stopped = []\n"
        "for folder in pathlib.Path('/proc').glob('[0-9]*'):\n"
        "    pid = folder.name\n"
        "    if int(pid) == os.getpid(): continue\n"
        "    try: command = (folder / 'cmdline').read_bytes().decode()\n"
        "    except OSError: continue\n"
        f"    if any(mark in command for mark in {marks}):\n"
        f"        {action}\n"
    )
