"""Asks a service through the KServe SDK, in a process of its own.

The SDK's protobuf messages and tritonclient's have the same names, so that one process cannot hold
both. Reads `{"rest", "grpc", "model", "images"}` from stdin (images in Base64) and prints what
each call gave.
"""

import asyncio
import base64
import json
import sys
from typing import Any

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import InferResponse


async def main() -> None:
    job = json.load(sys.stdin)
    images = [base64.b64decode(text) for text in job["images"]]
    answers = {
        "v1": await ask_v1(job["rest"], job["model"], job["images"]),
        "v2": await ask_v2(job["rest"], job["model"], images, job["images"]),
        "grpc": await ask_grpc(job["grpc"], job["model"], images),
    }
    json.dump(answers, sys.stdout)


async def ask_v1(url: str, model: str, texts: list[str]) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v1"))
    body = {"instances": [{"b64": text} for text in texts]}
    return {
        "live": await client.is_server_live(url),
        "model_ready": await client.is_model_ready(url, model),
        "infer": await client.infer(url, body, model_name=model),
        "unknown": await status(client.infer(url, body, model_name="unknown")),
    }


async def ask_v2(url: str, model: str, images: list[bytes], texts: list[str]) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    binary, plain = request(model, images, binary=True), request(model, texts, binary=False)
    return {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model_ready": await client.is_model_ready(url, model),
        "binary": tensors(await client.infer(url, binary, model_name=model)),
        "json": tensors(await client.infer(url, plain, model_name=model)),
        "unknown": await status(client.infer(url, plain, model_name="unknown")),
    }


async def ask_grpc(url: str, model: str, images: list[bytes]) -> dict[str, Any]:
    async with InferenceGRPCClient(url) as client:
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": await client.is_model_ready(model),
            "raw": tensors(await client.infer(request(model, images, binary=True))),
            "contents": tensors(await client.infer(request(model, images, binary=False))),
            "unknown": await status(client.infer(request("unknown", images, binary=True))),
        }


def request(model: str, items: list[Any], *, binary: bool) -> InferRequest:
    if binary:
        tensor = InferInput("image", [len(items)], "BYTES")
        tensor.set_data_from_numpy(np.array(items, dtype=np.object_), binary_data=True)
    else:
        tensor = InferInput("image", [len(items)], "BYTES", data=items)
    return InferRequest(model, [tensor], request_id="an-id")


def tensors(response: InferResponse) -> dict[str, Any]:
    outputs = {output.name: output for output in response.outputs}
    return {
        "id": response.id,
        "model_name": response.model_name,
        "probabilities": outputs["probabilities"].as_numpy().tolist(),
        "label": [
            item.decode() if isinstance(item, bytes) else item
            for item in outputs["label"].as_numpy().tolist()
        ],
    }


async def status(call: Any) -> Any:
    try:
        await call
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    except grpc.RpcError as error:
        return error.code().name
    return None


if __name__ == "__main__":
    asyncio.run(main())
