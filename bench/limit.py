"""The in-process limit: decode, preprocess and forward in one process per core, nothing else."""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cxr.engine import Engine
from cxr.preprocess import load_tensor

_REPEATS = 5


def work(
    model: str,
    images: list[bytes],
    seconds: float,
    *,
    core: int,
    start: multiprocessing.synchronize.Barrier,
    results: "multiprocessing.Queue[tuple[list[float], float, float]]",
) -> None:
    """Answer images on one core, one after the other."""
    os.sched_setaffinity(0, {core})
    engine = Engine(Path(model))
    for image in images[:8]:
        engine.predict([image])
    start.wait()
    times: list[float] = []
    cpu, begun = time.process_time(), time.perf_counter()
    while (now := time.perf_counter()) - begun < seconds:
        engine.predict([images[len(times) % len(images)]])
        times.append(time.perf_counter() - now)
    results.put((times, time.perf_counter() - begun, time.process_time() - cpu))


def limit(model: Path, images: list[bytes], seconds: float) -> dict[str, Any]:
    """Seconds of each image, over all cores together; images per second; processor time."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(len(cores)), context.Queue()
    processes = [
        context.Process(
            target=work,
            args=(str(model), images, seconds),
            kwargs={"core": core, "start": start, "results": results},
        )
        for core in cores
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {
        "latencies": [one for times, _, _ in found for one in times],
        "throughput": sum(len(times) / spent for times, spent, _ in found),
        "processor_seconds": sum(cpu for _, _, cpu in found),
    }


def growth(model: Path, images: list[bytes]) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of one image on one core, by size of its file and by size of the batch."""
    engine = Engine(model)
    by_size = []
    for side in (256, 512, 1024, 2048, 3072):
        data = _enlarged(images[0], side)
        tensor = load_tensor(data, engine.preprocessing)
        row: dict[str, float] = {"side": side, "bytes": len(data)}
        for decoding in ("exact", "scaled"):
            spec = type(engine.preprocessing)(
                **{**engine.preprocessing.distinctive(), "decoding": decoding}
            )
            row[decoding] = _milliseconds(lambda d=data, s=spec: load_tensor(d, s))
        row["forward"] = _milliseconds(lambda t=tensor: engine.forward(t[None]))
        by_size.append(row)
    by_batch = []
    for count in (1, 2, 4, 8, 16):
        batch = np.repeat(load_tensor(images[0], engine.preprocessing)[None], count, axis=0)
        spent = _milliseconds(lambda b=batch: engine.forward(b))
        by_batch.append({"batch": count, "image": spent / count})
    return {"by_size": by_size, "by_batch": by_batch}


def _enlarged(data: bytes, side: int) -> bytes:
    image = Image.open(BytesIO(data)).convert("L")
    ratio = side / min(image.size)
    size = (round(image.width * ratio), round(image.height * ratio))
    buffer = BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _milliseconds(call: Any) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    folder, files, duration = sys.argv[1:]
    encoded = [Path(name).read_bytes() for name in json.loads(Path(files).read_text())]
    json.dump(limit(Path(folder), encoded, float(duration)), sys.stdout)
