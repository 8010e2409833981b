"""The manifest as a Spark job: decoding, hashing and comparing on executors.

What is cheap stays on the driver, in the functions of the single-machine path: listing the files,
naming the groups, leaving out byte-identical copies. That takes a few hundred bytes for each image.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from pyspark.sql import SparkSession

from cxr_training.data.errors import DataError
from cxr_training.data.labels import DEFAULT_TASK, find_task
from cxr_training.data.manifest import (
    HashedEntry,
    ManifestReport,
    assemble_manifest,
    hash_entry,
    list_entries,
)
from cxr_training.data.readers import Entry
from cxr_training.spark.near import find_near_duplicates
from cxr_training.spark.session import cores

_ENTRIES_PER_TASK = 200


def build_manifest(
    spark: SparkSession,
    folders: Sequence[Path],
    *,
    layout: str = "auto",
    task: str = DEFAULT_TASK,
) -> ManifestReport:
    """Read data sets into one manifest, as :func:`cxr_training.data.build_manifest` does.

    The result is the same, row for row. Every executor must see the folders under the same path.

    Args:
        spark: where to decode and compare.
        folders: one folder for each data set.
        layout: name of the layout of all folders, or `auto` to recognise each.
        task: which classes to make of the findings.

    Raises:
        DataError: a folder is missing, has an unknown layout, or has no usable image; the task is
            unknown.
        Py4JError: a job failed, for instance because an executor does not see a folder.
    """
    find_task(task)
    entries = list_entries([folder.absolute() for folder in folders], layout)
    everything = [entry for found in entries.values() for entry in found]
    tasks = max(cores(spark), len(everything) // _ENTRIES_PER_TASK)
    hashed = iter(
        spark.sparkContext.parallelize(everything, max(1, min(tasks, len(everything))))
        .mapPartitions(partial(_hash_entries, folders=list(entries)))
        .collect()
    )
    results = {folder: list(islice(hashed, len(found))) for folder, found in entries.items()}
    return assemble_manifest(results, partial(find_near_duplicates, spark), task=task)


def _hash_entries(entries: Iterator[Entry], folders: Sequence[Path]) -> Iterator[HashedEntry]:
    for folder in folders:
        # Otherwise all its images would count as unreadable.
        if not folder.is_dir():
            raise DataError(f"An executor does not see {folder}; all machines must share it.")
    return map(hash_entry, entries)
