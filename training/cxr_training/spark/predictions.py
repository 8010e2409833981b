"""Predictions on disk: a folder of Parquet parts that appear whole or not at all.

The parts are the record of what is done. A part is written under another name and then renamed, so
one that is there is complete; a run that starts again computes the others.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cxr_training.errors import TrainingError

# Readers of Parquet pass over names with an underscore in front.
_JOB = "_cxr-score.json"
_DONE = "_SUCCESS"
_UNFINISHED = "_unfinished-"
_PART = "part-{:06d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides the content of every part; runs resume only the same job.

    Attributes:
        model: name and version.
        config_sha256: of the model configuration, which names the graph's SHA-256.
        input_sha256: of the list of images.
        images: their number.
        part_size: images in a part; the last may have fewer.
    """

    model: str
    config_sha256: str
    input_sha256: str
    images: int
    part_size: int

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.images // self.part_size)

    def slice(self, part: int) -> slice:
        """The images of a part."""
        return slice(part * self.part_size, (part + 1) * self.part_size)


# What to call the fields of a job that is not the one begun.
_NAMES = {
    "model": "model",
    "config_sha256": "model",
    "input_sha256": "input",
    "images": "input",
    "part_size": "part size",
}


@contextmanager
def opened(out: Path, job: Job, *, overwrite: bool = False) -> Iterator[list[int]]:
    """Hold the folder of a job's predictions, made if needed, against other runs.

    Args:
        out: the folder.
        job: what is to be in it.
        overwrite: throw away predictions of another job.

    Yields:
        Numbers of the parts that are missing.

    Raises:
        TrainingError: something else is at `out`, predictions of another job, or another run.
    """
    if out.exists() and not (out / _JOB).is_file() and not _is_empty_folder(out):
        raise TrainingError(f"{out} exists and holds no predictions; name another --out.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _JOB).open("a+b") as record:
        try:
            # The kernel lets go of it when this process ends, however it ends.
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"Another run is writing to {out}.") from None
        record.seek(0)
        begun = _parse(record.read())
        if begun != job:
            if begun is not None and not overwrite:
                raise TrainingError(
                    f"{out} holds predictions of another {_difference(begun, job)}; name another "
                    "--out, or give --overwrite to replace them."
                )
            _clear(out)
            record.truncate(0)
            record.write(json.dumps(asdict(job), indent=2).encode() + b"\n")
            record.flush()
            os.fsync(record.fileno())
        for leftover in out.glob(_UNFINISHED + "*"):
            leftover.unlink(missing_ok=True)
        missing = [part for part in range(job.parts) if not _is_whole(out, job, part)]
        if missing:
            (out / _DONE).unlink(missing_ok=True)
        yield missing
        (out / _DONE).touch()


def write_part(out: Path, part: int, table: pa.Table) -> None:
    """Write one part, whole or not at all.

    Raises:
        TrainingError: it cannot be written.
    """
    # Two attempts at one part may run at once; each has its own file, and both say the same.
    unfinished = out / f"{_UNFINISHED}{part}-{os.uname().nodename}-{os.getpid()}"
    try:
        with unfinished.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(out / _PART.format(part))
    except OSError as error:
        raise TrainingError(f"Cannot write to {out}: {error.strerror}.") from error


def count_errors(out: Path) -> dict[str, int]:
    """Number of bad images among all predictions, by reason."""
    reasons = pq.read_table(out, columns=["error_reason"])["error_reason"].drop_null()
    counts = {item["values"].as_py(): item["counts"].as_py() for item in reasons.value_counts()}
    return dict(sorted(counts.items()))


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _parse(text: bytes) -> Job | None:
    """The job of a record, or None where a run was ended before it had written one."""
    try:
        return Job(**json.loads(text))
    except (TypeError, ValueError):
        return None


def _difference(begun: Job, job: Job) -> str:
    names = [
        _NAMES[field.name]
        for field in fields(Job)
        if getattr(begun, field.name) != getattr(job, field.name)
    ]
    return " and ".join(dict.fromkeys(names))


def _clear(out: Path) -> None:
    for path in [*out.glob("part-*.parquet"), out / _DONE]:
        path.unlink(missing_ok=True)


def _is_whole(out: Path, job: Job, part: int) -> bool:
    try:
        rows = pq.read_metadata(out / _PART.format(part)).num_rows
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        return False
    return bool(rows == len(range(job.images)[job.slice(part)]))
