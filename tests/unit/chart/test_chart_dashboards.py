"""The Grafana dashboards, as far as they can be judged without data."""

import json
import re
import runpy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from support.charts import CHART, Chart
from support.metrics import asked, known

FILES = sorted((CHART / "files" / "dashboards").glob("*.json"))
ON: dict[str, Any] = {
    "monitoring": {"dashboards": {"enabled": True}},
    "portal": {"enabled": True},
}

Values = Callable[[dict[str, Any]], tuple[str, str]]


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (panel for panel in dashboard["panels"] if panel["type"] != "row")


@pytest.fixture
def rendered(chart: Chart, values: Values) -> dict[str, dict[str, Any]]:
    """What Grafana reads, by the file's name."""
    found = {}
    for (kind, _), item in chart.objects(*values(ON)).items():
        if kind == "ConfigMap" and item["metadata"]["labels"].get("grafana_dashboard") == "1":
            ((name, text),) = item["data"].items()
            found[name] = json.loads(text)
    return found


def test_the_files_are_what_the_code_makes() -> None:
    texts = runpy.run_path(str(CHART / "ci" / "dashboards.py"))["texts"]()
    assert {path.name: path.read_text(encoding="utf-8") for path in FILES} == texts


def test_all_are_there(rendered: dict[str, dict[str, Any]]) -> None:
    assert rendered.keys() == {path.name for path in FILES}
    assert len(rendered) == 6
    assert len({dashboard["uid"] for dashboard in rendered.values()}) == len(rendered)


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_a_dashboard(name: str, rendered: dict[str, dict[str, Any]]) -> None:
    dashboard = rendered[name]
    # Through Grafana's own schema and back, nothing is lost.
    again = json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))
    assert again == dashboard
    assert not re.search("__[A-Z_]+__", json.dumps(dashboard)), "a value that was not put in"
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables == ["datasource", "namespace", "service", "version"]
    assert {link["type"] for link in dashboard["links"]} == {"dashboards", "link"}
    assert dashboard["description"]
    recorded = {"cxr:requests:increase30d", "cxr:requests_failed:increase30d"}
    recorded |= {name.replace("cxr:", "cxr_portal:") for name in recorded}
    recorded |= {"cxr:requests_slow:increase30d", "cxr:drift_images:ratio", "cxr:drift_images:psi"}
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)
    for panel in panels(dashboard):
        assert panel["description"], panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"]
        assert defaults["noValue"]
        assert defaults["thresholds"]["steps"][0]["value"] is None
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            if not target["expr"].startswith("vector("):
                assert asked(target["expr"]) <= known() | recorded, panel["title"]
                assert 'namespace="$namespace"' in target["expr"]
        for runbook in re.findall(r"runbooks/(\w+)\.md", panel["description"]):
            assert (CHART / "files" / "alerts" / f"{runbook}.yaml").is_file()


def test_without_a_portal_it_has_no_dashboard(chart: Chart, values: Values) -> None:
    names = {name for _, name in chart.objects(*values({"monitoring": ON["monitoring"]}))}
    assert "cxr-cxr-serve-cxr-overview" in names
    assert "cxr-cxr-serve-cxr-portal" not in names


def test_thresholds_are_the_chart_s(chart: Chart, values: Values) -> None:
    own = {
        "monitoring": {
            "dashboards": {"enabled": True},
            "slo": {"availability": 0.9, "period": "7d"},
            "thresholds": {"memoryNearLimit": {"ratio": 0.7}},
        }
    }
    texts = [
        text
        for (kind, _), item in chart.objects(*values(own)).items()
        if kind == "ConfigMap"
        for name, text in item["data"].items()
        if name.endswith(".json")
    ]
    by_title = {panel["title"]: panel for text in texts for panel in panels(json.loads(text))}

    def steps(title: str) -> list[Any]:
        found = by_title[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        return [step["value"] for step in found]

    assert steps("Memory of the container") == [None, 0.7]
    assert steps("Failed requests") == [None, 0.1]
    (target,) = by_title["Availability budget left"]["targets"]
    assert "cxr:requests_failed:increase7d" in target["expr"]
    assert "(1 - 0.9)" in target["expr"]


def test_dashboards_are_off_until_asked_for(chart: Chart) -> None:
    assert not [name for kind, name in chart.objects() if "cxr-overview" in name]
