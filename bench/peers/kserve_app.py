"""KServe SDK: a custom model in one server process per core, V1 with Base64."""

import base64
import functools
import json
from typing import Any

import kserve
from common import PORT, WORKERS, answer, load_engine

# Each server process is spawned with a pickle of the model, which ONNX Runtime's sessions refuse:
# so the engine is loaded in the process, with its first request.
engine = functools.cache(load_engine)


class Cxr(kserve.Model):
    """The model."""

    def load(self) -> bool:
        self.ready = True
        return True

    def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        images = [base64.b64decode(instance["b64"]) for instance in payload["instances"]]
        return {"predictions": [json.loads(answer(engine(), image)) for image in images]}


if __name__ == "__main__":
    model = Cxr("cxr")
    model.load()
    server = kserve.ModelServer(
        http_port=PORT,
        workers=WORKERS,
        enable_grpc=False,
        enable_docs_url=False,
        access_log_format=None,
    )
    server.start([model])
