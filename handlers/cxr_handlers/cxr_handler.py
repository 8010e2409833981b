"""TorchServe handler for chest radiographs.

It only carries bytes to :class:`cxr.engine.Engine`; decoding, preprocessing and the decision live
there. One request is one encoded image in the body, and what else is wanted of it in the header
`X-CXR-Options`; the answer is one JSON object.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr.answer import OPTIONS_HEADER, Options, answer_to_json
from cxr.decode import DecodeLimits
from cxr.engine import (
    LOAD_ERROR_FILE_ENV,
    MAX_BYTES_ENV,
    MAX_PIXELS_ENV,
    THREADS_ENV,
    Engine,
)
from cxr.errors import BadImageError


class CxrHandler:
    """Loads the model once per worker and answers its requests."""

    engine: Engine

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
            One JSON object per request, as :func:`cxr.answer.answer_to_json` writes it.
        """
        options = [_options(context.get_all_request_header(index)) for index in range(len(rows))]
        answers = self.engine.predict([_body(row) for row in rows], options)
        texts = []
        for index, answer in enumerate(answers):
            if isinstance(answer, BadImageError):
                context.set_response_status(code=answer.reason.http_status, idx=index)
            context.set_response_content_type(index, "application/json")
            texts.append(answer_to_json(answer))
        return texts


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
    for name, value in headers.items():
        if name.lower() == OPTIONS_HEADER.lower():
            try:
                return Options.from_json(str(value))
            except ValueError:
                break
    return Options()
