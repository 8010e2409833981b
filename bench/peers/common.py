"""What the peers' servers share: the engine of the archive, so that the work is the same.

`cxr` is the copy inside the unpacked archive, which is on PYTHONPATH; no peer has this project
installed.
"""

import os
from pathlib import Path

from cxr.answer import answer_to_json
from cxr.engine import Engine

PORT = int(os.environ.get("CXR_BENCH_PORT", "0"))
WORKERS = int(os.environ.get("CXR_BENCH_WORKERS", "1"))


def load_engine() -> Engine:
    """The model of the unpacked archive, one thread a worker."""
    engine = Engine(Path(os.environ["CXR_BENCH_MODEL"]))
    engine.warm_up()
    return engine


def answer(engine: Engine, image: bytes) -> str:
    """One image's answer as JSON."""
    return answer_to_json(engine.predict([image])[0])
