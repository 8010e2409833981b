"""The TorchServe handler, with TorchServe's part played by a small stand-in."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cxr.answer import BOARD_FILE_ENV, BOARD_HEADER, OnBoard, Options
from cxr.engine import LOAD_ERROR_FILE_ENV, MAX_BYTES_ENV, MAX_PIXELS_ENV, Engine
from cxr.errors import ModelLoadError
from cxr_handlers.cxr_handler import CxrHandler
from support.bundles import LABELS, encoded_image, make_bundle


class Context:
    """As much of TorchServe's context as a handler uses."""

    def __init__(self, model_dir: Path) -> None:
        self.system_properties: dict[str, Any] = {"model_dir": str(model_dir)}
        self.headers: dict[str, str] = {}
        self.statuses: dict[int, int] = {}
        self.content_types: dict[int, str] = {}
        self.response_headers: dict[str, str] = {}

    def get_all_request_header(self, idx: int) -> dict[str, object]:  # noqa: ARG002
        return {"body": {"content-type": "application/octet-stream"}, **self.headers}

    def set_response_status(self, code: int, idx: int) -> None:
        self.statuses[idx] = code

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        assert idx == 0
        self.response_headers[key] = value

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


class TestBoard:
    """Several images in shared memory, as the server in front of TorchServe sends them."""

    @pytest.fixture
    def board(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "board"
        path.write_bytes(bytes(100_000))
        monkeypatch.setenv(BOARD_FILE_ENV, str(path))
        return path

    def several(self, context: Context, board: Path, *images: bytes) -> Any:
        with board.open("r+b") as file:
            file.seek(10)
            file.write(b"".join(images))
        sizes = tuple(len(image) for image in images)
        options = (Options(), Options(quality=False), *[Options()] * (len(images) - 2))
        header = OnBoard(at=5, start=10, sizes=sizes, options=options).to_json()
        context.headers[BOARD_HEADER.lower()] = header
        (answer,) = handle(context, {"body": bytearray(b"-")})
        return answer

    def test_each_is_answered_as_if_alone(self, context: Context, board: Path) -> None:
        images = [encoded_image(60), b"GIF89a", b"", encoded_image(180)]
        alone = [handle(context, {"body": image})[0] for image in images]
        answers = self.several(context, board, *images)
        assert list(map(untimed, answers)) == list(map(untimed, alone))
        assert board.read_bytes()[:10] == bytes([0, 0, 0, 0, 0, 4, 0, 0, 0, 0])
        assert context.response_headers == {BOARD_HEADER: "1"}

    def test_nobody_waits_for_one_of_them(self, context: Context, board: Path) -> None:
        board.write_bytes(bytes([0, 0, 0, 0, 0, 0, 0, 1, 0, 0]) + bytes(100_000))
        first, second, third = self.several(context, board, *[encoded_image()] * 3)
        assert second is None
        assert first["label"] == third["label"]

    def test_one_that_fails_harms_no_other(
        self,
        context: Context,
        board: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        predict = Engine.predict

        def fragile(self: Engine, images: Sequence[bytes], options: Any = None) -> Any:
            if b"secret" in images:
                raise ValueError(images)
            return predict(self, images, options)

        monkeypatch.setattr(Engine, "predict", fragile)
        first, second, third = self.several(
            context, board, encoded_image(), b"secret", encoded_image()
        )
        assert second is None
        assert first["label"] == third["label"]
        assert "the handler failed: ValueError at cxr_handler.py:" in caplog.text
        assert "secret" not in caplog.text

    def test_a_worker_of_another_server_says_nothing_of_it(self, context: Context) -> None:
        handle(context, {"body": encoded_image()})
        assert context.response_headers == {}

    def test_nor_does_one_that_takes_batches(self, context: Context, board: Path) -> None:
        assert board.is_file()
        context.system_properties["batch_size"] = 8
        handle(context, {"body": encoded_image()})
        assert context.response_headers == {}
