"""portal/web/openapi.json, which clients' types are made of, is the gateway's own."""

import json
from pathlib import Path

from cxr_portal.app import create_app
from cxr_portal.settings import Settings

DOCUMENT = Path(__file__).parents[2] / "portal" / "web" / "openapi.json"


def test_the_document_is_up_to_date() -> None:
    expected = create_app(Settings()).openapi()
    assert json.loads(DOCUMENT.read_text(encoding="utf-8")) == expected, "run `make openapi`"


def test_every_operation_says_what_it_answers_and_what_can_go_wrong() -> None:
    for path, operations in create_app(Settings()).openapi()["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            if path.startswith("/v1/"):
                assert "application/problem+json" in operation["responses"]["401"]["content"]
