"""The TorchServe handler, with TorchServe's part played by a small stand-in."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cxr.engine import LOAD_ERROR_FILE_ENV, MAX_BYTES_ENV, MAX_PIXELS_ENV
from cxr.errors import ModelLoadError
from cxr_handlers.cxr_handler import CxrHandler
from support.bundles import LABELS, encoded_image, make_bundle


class Context:
    """As much of TorchServe's context as a handler uses."""

    def __init__(self, model_dir: Path) -> None:
        self.system_properties = {"model_dir": str(model_dir)}
        self.headers: dict[str, str] = {}
        self.statuses: dict[int, int] = {}
        self.content_types: dict[int, str] = {}

    def get_all_request_header(self, idx: int) -> dict[str, object]:  # noqa: ARG002
        return {"body": {"content-type": "application/octet-stream"}, **self.headers}

    def set_response_status(self, code: int, idx: int) -> None:
        self.statuses[idx] = code

    def set_response_content_type(self, request_id: int, value: str) -> None:
        self.content_types[request_id] = value


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(make_bundle(tmp_path / "bundle"))


# What of an answer says how it was made.
HOW = ("seconds", "batch", "provider")


def handle(context: Context, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    handler = CxrHandler()
    handler.initialize(context)
    return [json.loads(text) for text in handler.handle(rows, context)]


def untimed(answer: dict[str, Any]) -> dict[str, Any]:
    """What of an answer is the same the next time."""
    return {name: value for name, value in answer.items() if name not in HOW}


@pytest.mark.parametrize("field", ["body", "data"])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_answers_an_image(context: Context, field: str, kind: type) -> None:
    (answer,) = handle(context, {field: kind(encoded_image())})
    assert list(answer) == ["label", "probabilities", "positive", "decisions", *HOW]
    assert (answer["batch"], answer["provider"]) == (1, "CPUExecutionProvider")
    assert tuple(answer["probabilities"]) == LABELS
    assert all(0 <= spent < 60 for spent in answer["seconds"].values())
    assert context.content_types == {0: "application/json"}
    assert context.statuses == {}


@pytest.mark.parametrize("options", ['{"explain": 3}', "[]", "no JSON"])
def test_options_that_cannot_be_read_are_as_none(context: Context, options: str) -> None:
    (expected,) = handle(context, {"body": encoded_image()})
    context.headers["x-cxr-options"] = options
    (answer,) = handle(context, {"body": encoded_image()})
    assert untimed(answer) == untimed(expected)


def test_a_bad_image_sets_its_own_status_only(context: Context) -> None:
    image = encoded_image()
    answers = handle(context, {"body": image}, {"body": b"GIF89a"}, {"body": image}, {"body": b""})
    assert untimed(answers[0]) == untimed(answers[2])
    assert answers[1]["reason"] == "unsupported_format"
    assert "GIF" in answers[1]["error"]
    assert answers[3]["reason"] == "empty"
    assert context.statuses == {1: 415, 3: 400}
    assert set(context.content_types.values()) == {"application/json"}


@pytest.mark.parametrize("row", [{"body": {"parsed": "json"}}, {"body": "text"}, {}])
def test_what_is_no_image_is_refused(context: Context, row: dict[str, Any]) -> None:
    (answer,) = handle(context, row)
    assert answer["reason"] in ("not_an_image", "empty")
    assert context.statuses == {0: 400}


@pytest.mark.parametrize(
    ("variable", "reason"), [(MAX_BYTES_ENV, "too_many_bytes"), (MAX_PIXELS_ENV, "too_many_pixels")]
)
def test_limits_come_from_the_environment(
    context: Context, monkeypatch: pytest.MonkeyPatch, variable: str, reason: str
) -> None:
    # The 64 x 64 warm-up image has to pass.
    monkeypatch.setenv(variable, "4096")
    (answer,) = handle(context, {"body": encoded_image(size=(300, 300))})
    assert answer["reason"] == reason
    assert context.statuses == {0: 413}


def test_a_broken_bundle_fails_the_worker_and_says_why(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "load-error"
    monkeypatch.setenv(LOAD_ERROR_FILE_ENV, str(note))
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match="damaged"):
        CxrHandler().initialize(context)
    assert note.read_text(encoding="utf-8").startswith("ModelLoadError: model.onnx is damaged")


def test_a_request_is_no_line_of_the_log(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    """TorchServe's worker writes one for each; whatever else it writes stays."""
    handle(context, {"body": encoded_image()})
    with caplog.at_level(logging.INFO):
        logging.info("Backend received inference at: %d", 1)
        logging.info("Torch worker started.")
    assert caplog.messages == ["Torch worker started."]
