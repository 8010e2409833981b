"""Batch scoring: any number of images in, Parquet of predictions out."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyspark import Broadcast, TaskContext
from pyspark.sql import SparkSession

from cxr.answer import Prediction
from cxr.config import ModelConfig
from cxr.engine import Engine
from cxr.errors import BadImageError
from cxr_training.data.errors import DataError
from cxr_training.data.manifest import read_manifest
from cxr_training.data.readers import UNREADABLE
from cxr_training.spark.model import Model, load
from cxr_training.spark.predictions import Job, write_part

PROBABILITY = "probability: "
_READ_BYTES = 2**20
_REPORT = "images long, started double, ended double"


@dataclass(frozen=True)
class Images:
    """The images to score.

    Attributes:
        paths: absolute paths, in the order of the predictions.
        sha256: of this list; another list, or other images in it, have another.
    """

    paths: Sequence[str]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run has done.

    Attributes:
        images: images scored in this run, bad ones included.
        seconds: from the first image to the last one, after the model was loaded.
    """

    images: int
    seconds: float


def list_images(source: Path) -> Images:
    """The images of a manifest, or all files in and below a folder but hidden ones.

    Raises:
        DataError: neither a manifest nor a folder, or nothing in it.
    """
    if source.is_dir():
        known = sorted(_files(str(source.absolute())))
    else:
        frame = read_manifest(source)
        known = list(zip(frame["path"], frame["sha256"], strict=True))
    if not known:
        raise DataError(f"{source} holds no files.")
    digest = hashlib.sha256()
    try:
        for path, state in known:
            digest.update(f"{path}\0{state}\0".encode())
    except UnicodeEncodeError:
        raise DataError(f"{source} holds a file whose name is not UTF-8.") from None
    return Images([path for path, _ in known], digest.hexdigest())


def make_job(model: Model, images: Images, part_size: int) -> Job:
    """The job of scoring these images with this model."""
    config = model.config
    return Job(
        model=f"{config.name} {config.version}",
        config_sha256=hashlib.sha256(config.to_json().encode()).hexdigest(),
        input_sha256=images.sha256,
        images=len(images.paths),
        part_size=part_size,
    )


def score(
    spark: SparkSession,
    model: Model,
    images: Images,
    out: Path,
    *,
    job: Job,
    parts: Sequence[int],
    batch_size: int,
) -> Report:
    """Score the images of some parts, and write them.

    Each part is one task. Every executor must see the images and `out` under the same path.

    Args:
        spark: where to score.
        model: the model.
        images: all images of the job.
        out: the folder to write to.
        job: the job; its parts are cut from `images`.
        parts: numbers of the parts to compute.
        batch_size: images in one forward pass; a worker holds no more at once.

    Raises:
        Py4JError: a task failed; a bad image is no failure, and stands in its row.
    """
    shipped = spark.sparkContext.broadcast(model)
    rows = [(part, images.paths[job.slice(part)]) for part in parts]
    # One row for each part and one part in each partition: a task, and a unit of restarting.
    work = spark.createDataFrame(
        spark.sparkContext.parallelize(rows, len(rows)), "part long, paths array<string>"
    )
    done = work.mapInPandas(
        lambda frames: _score_parts(frames, shipped, out.absolute(), batch_size), _REPORT
    ).collect()
    return Report(
        images=sum(row.images for row in done),
        seconds=max(row.ended for row in done) - min(row.started for row in done),
    )


def predict(engine: Engine, config: ModelConfig, paths: Sequence[str], batch_size: int) -> pa.Table:
    """One row for each image, in their order.

    A bad image has `error_reason` and `error` instead of a label; what cannot be read has no
    `sha256` either.
    """
    remaining = iter(paths)
    model = {
        "model_name": config.name,
        "model_version": config.version,
        "graph_sha256": config.graph.sha256,
    }
    rows: list[dict[str, object]] = []
    while batch := list(islice(remaining, batch_size)):
        files = [_read(path, engine.limits.max_bytes) for path in batch]
        readable = [file.data for file in files if isinstance(file, _File)]
        answers = iter(engine.predict(readable))
        for path, file in zip(batch, files, strict=True):
            answer = next(answers) if isinstance(file, _File) else file
            sha256 = file.sha256 if isinstance(file, _File) else None
            rows.append({"path": path, "sha256": sha256} | _columns(answer) | model)
    return pa.Table.from_pylist(rows, _schema(config.labels))


@dataclass(frozen=True)
class _File:
    """A file that could be read: its first bytes, as many as are ever decoded, and its SHA-256."""

    data: bytes
    sha256: str


def _read(path: str, max_bytes: int) -> _File | OSError:
    try:
        with Path(path).open("rb") as file:
            # One byte too many is enough for the engine to see that the image is too large.
            data = file.read(max_bytes + 1)
            digest = hashlib.sha256(data)
            while rest := file.read(_READ_BYTES):
                digest.update(rest)
    except OSError as error:
        return error
    return _File(data, digest.hexdigest())


def _columns(answer: Prediction | BadImageError | OSError) -> dict[str, object]:
    match answer:
        case Prediction():
            columns: dict[str, object] = {
                PROBABILITY + label: value for label, value in answer.probabilities.items()
            }
            return columns | {"label": answer.label, "positive": list(answer.positive)}
        case BadImageError():
            return {"error_reason": answer.reason.value, "error": str(answer)}
        case _:
            return {
                "error_reason": UNREADABLE,
                "error": f"The file cannot be read: {answer.strerror}.",
            }


def _schema(labels: Sequence[str]) -> pa.Schema:
    text = pa.string()
    return pa.schema(
        [
            pa.field("path", text, nullable=False),
            ("sha256", text),
            ("label", text),
            *((PROBABILITY + label, pa.float32()) for label in labels),
            ("positive", pa.list_(text)),
            ("error_reason", text),
            ("error", text),
            pa.field("model_name", text, nullable=False),
            pa.field("model_version", text, nullable=False),
            pa.field("graph_sha256", text, nullable=False),
        ]
    )


def _score_parts(
    frames: Iterable[pd.DataFrame], shipped: Broadcast[Model], out: Path, batch_size: int
) -> Iterator[pd.DataFrame]:
    engine = _worker_engine(shipped)
    for frame in frames:
        for part, paths in zip(frame["part"], frame["paths"], strict=True):
            started = time.time()
            table = predict(engine, shipped.value.config, list(paths), batch_size)
            write_part(out, part, table)
            yield pd.DataFrame(
                {
                    "images": [len(table)],
                    "started": [started],
                    "ended": [time.time()],
                }
            )


# A Python worker of Spark serves many tasks, one after another; it loads the model once.
_loaded: dict[str, Engine] = {}


def _worker_engine(shipped: "Broadcast[Model]") -> Engine:
    key = hashlib.sha256(shipped.value.config.to_json().encode()).hexdigest()
    if key not in _loaded:
        _loaded.clear()
        context = TaskContext.get()
        _loaded[key] = load(shipped.value, threads=context.cpus() if context else 1)
    return _loaded[key]


def _files(folder: str) -> Iterator[tuple[str, str]]:
    """Files below a folder, each with its size and time of change."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif entry.is_file() or entry.is_symlink():
                state = entry.stat(follow_symlinks=False)
                yield entry.path, f"{state.st_size} {state.st_mtime_ns}"
