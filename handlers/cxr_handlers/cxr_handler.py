"""TorchServe handler for chest radiographs.

It only carries bytes to :class:`cxr.engine.Engine`; decoding, preprocessing and the decision live
there. One request is one encoded image in the body, and what else is wanted of it in the header
`X-CXR-Options`; the answer is one JSON object. The server in front of TorchServe may also have its
images, several in one request, in memory that it shares: see :class:`cxr.answer.OnBoard`.
"""

import logging
import mmap
import os
import signal
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr.answer import (
    BOARD_FILE_ENV,
    BOARD_HEADER,
    OPTIONS_HEADER,
    OnBoard,
    Options,
    answer_to_json,
)
from cxr.decode import DecodeLimits
from cxr.engine import (
    LOAD_ERROR_FILE_ENV,
    MAX_BYTES_ENV,
    MAX_PIXELS_ENV,
    THREADS_ENV,
    WORKER_LOG,
    Engine,
)
from cxr.errors import BadImageError

log = logging.getLogger(__name__)


class CxrHandler:
    """Loads the model once per worker and answers its requests."""

    engine: Engine
    _board: mmap.mmap | None = None

    def initialize(self, context: Any) -> None:
        """Load the model and answer a warm-up image.

        Raises:
            ModelLoadError: the archive does not fit together; TorchServe fails the worker. The
                reason also goes to the file named by `CXR_LOAD_ERROR_FILE`, for the process that
                watches over TorchServe.
        """
        try:
            self.engine = Engine(
                Path(context.system_properties["model_dir"]),
                threads=int(os.environ.get(THREADS_ENV, "1")),
                limits=_limits(os.environ),
            )
            self.engine.warm_up()
            # A batch has room for all that wait already.
            if context.system_properties.get("batch_size", 1) == 1:
                self._board = _board(os.environ)
            logging.getLogger().addFilter(_worth_a_line)
        except BaseException as error:
            if path := os.environ.get(LOAD_ERROR_FILE_ENV):
                Path(path).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            raise

    def handle(self, rows: Sequence[Mapping[str, Any]], context: Any) -> list[str]:
        """Answer a batch.

        Args:
            rows: one mapping per request with the body under `body` or `data`.
            context: TorchServe's context; a bad image sets its own request's status only.

        Returns:
            One JSON object per request, as :func:`cxr.answer.answer_to_json` writes it; or an array
            of them for a request whose images are on the board.
        """
        headers = [context.get_all_request_header(index) for index in range(len(rows))]
        if self._board is not None:
            context.set_response_header(0, BOARD_HEADER, "1")
            if on_board := _header(headers[0], BOARD_HEADER):
                return [self._answer_board(OnBoard.from_json(on_board), self._board)]
        options = [_options(one) for one in headers]
        texts = []
        try:
            answers = self.engine.predict([_body(row) for row in rows], options)
            for index, answer in enumerate(answers):
                if isinstance(answer, BadImageError):
                    context.set_response_status(code=answer.reason.http_status, idx=index)
                context.set_response_content_type(index, "application/json")
                texts.append(answer_to_json(answer))
        except Exception as error:
            self._failed(error)
            raise
        return texts

    def _answer_board(self, given: OnBoard, board: mmap.mmap) -> str:
        """Answer images one after the other: on a processor, that is no slower than a batch."""
        texts, start = [], given.start
        for place, (size, options) in enumerate(zip(given.sizes, given.options, strict=True), 1):
            image = board[start : start + size]
            start += size
            board[given.at] = place
            if board[given.at + place]:
                texts.append("null")
                continue
            try:
                texts.append(answer_to_json(self.engine.predict([image], [options])[0]))
            except Exception as error:
                self._failed(error)
                texts.append("null")
        return f"[{','.join(texts)}]"

    def _failed(self, error: Exception) -> None:
        """Tell where, and end this worker if it cannot answer its warm-up image any more.

        As where its GPU is lost: another worker is started then. It ends like one that was killed,
        which is not held against its images.
        """
        # Neither the error's message nor lines of code: they might quote the image.
        frames = traceback.extract_tb(error.__traceback__)
        where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        log.error("%sthe handler failed: %s at %s", WORKER_LOG, type(error).__name__, where)
        try:
            self.engine.warm_up()
        except Exception:
            log.critical("%sthe warm-up image fails, too; the worker ends", WORKER_LOG)
            os.kill(os.getpid(), signal.SIGKILL)


def _worth_a_line(record: logging.LogRecord) -> bool:
    """TorchServe's worker tells of each request; Java would read the line, and drop it."""
    return not str(record.msg).startswith("Backend received inference")


def _limits(environment: Mapping[str, str]) -> DecodeLimits:
    given = {
        "max_bytes": environment.get(MAX_BYTES_ENV),
        "max_pixels": environment.get(MAX_PIXELS_ENV),
    }
    return DecodeLimits(**{name: int(value) for name, value in given.items() if value})


def _body(row: Mapping[str, Any]) -> bytes:
    """The encoded image; TorchServe has already parsed a JSON body, which is no image."""
    body = row.get("body", row.get("data", b""))
    return bytes(body) if isinstance(body, (bytes, bytearray)) else str(body).encode()


def _options(headers: Mapping[str, object]) -> Options:
    """What the request's header asks for; without one that can be read, the defaults."""
    try:
        return Options.from_json(_header(headers, OPTIONS_HEADER))
    except ValueError:
        return Options()


def _header(headers: Mapping[str, object], name: str) -> str:
    """A header's value; empty where it is missing."""
    wanted = name.lower()
    return next((str(value) for key, value in headers.items() if key.lower() == wanted), "")


def _board(environment: Mapping[str, str]) -> mmap.mmap | None:
    """The memory shared with the server in front of TorchServe; none without one."""
    if not (path := environment.get(BOARD_FILE_ENV)):
        return None
    with Path(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)
