import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.charts import Chart, find_helm

Promtool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def promtool() -> Promtool:
    """Prometheus' own tool, from the PATH."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [os.environ.get("PROMTOOL", "promtool"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def rules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rules that the chart makes where everything is on."""
    folder = tmp_path_factory.mktemp("helm")
    chart = Chart(find_helm(folder), home=folder / "home")
    values = folder / "values.yaml"
    settings = {
        "monitoring": {"podMonitor": {"enabled": True}, "rules": {"enabled": True}},
        "scaling": {
            "type": "keda",
            "maxReplicas": 3,
            "keda": {"serverAddress": "http://prometheus:9090"},
        },
        "portal": {"enabled": True, "host": "viewer.example.org"},
        "routing": {"type": "gateway", "host": "cxr.example.org"}
        | {"gateway": {"parentRefs": [{"name": "public"}]}},
    }
    values.write_text(yaml.safe_dump(settings), encoding="utf-8")
    spec: dict[str, Any] = chart.objects("-f", str(values))["PrometheusRule", "cxr-cxr-serve"]
    return dict(spec["spec"])


@pytest.fixture(scope="session")
def rules_file(rules: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(rules), encoding="utf-8")
    return path
