from typing import Any

import pytest

from support.figures import figures


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist, refuse tests of one id: only one of them would run."""
    ids = [item.nodeid for item in items]
    if hasattr(config, "workerinput") and len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise pytest.UsageError(f"Several tests are called {twice}; run them without -n.")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With pytest-xdist, hand the figures to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = figures


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    figures.extend(getattr(node, "workeroutput", {}).get("figures", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures:
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)
