from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.charts import Chart, find_helm


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Chart:
    folder = tmp_path_factory.mktemp("helm")
    return Chart(find_helm(folder), home=folder / "home")


@pytest.fixture
def values(tmp_path: Path) -> Callable[[dict[str, Any]], tuple[str, str]]:
    """Arguments that give these values."""

    def write(content: dict[str, Any]) -> tuple[str, str]:
        path = tmp_path / "values.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return "-f", str(path)

    return write
