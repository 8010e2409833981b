"""BentoML: one worker per core, the image as a multipart file."""

import json
from pathlib import Path
from typing import Any

import bentoml
from common import WORKERS, answer, load_engine


@bentoml.service(
    workers=WORKERS, threads=1, metrics={"enabled": False}, logging={"access": {"enabled": False}}
)
class Cxr:
    """One model in one worker process."""

    def __init__(self) -> None:
        self.engine = load_engine()

    @bentoml.api
    def predict(self, image: Path) -> dict[str, Any]:
        answered: dict[str, Any] = json.loads(answer(self.engine, image.read_bytes()))
        return answered
