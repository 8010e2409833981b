"""Alerts and recording rules, as the one who is paged would notice them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from cxr.context import INFERENCE
from cxr_server.metrics import BUCKETS
from support.charts import CHART, Chart, Objects
from support.metrics import asked, known

RUNBOOKS = CHART.parents[1] / "docs" / "runbooks"
ALERTS = {path.stem for path in (CHART / "files" / "alerts").glob("*.yaml")}
SECTIONS = ["Meaning", "Impact", "Diagnosis", "Mitigation"]
ON: dict[str, Any] = {"monitoring": {"rules": {"enabled": True}}, "portal": {"enabled": True}}
Values = Callable[[dict[str, Any]], tuple[str, str]]


def rules(objects: Objects, group: str, name: str = "cxr-cxr-serve") -> list[dict[str, Any]]:
    groups = objects["PrometheusRule", name]["spec"]["groups"]
    (found,) = [item["rules"] for item in groups if item["name"] == f"{name}.{group}"]
    return list(found)


@pytest.fixture
def alerts(chart: Chart, values: Values) -> list[dict[str, Any]]:
    scaled = {"scaling": {"type": "hpa"}, "resources": {"requests": {"cpu": 1}}}
    return rules(chart.objects(*values(ON | scaled)), "alerts")


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == ALERTS
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.stem}\n")
        assert re.findall("^## (.*)$", text, re.MULTILINE) == SECTIONS
        for link in re.findall(r"\]\(([^)]*)\)", text):
            assert (RUNBOOKS / link).is_file(), f"{path.name}: {link}"


def test_an_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on(
    alerts: list[dict[str, Any]],
) -> None:
    assert {alert["alert"] for alert in alerts} == ALERTS
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        texts = alert["annotations"]
        assert texts.keys() == {"summary", "description", "runbook_url"}
        assert texts["runbook_url"] == f"docs/runbooks/{alert['alert']}.md"
        assert "$value" in texts["description"] or re.search(r"\d", texts["description"])
        assert not re.search(r"\[\[|\]\]", str(alert)), "a brace that was not replaced"


def test_rules_ask_for_metrics_that_exist(chart: Chart, values: Values) -> None:
    objects = chart.objects(*values(ON))
    recorded = rules(objects, "rules")
    names = known() | {rule["record"] for rule in recorded}
    for rule in recorded + rules(objects, "alerts"):
        assert asked(rule["expr"]), rule
        assert asked(rule["expr"]) <= names, rule


def test_the_latency_objective_is_a_bound_of_the_histogram() -> None:
    """Any other would match no bucket, and never alert."""
    schema = yaml.safe_load((CHART / "values.schema.json").read_text(encoding="utf-8"))
    slo = schema["properties"]["monitoring"]["properties"]["slo"]["properties"]
    assert set(slo["latencySeconds"]["enum"]) <= set(BUCKETS)


def test_objectives_are_about_the_requests_for_an_answer(chart: Chart, values: Values) -> None:
    recorded = rules(chart.objects(*values(ON)), "rules")
    (methods,) = {re.search('method=~"(.*?)"', rule["expr"])[1] for rule in recorded[:3]}
    assert set(methods.split("|")) == INFERENCE


def test_without_a_portal_nothing_is_asked_about_it(chart: Chart, values: Values) -> None:
    objects = chart.objects(*values({"monitoring": ON["monitoring"]}))
    text = str(rules(objects, "rules") + rules(objects, "alerts"))
    assert "portal" not in text.lower()


def test_rules_are_off_until_asked_for(chart: Chart) -> None:
    assert not [name for kind, name in chart.objects() if kind == "PrometheusRule"]


def test_values_reach_the_rules(chart: Chart) -> None:
    objects = chart.objects("-f", str(CHART / "ci" / "lint-values.yaml"))
    own = rules(objects, "alerts", "chest-service")
    assert {alert["alert"] for alert in own} == ALERTS - {"CXRColdStartSlow"}
    assert {alert["labels"]["team"] for alert in own} == {"imaging"}
    assert own[0]["annotations"]["runbook_url"].startswith("https://runbooks.example.org/cxr/CXR")
    (burn,) = [alert for alert in own if alert["alert"] == "CXRAvailabilityBudgetBurn"]
    assert "ratio30m{" in burn["expr"]
    assert "> 0.1\n" in burn["expr"], "10 times what 0.99 allows"
    records = {rule["record"] for rule in rules(objects, "rules", "chest-service")}
    assert {name for name in records if "availability" in name} == {
        f"{prefix}:availability_errors:ratio{window}"
        for prefix in ("cxr", "cxr_portal")
        for window in ("7d", "30m", "2m")
    }
    # It may sleep, so that no pods is no alert; the portal never does.
    assert [alert["alert"] for alert in own if "absent" in str(alert)] == ["CXRPortalDown"]


def test_no_pods_at_all_is_an_alert(alerts: list[dict[str, Any]]) -> None:
    for name in ("CXRNoReadyReplica", "CXRScrapeMissing", "CXRPortalDown"):
        (alert,) = [item for item in alerts if item["alert"] == name]
        assert "absent" in alert["expr"]


def test_pods_are_told_apart_by_their_service(chart: Chart, values: Values) -> None:
    monitored = values({"monitoring": {"podMonitor": {"enabled": True}}})
    monitor = chart.objects(*monitored)["PodMonitor", "cxr-cxr-serve"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert [item["targetLabel"] for item in endpoint["relabelings"]] == ["service"]


def test_an_unknown_threshold_is_refused(chart: Chart, values: Values) -> None:
    wrong = {"monitoring": {"thresholds": {"noReadyReplica": {"forr": "1m"}}}}
    assert "forr" in chart.refusal(*values(wrong))
