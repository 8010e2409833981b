"""What metrics, logs and traces cost, beside a server that has none of them.

All servers run from the start to the end and get short spells of load in turn, so that a slow
minute of the machine meets all of them. The ratio of two spells of one round is one sample; the
interval is that of the median of all (95 %, bootstrap).
"""

import argparse
import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from bench import encoded_images, make_model, setting_of
from load import Request, drive
from report import replace_part, write_results
from subjects import Running, Subject, ours, running

_BEGIN = "<!-- measured: written by make bench-overhead -->"
_BARE = "nothing"
_RESAMPLES = 2000
_PROBABILITIES = (0.025, 0.5, 0.975)


def subjects(collector: str, runtime: str) -> dict[str, Subject]:
    """The servers, each with all that the one before it has."""
    bare = [sys.executable, str(Path(__file__).with_name("bare.py"))]
    logs = ("--access-log", "--log-format", "json")
    tenth = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.1",
    }
    return {
        _BARE: ours("bare", runtime, "--no-access-log", program=bare),
        "metrics": ours("metrics", runtime, "--no-access-log"),
        "metrics and JSON access log": ours("logs", runtime, *logs),
        "the same, and traces of a tenth": ours(
            "traces", runtime, *logs, "--tracing", variables=tenth
        ),
    }


def main() -> None:
    """Measure, print, and write into the page."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.archive is None:
        make_model(arguments)
    setting = setting_of(arguments.archive, arguments.run, arguments.out, "fp32")
    images = encoded_images(arguments.run, arguments.images)
    order = random.Random(0)  # noqa: S311 - of a benchmark
    with collecting() as collector, ExitStack() as stack:
        chosen = subjects(collector, arguments.runtime)
        servers = {
            name: stack.enter_context(running(subject, setting, images[0]))
            for name, subject in chosen.items()
        }
        spells: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
        requests = {
            name: [Request(servers[name].url, *subject.encode(image)) for image in images]
            for name, subject in chosen.items()
        }
        for number in range(-1, arguments.rounds):
            names = list(servers)
            order.shuffle(names)
            for name in names:
                found = spell(servers[name], requests[name], arguments)
                if number >= 0:  # the first one warms up
                    spells[name].append(found)
    rows = [row(name, spells) for name in spells]
    write_results(arguments.out / "overhead.json", {"rows": rows, "spells": spells})
    table = tabulate(rows, headers="keys", tablefmt="github")
    print(table)
    if arguments.page is not None:
        told = (
            f"`{arguments.command}`: {arguments.rounds} spells of {arguments.seconds:g} s each, "
            f"{arguments.concurrency} clients, runtime {arguments.runtime}."
        )
        replace_part(arguments.page, f"{told}\n\n{table}", begin=_BEGIN)


def spell(
    server: Running, requests: list[Request], arguments: argparse.Namespace
) -> tuple[float, float]:
    """Images per second, and seconds of processor time for each."""
    before = server.own_seconds()
    load = drive(requests, concurrency=arguments.concurrency, seconds=arguments.seconds)
    if load.failures or not load.latencies:
        raise SystemExit(f"{load.failures} requests have failed; the log is in the work folder.")
    return load.throughput, (server.own_seconds() - before) / len(load.latencies)


def row(name: str, spells: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """A line of the table: medians, and ratios to the server that has nothing."""
    own, bare = np.asarray(spells[name]), np.asarray(spells[_BARE])
    return {
        "with": name,
        "images/s": f"{np.median(own[:, 0]):.1f}",
        "throughput against nothing": interval(own[:, 0] / bare[:, 0]),
        "processor ms an image": f"{1e3 * np.median(own[:, 1]):.2f}",
        "processor time against nothing": interval(own[:, 1] / bare[:, 1]),
    }


def interval(ratios: Any) -> str:
    """Median and its 95 % interval, in words."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, middle, high = np.quantile(medians, _PROBABILITIES)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


@contextlib.contextmanager
def collecting() -> Iterator[str]:
    """A process that takes spans and drops them; its URL."""
    context = get_context("spawn")
    ours_end, its_end = context.Pipe()
    process = context.Process(target=collect, args=(its_end,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours_end.recv()}"
    finally:
        process.terminate()
        process.join()


def collect(pipe: Any) -> None:
    """Answer 200 to whatever is posted."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        pipe.send(http.server_port)
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        thread.join()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--data", type=Path, help="folder of images to train on; else phantoms")
    parser.add_argument("--run", type=Path, help="run folder, for its images")
    parser.add_argument("--archive", type=Path, help="the .mar of that run")
    parser.add_argument("--page", type=Path, help="Markdown page to write the result into")
    parser.add_argument("--runtime", choices=("inprocess", "torchserve"), default="inprocess")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each spell")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--command", default="make bench-overhead", help="for the page")
    arguments = parser.parse_args()
    if (arguments.run is None) != (arguments.archive is None):
        parser.error("give --run and --archive together, or neither")
    return arguments


if __name__ == "__main__":
    main()
