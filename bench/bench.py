"""Our servers beside their peers and beside the limit of the machine, in one run.

All servers run from the start to the end. Every round gives each of them, and the limit, a short
spell of load at each concurrency, in an order of its own, so that a slow minute of the machine
meets all of them. All answer the same images with the same graph. `docs/benchmarks.md` says how to
read the result.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr.config import load_config
from cxr.engine import Engine
from cxr.errors import BadImageError
from limit import growth
from load import Load, Request, ask_each, drive
from report import LIMIT, machine, write_page, write_results
from subjects import SUBJECTS, Running, Setting, Subject, SubjectError, prepare, running

HERE = Path(__file__).parent
# What TorchServe's own handler can serve, too: one network, a linear head, no cutting out of lungs.
_RECIPE = "lite0-frozen"


def main() -> None:
    """Measure, and write what was found."""
    arguments = parse_arguments()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.archive is None:
        make_model(arguments)
    chosen = [SUBJECTS[name] for name in arguments.subjects]
    settings, compilation = settings_of(arguments)
    images = encoded_images(arguments.run, arguments.images)
    for subject in chosen:
        prepare(subject, settings["fp32"])
    before = machine()
    rows = Rows([LIMIT, *(subject.name for subject in chosen)], list(settings))
    with ExitStack() as stack:
        started = start_all(chosen, settings, images, arguments=arguments, rows=rows, stack=stack)
        spells = [
            partial(one.spell, rows, concurrency, arguments.seconds)
            for one in started
            for concurrency in arguments.concurrency
        ]
        for precision, setting in settings.items():
            spells.append(partial(limit_spell, rows, precision, setting, images, arguments.seconds))
        order = random.Random(0)  # noqa: S311 - of a benchmark
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", flush=True)
            order.shuffle(spells)
            for spell in spells:
                spell()
        for one in started:
            rows.add_facts(one)
    result: dict[str, Any] = {
        "machine": before,
        "command": arguments.command,
        "images": {
            "count": len(images),
            "kilobytes": float(np.mean([len(image) for image in images]) / 1e3),
        },
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "rows": rows.finished(),
        "failed": rows.failed,
        "compilation": compilation,
        "growth": growth(settings["fp32"].model, images) if arguments.growth else None,
    }
    write_results(out / "benchmark.json", result)
    if arguments.page is not None:
        write_page(arguments.page, result)
    print((out / "benchmark.json").read_text() if arguments.json else f"Wrote {out}.")


def settings_of(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Setting], dict[str, Any] | None]:
    """What is served, by name of the graph, and what `cxr compile` found."""
    run, out = arguments.run, arguments.out
    settings = {"fp32": setting_of(arguments.archive, run, out, "fp32")}
    if arguments.compiled is None:
        return settings, None
    setting = setting_of(arguments.compiled, run, out, "compiled")
    compilation = load_config(setting.model).compilation
    if compilation is None:
        raise SystemExit(f"{arguments.compiled} was not written by cxr compile.")
    if compilation.chosen != compilation.candidates[0].name:
        settings[compilation.chosen] = setting
    return settings, compilation.model_dump()


def make_model(arguments: argparse.Namespace) -> None:
    """Train, archive and compile what is measured, unless an earlier call has."""
    out: Path = arguments.out
    arguments.run, arguments.compiled = out / "run", out / "compiled.mar"
    arguments.archive = trained_archive(out, arguments.data)
    if not arguments.compiled.is_file():
        manifest = arguments.run / "manifest.parquet"
        cxr("compile", arguments.archive, "--manifest", manifest, "--out", arguments.compiled)


def trained_archive(out: Path, data: Path | None, *options: object) -> Path:
    """Train and archive a model, unless an earlier call has.

    Args:
        out: folder for the archive, its run in `run`, and phantoms.
        data: folder of images; phantoms without one.
        options: more words for `cxr train`.
    """
    archive = out / "cxr.mar"
    if archive.is_file():
        return archive
    if data is None:
        data = out / "phantoms"
        cxr("data", "phantoms", data, "--patients-per-class", 20, "--seed", 0)
    cxr("train", "--recipe", _RECIPE, *options, "--data", data, "--out", out / "run")
    cxr("export", out / "run", "--out", out / "bundle")
    cxr("archive", out / "bundle", "--out", archive)
    return archive


def cxr(*words: object) -> None:
    """Run a `cxr` command."""
    program = Path(sys.executable).with_name("cxr")
    subprocess.run([program, *map(str, words)], check=True)


class Rows:
    """One row for each subject, precision and concurrency; rounds are pooled.

    Attributes:
        failed: subjects that could not be measured, and why.
    """

    def __init__(self, names: list[str], precisions: list[str]) -> None:
        """Rows will be in the order of these precisions, names in each."""
        self._names, self._precisions = names, precisions
        self.failed: dict[str, str] = {}
        self._loads: dict[tuple[str, str, int], Load] = {}
        self._facts: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, name: str, precision: str, concurrency: int, load: Load) -> None:
        """One round of one row."""
        self._loads.setdefault((name, precision, concurrency), Load()).add(load)

    def add_facts(self, one: "Started") -> None:
        """Start time in seconds, memory in bytes after all load, and how images were sent."""
        self._facts[one.subject.name, one.precision] = {
            "start": one.server.seconds,
            "memory": one.server.memory(),
            "body": one.subject.body,
        }

    def _place(self, row: tuple[tuple[str, str, int], Load]) -> tuple[int, int, int]:
        (name, precision, concurrency), _ = row
        return self._precisions.index(precision), self._names.index(name), concurrency

    def finished(self) -> list[dict[str, Any]]:
        """What was pooled, as rows."""
        rows = []
        for (name, precision, concurrency), load in sorted(self._loads.items(), key=self._place):
            facts = self._facts.get((name, precision), {})
            shares = (0.5, 0.95, 0.99) if load.latencies else ()
            quantiles = np.quantile(load.latencies or [0.0], shares)
            row = {
                "name": name,
                "precision": precision,
                "concurrency": concurrency,
                "requests": len(load.latencies),
                "failures": load.failures,
                "throughput": load.throughput,
                "others": load.others / load.seconds / len(os.sched_getaffinity(0)),
                "client_ms": 1e3 * load.client_seconds / max(1, len(load.latencies)),
                "server_ms": 1e3 * load.server_seconds / max(1, len(load.latencies)),
                "memory_mb": facts["memory"] / 1e6 if facts else None,
                "start_s": facts.get("start"),
                "body": facts.get("body"),
            }
            for key, value in zip(("p50_ms", "p95_ms", "p99_ms"), quantiles, strict=False):
                row[key] = float(value) * 1e3
            rows.append(row)
        return rows


@dataclass(frozen=True)
class Started:
    """A server that answers rightly, and its requests."""

    subject: Subject
    precision: str
    server: Running
    requests: list[Request]

    def spell(self, rows: Rows, concurrency: int, seconds: float) -> None:
        """Put a load on it for a while."""
        rows.add(self.subject.name, self.precision, concurrency, self.load(concurrency, seconds))

    def load(self, concurrency: int, seconds: float) -> Load:
        """What its clients see meanwhile, and what it needs."""
        clock, own = self.server.others_seconds(), self.server.own_seconds()
        load = drive(self.requests, concurrency=concurrency, seconds=seconds)
        load.server_seconds = self.server.own_seconds() - own
        load.others = self.server.others_seconds() - clock
        return load


def start_all(
    chosen: list[Subject],
    settings: dict[str, Setting],
    images: list[bytes],
    *,
    arguments: argparse.Namespace,
    rows: Rows,
    stack: ExitStack,
) -> list[Started]:
    """Start the servers one after the other, compare some answers, and warm each up."""
    started = []
    for precision, setting in settings.items():
        for subject in chosen:
            if precision != "fp32" and not subject.ours:
                continue
            print(f"starting {subject.name}, {precision}", flush=True)
            try:
                server = stack.enter_context(running(subject, setting, images[0]))
                requests = [Request(server.url, *subject.encode(image)) for image in images]
                check_answers(subject, setting, images, ask_each(requests[: arguments.checked]))
            except SubjectError as error:
                if subject.ours:
                    raise SystemExit(str(error)) from None
                print(error, file=sys.stderr)
                rows.failed[subject.name] = error.reason
                continue
            drive(requests, concurrency=max(arguments.concurrency), seconds=arguments.warm_up)
            started.append(Started(subject, precision, server, requests))
    return started


def limit_spell(
    rows: Rows, precision: str, setting: Setting, images: list[bytes], seconds: float
) -> None:
    """A spell of the limit: its concurrency is the number of cores."""
    found = measured_limit(setting, images, seconds)
    load = Load(latencies=found["latencies"])
    load.seconds = len(found["latencies"]) / found["throughput"]
    load.server_seconds = found["processor_seconds"]
    rows.add(LIMIT, precision, len(os.sched_getaffinity(0)), load)


def check_answers(
    subject: Subject, setting: Setting, images: list[bytes], answers: list[bytes | None]
) -> None:
    """A server that answers wrongly, or not at all, has no place in a comparison."""
    engine = Engine(setting.model)
    agreeing = 0
    for image, answer in zip(images, answers, strict=False):
        if answer is None:
            raise SubjectError(subject.name, "left an image unanswered")
        expected = engine.predict([image])[0]
        if isinstance(expected, BadImageError):
            raise SystemExit(f"An image cannot be used: {expected}")
        # The stock handler decodes and scales by other code, so it may differ at the edge of a
        # class; and it names classes by their number.
        number = str(engine.labels.index(expected.label))
        agreeing += (number if subject.shares else expected.label).encode() in answer
    if agreeing < 0.8 * len(answers):
        reason = f"answered {agreeing} of {len(answers)} images correctly"
        raise SubjectError(subject.name, reason)


def measured_limit(setting: Setting, images: list[bytes], seconds: float) -> dict[str, Any]:
    """The limit, from a process of its own."""
    folder = setting.work / "images"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = []
    for index, image in enumerate(images):
        (folder / str(index)).write_bytes(image)
        files.append(str(folder / str(index)))
    (folder / "files.json").write_text(json.dumps(files))
    words: list[str | Path] = [sys.executable, HERE / "limit.py", setting.model]
    words += [folder / "files.json", str(seconds)]
    done = subprocess.run(
        words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def setting_of(archive: Path, run: Path, out: Path, name: str) -> Setting:
    """An archive, unpacked for the peers."""
    model = (out / "models" / name).resolve()
    shutil.rmtree(model, ignore_errors=True)
    with zipfile.ZipFile(archive) as mar:
        mar.extractall(model)
    cores = len(os.sched_getaffinity(0))
    return Setting(archive.resolve(), model, run.resolve(), out.resolve(), cores)


def encoded_images(run: Path, count: int) -> list[bytes]:
    """Images of the run's test split, as they are on disk; JPEG and PNG."""
    frame = pd.read_parquet(run / "manifest.parquet")
    test = frame[frame["split"] == "test"]
    paths = test["path"].sample(n=min(count, len(test)), random_state=0)
    return [Path(path).read_bytes() for path in paths]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, environments")
    parser.add_argument("--data", type=Path, help="folder of images to train on; else phantoms")
    parser.add_argument("--run", type=Path, help="run folder: its images, and the eager network")
    parser.add_argument("--archive", type=Path, help="the .mar of that run")
    parser.add_argument("--compiled", type=Path, help="that .mar after `cxr compile`")
    parser.add_argument("--page", type=Path, help="Markdown page to write the result into")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 2, 4, 16])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row in each round")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds of each start")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--checked", type=int, default=8, help="answers compared with the engine")
    parser.add_argument("--no-growth", dest="growth", action="store_false")
    parser.add_argument("--command", default="make bench", help="how to repeat it, for the page")
    parser.add_argument("--json", action="store_true", help="print the result")
    arguments = parser.parse_args()
    if (arguments.run is None) != (arguments.archive is None):
        parser.error("give --run and --archive together, or neither")
    return arguments


if __name__ == "__main__":
    main()
