"""What a GPU is worth: our servers on it, with one worker and several, beside the processor alone.

All servers of a model run from the start to the end, and rounds take them in turn, as `bench.py`
does. It needs an NVIDIA GPU, `onnxruntime-gpu`, and PyTorch's CUDA build.
"""

import argparse
import json
import os
import random
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import yaml
from tabulate import tabulate

from bench import Started, check_answers, encoded_images, setting_of, trained_archive
from cxr.engine import CUDA, Engine
from cxr.mar import CHECKSUMS, digests
from cxr_archive.packager import MODEL_CONFIG
from load import Load, Request, ask_each, drive
from report import machine, replace_part
from subjects import SUBJECTS, Subject, running

_BEGIN = "<!-- measured: written by make bench-gpu -->"
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}


@dataclass(frozen=True, eq=False)
class Case:
    """One server.

    Attributes:
        subject: how it is started.
        device: GPU or CPU, for the table.
        workers: its processes with a model.
        batches: whether several images may go through the graph together.
    """

    subject: Subject
    device: str
    workers: int
    batches: bool


def cases(workers: list[int]) -> Iterator[Case]:
    """All servers of a model."""
    inprocess, torchserve = SUBJECTS["inprocess"], SUBJECTS["torchserve"]
    for number in workers:
        yield Case(inprocess, "GPU", number, batches=True)
    yield Case(inprocess, "GPU", workers[0], batches=False)
    yield Case(torchserve, "GPU", workers[-1], batches=False)
    without = replace(inprocess, name=f"{inprocess.name} on the CPU", variables=_NO_GPU)
    yield Case(without, "CPU", len(os.sched_getaffinity(0)), batches=False)


def main() -> None:
    """Measure, print, and write into the page."""
    arguments = parse_arguments()
    if CUDA not in ort.get_available_providers():
        raise SystemExit("This needs a GPU and onnxruntime-gpu.")
    parts = []
    for backbone in arguments.backbones:
        rows = measured(backbone, arguments)
        print(table(rows), flush=True)
        parts.append(f"`{backbone}`:\n\n{table(rows)}")
    facts = machine()
    title = (
        f"`{arguments.command}` on one {torch.cuda.get_device_name()} and {facts['cores']} cores "
        f"of {facts['processor']}; ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}. "
        f"{arguments.rounds} rounds of {arguments.seconds:g} s a row."
    )
    if arguments.page is not None:
        replace_part(arguments.page, "\n\n".join([title, *parts]), begin=_BEGIN)


def measured(backbone: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each server and concurrency."""
    out: Path = arguments.out / backbone
    out.mkdir(parents=True, exist_ok=True)
    # The speed of a network does not depend on its weights, and some have to be downloaded.
    weights = () if "lite" in backbone else ("--weights", "none")
    archive = trained_archive(out, arguments.data, "--backbone", backbone, *weights)
    setting = setting_of(archive, out / "run", arguments.out, backbone)
    assert Engine(setting.model).provider == CUDA  # noqa: S101 - else no result
    single = replace(setting, archive=without_batches(archive, out / "single.mar"))
    images = encoded_images(out / "run", arguments.images)
    loads: dict[tuple[Case, int], Load] = {}
    with ExitStack() as stack:
        started: list[tuple[Case, Started]] = []
        for case in cases(arguments.workers):
            print(f"starting {case.subject.name}, {case.workers} workers", flush=True)
            given = replace(setting if case.batches else single, cores=case.workers)
            # Its log is named after it.
            name = f"{case.subject.name} {case.device} {case.workers} {case.batches}"
            subject = replace(case.subject, name=name)
            server = stack.enter_context(running(subject, given, images[0]))
            requests = [Request(server.url, *case.subject.encode(image)) for image in images]
            check_answers(case.subject, given, images, ask_each(requests[:8]))
            drive(requests, concurrency=max(arguments.concurrency), seconds=arguments.warm_up)
            started.append((case, Started(subject, backbone, server, requests)))
        order = random.Random(0)  # noqa: S311 - of a benchmark
        spells = [(one, clients) for one in started for clients in arguments.concurrency]
        for _ in range(arguments.rounds):
            order.shuffle(spells)
            for (case, one), clients in spells:
                load = one.load(clients, arguments.seconds)
                loads.setdefault((case, clients), Load()).add(load)
    return [
        row(case, clients, loads[case, clients])
        for case, _ in started
        for clients in arguments.concurrency
    ]


def row(case: Case, clients: int, load: Load) -> dict[str, Any]:
    """What the clients of one server saw."""
    p50, p99 = np.quantile(load.latencies, (0.5, 0.99)) * 1e3
    return {
        "server": case.subject.name,
        "device": case.device,
        "workers": case.workers,
        "batches": "yes" if case.batches else "no",
        "clients": clients,
        "images/s": load.throughput,
        "p50 ms": f"{p50:.1f}",
        "p99 ms": f"{p99:.1f}",
        "CPU ms": f"{1e3 * load.server_seconds / len(load.latencies):.1f}",
        "failed": load.failures,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, with the share of what the processor alone answers."""
    base = max(row["images/s"] for row in rows if row["device"] == "CPU")
    shown = [
        row | {"of the CPU": f"{row['images/s'] / base:.2f}", "images/s": f"{row['images/s']:.0f}"}
        for row in rows
    ]
    text: str = tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True)
    return text


def without_batches(archive: Path, out: Path) -> Path:
    """The same archive, but it asks for single images on a GPU, too."""
    with zipfile.ZipFile(archive) as source:
        files = {name: source.read(name) for name in source.namelist() if name != CHECKSUMS}
    settings = yaml.safe_load(files[MODEL_CONFIG]) | {"gpu": None}
    files[MODEL_CONFIG] = yaml.safe_dump(settings).encode()
    files[CHECKSUMS] = json.dumps(digests(files)).encode()
    with zipfile.ZipFile(out, "w") as target:
        for name, data in files.items():
            target.writestr(name, data)
    return out


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--data", type=Path, help="folder of images to train on; else phantoms")
    parser.add_argument("--page", type=Path, help="Markdown page to write the result into")
    parser.add_argument("--backbones", nargs="+", default=["efficientnet-lite0", "resnet50"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row in each round")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds of each start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--command", default="make bench-gpu", help="how to repeat it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
