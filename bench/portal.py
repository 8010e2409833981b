"""What the portal adds to the model: the same image through both, by turns, one at a time."""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import numpy as np
from PIL import Image
from tabulate import tabulate
from tritonclient.grpc import service_pb2, service_pb2_grpc

CXR = str(Path(sys.executable).with_name("cxr"))
WARM_UP = 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--requests", type=int, default=300, help="through each way")
    arguments = parser.parse_args()
    body = image()
    with (
        tempfile.TemporaryDirectory() as folder,
        started("serve", str(arguments.archive), "--runtime=inprocess", "--no-access-log") as model,
        started(
            "portal", f"--server={model['grpc']}", f"--database=sqlite:///{folder}/portal.db",
            "--images-per-minute=1000000",
        ) as portal,
        grpc.insecure_channel(model["grpc"]) as channel,
        httpx.Client(base_url=portal["portal"]) as http,
    ):  # fmt: skip
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        request = service_pb2.ModelInferRequest(model_name="cxr")
        tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(body)
        direct: list[float] = []
        through: list[float] = []
        for turn in range(WARM_UP + arguments.requests):
            start = time.perf_counter()
            infer(request)
            middle = time.perf_counter()
            answer = http.post("/v1/predictions", files=[("images", ("image.jpg", body))])
            end = time.perf_counter()
            answer.raise_for_status()
            if turn >= WARM_UP:
                direct.append(1000 * (middle - start))
                through.append(1000 * (end - middle))
    rows = [("model, gRPC", *figures(direct)), ("portal, HTTP", *figures(through))]
    print(tabulate(rows, headers=["way", "p50 (ms)", "p90 (ms)", "p99 (ms)"], floatfmt=".2f"))
    added = statistics.median(through) - statistics.median(direct)
    print(f"\nThe portal adds {added:.2f} ms (p50, {arguments.requests} requests, one at a time).")


def image() -> bytes:
    """A JPEG of 1,024 by 1,024 pixels."""
    rows, columns = np.mgrid[0:1024, 0:1024]
    noise = np.random.default_rng(0).normal(0, 8, (1024, 1024))
    grey = 120 + 60 * np.sin(rows / 90) * np.cos(columns / 130) + noise
    buffer = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def figures(milliseconds: list[float]) -> tuple[float, float, float]:
    """Median and two high percentiles."""
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99)).tolist()
    return p50, p90, p99


@contextmanager
def started(*command: str) -> Iterator[dict[str, str]]:
    """Run a server of ours on free ports; where it listens."""
    names = ("rest", "grpc", "metrics") if command[0] == "serve" else ("", "metrics")
    ports = [f"--{name}-port=0" if name else "--port=0" for name in names]
    with subprocess.Popen(
        [CXR, *command, "--json", *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield json.loads(process.stdout.readline() if process.stdout else "")
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
