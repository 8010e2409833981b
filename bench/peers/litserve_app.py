"""LitServe: one worker per core, Base64 in JSON, as its documentation sends images."""

import base64
import json
from typing import Any

import litserve
from common import PORT, WORKERS, answer, load_engine


class Api(litserve.LitAPI):
    """One model in one worker process."""

    def setup(self, device: str) -> None:
        self.engine = load_engine()

    # Without an annotation, which LitServe would take for a query parameter.
    def decode_request(self, request) -> bytes:  # type: ignore[no-untyped-def]
        return base64.b64decode(request["image"])

    def predict(self, image: bytes) -> str:
        return answer(self.engine, image)

    def encode_response(self, output: str) -> Any:
        return json.loads(output)


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="error")
