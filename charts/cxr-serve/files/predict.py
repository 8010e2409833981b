"""`helm test`: asks the service for a prediction over REST and over gRPC."""

# ruff: noqa: S310, T201 - the address is the release's own Service; the output is the pod's log

import io
import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput

# Seconds; a network policy may need some to learn of this pod.
PATIENCE = 60


def rest(url: str, body: bytes | None = None) -> Any:
    """The service's JSON answer; asks again while nothing answers there."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "image/png"})
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            sys.exit(f"REST: {url} answered {error.code}: {error.read().decode()}")
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"REST: {url} does not answer: {error}")
            time.sleep(1)


host, rest_port, grpc_port = sys.argv[1:]
buffer = io.BytesIO()
Image.new("L", (64, 64)).save(buffer, "PNG")
png = buffer.getvalue()

(model,) = rest(f"http://{host}:{rest_port}/v1/models")["models"]
answer = rest(f"http://{host}:{rest_port}/v1/models/{model}:predict", png)
label = answer["predictions"][0]["label"]
print(f"REST: {model} {answer['model_version']}: {label}")

image = InferInput("image", [1], "BYTES")
image.set_data_from_numpy(np.array([png], dtype=np.object_))
client = InferenceServerClient(f"{host}:{grpc_port}")
result = client.infer(model, [image], client_timeout=PATIENCE)
grpc_label = result.as_numpy("label")[0].decode()
print(f"gRPC: {model} {result.get_response().model_version}: {grpc_label}")
if grpc_label != label:
    sys.exit("REST and gRPC gave different answers to the same image.")
