"""The gateway as an AWS Lambda function, with events of API Gateway."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from integration.portal.test_portal_api import GOOD
from support.portals import environment, files
from support.servers import Server

# What runs in AWS: a fresh process with the environment's settings, called once per event.
HOST = """
import json, sys
from cxr_portal.aws_lambda import handler
for event in json.load(sys.stdin):
    print(json.dumps(handler(event, None)))
"""


def event(method: str, path: str, body: bytes = b"", **headers: str) -> dict[str, Any]:
    """An event of an HTTP API, payload format 2.0."""
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {"host": "abc.execute-api.eu-central-1.amazonaws.com"} | headers,
        "requestContext": {
            "accountId": "1",
            "apiId": "abc",
            "domainName": "abc.execute-api.eu-central-1.amazonaws.com",
            "domainPrefix": "abc",
            "http": {
                "method": method,
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": "192.0.2.1",
                "userAgent": "test",
            },
            "requestId": "id",
            "routeKey": "$default",
            "stage": "$default",
            "time": "12/Mar/2026:19:03:58 +0000",
            "timeEpoch": 1583348638390,
        },
        "body": base64.b64encode(body).decode(),
        "isBase64Encoded": True,
    }


@pytest.fixture(scope="module")
def answers(model: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    form = httpx.Request("POST", "http://portal/v1/predictions", files=files(GOOD))
    form_type = form.headers["content-type"]
    calls = {
        "models": event("GET", "/v1/models"),
        "predict": event("POST", "/v1/predictions", form.read(), **{"content-type": form_type}),
        "again": event("POST", "/v1/predictions", form.read(), **{"content-type": form_type}),
        "refused": event("POST", "/v1/predictions", b"no form"),
        "jobs": event("POST", "/v1/jobs", form.read(), **{"content-type": form_type}),
    }
    database = tmp_path_factory.mktemp("lambda") / "portal.db"
    done = subprocess.run(
        [sys.executable, "-c", HOST],
        input=json.dumps(list(calls.values())),
        env=environment(
            CXR_PORTAL_SERVER=model.grpc,
            CXR_PORTAL_AUTH="none",
            CXR_PORTAL_DATABASE=f"sqlite:///{database}",
        ),
        cwd=Path(database).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(calls, lines, strict=True))


def test_predictions(answers: dict[str, Any], http: httpx.Client) -> None:
    expected = http.post("/v1/predictions", files=files(GOOD)).json()["images"]
    for name in ("predict", "again"):
        answer = answers[name]
        assert answer["statusCode"] == 200, answer
        assert not answer["isBase64Encoded"]
        assert json.loads(answer["body"])["images"] == expected


def test_models(answers: dict[str, Any]) -> None:
    (model,) = json.loads(answers["models"]["body"])["models"]
    assert model["name"] == "cxr"


def test_problems(answers: dict[str, Any]) -> None:
    refused = answers["refused"]
    assert refused["statusCode"] == 415
    assert refused["headers"]["content-type"] == "application/problem+json"
    assert "multipart/form-data" in json.loads(refused["body"])["detail"]


def test_there_are_no_jobs(answers: dict[str, Any]) -> None:
    assert answers["jobs"]["statusCode"] == 503
    assert "does not offer jobs" in json.loads(answers["jobs"]["body"])["detail"]
