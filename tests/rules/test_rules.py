"""Each alert, evaluated by Prometheus' own rule tests: where it fires, and where it must not.

`cases/ALERT.yaml` has promtool's `tests`; what they share is added here.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from support.charts import CHART
from support.figures import report

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
ALERTS = sorted(path.stem for path in (CHART / "files" / "alerts").glob("*.yaml"))


def test_the_rules_are_valid(promtool: Any, rules_file: Path) -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(rules_file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_cases() -> None:
    assert [path.stem for path in CASES] == ALERTS


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_alert(path: Path, promtool: Any, rules_file: Path, tmp_path: Path) -> None:
    tests = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = [bool(case["exp_alerts"]) for test in tests for case in test["alert_rule_test"]]
    assert set(expected) == {True, False}, "one case that fires and one that does not"
    for test in tests:
        test["interval"] = "1m"
        for case in test["alert_rule_test"]:
            case["alertname"] = path.stem
            for alert in case["exp_alerts"]:
                runbook = f"docs/runbooks/{path.stem}.md"
                alert["exp_annotations"]["runbook_url"] = runbook
    document = {"rule_files": [str(rules_file)], "evaluation_interval": "1m", "tests": tests}
    written = tmp_path / path.name
    written.write_text(yaml.safe_dump(document), encoding="utf-8")
    done = promtool("test", "rules", str(written))
    assert done.returncode == 0, done.stdout + done.stderr
    report(path.stem, f"fires in {sum(expected)} of {len(expected)} cases, as it should")
