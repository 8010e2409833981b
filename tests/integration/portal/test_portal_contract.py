"""The gateway keeps what its OpenAPI document promises, whatever it is sent."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS

from cxr_portal.app import create_app
from cxr_portal.settings import Settings
from integration.portal.test_portal_api import GOOD
from support.portals import Portal, files, portal
from support.servers import Server

# Which bytes are an image, the document cannot say.
_CHECKS = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]


@pytest.fixture(scope="module")
def fuzzed(model: Server) -> Iterator[tuple[Portal, str]]:
    """A gateway that asks who calls, and a key."""
    with portal(
        f"--server={model.grpc}",
        "--auth=required",
        "--images-per-minute=100000",
        "--max-active-jobs=100000",
    ) as running:
        yield running, running.key()


schema = schemathesis.openapi.from_dict(create_app(Settings()).openapi())


@schema.parametrize()
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_every_answer_is_as_documented(case: Any, fuzzed: tuple[Portal, str]) -> None:
    running, key = fuzzed
    headers = {"Authorization": f"Bearer {key}"}
    case.call_and_validate(base_url=running.url, headers=headers, checks=_CHECKS)


def test_nothing_unexpected_happened(fuzzed: tuple[Portal, str]) -> None:
    running, key = fuzzed
    with running.http(key) as http:
        assert http.post("/v1/predictions", files=files(GOOD)).status_code == 200
    assert "unexpected" not in running.log
    failed = [line for line in running.metrics.splitlines() if 'code="500"' in line]
    assert {line.split()[-1] for line in failed} == {"0.0"}
