"""The manifest: one row for each image, with all that training needs to know about it."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import imagehash
import pandas as pd
from tqdm import tqdm

from cxr.decode import decode
from cxr.errors import BadImageError, Rejection
from cxr_training.data.errors import DataError
from cxr_training.data.grouping import (
    NearDuplicates,
    assign_groups,
    near_duplicates,
    rename_groups,
)
from cxr_training.data.labels import DEFAULT_TASK, find_task
from cxr_training.data.readers import (
    NOT_A_RADIOGRAPH,
    UNREADABLE,
    Entry,
    Exclusion,
    Record,
    find_reader,
)

NOT_OF_THE_CHEST = "not of the chest"
SEVERAL_FRAMES = "several frames"
DUPLICATE = "byte-identical duplicate"
CONFLICTING = "byte-identical with another finding"
# Why the decoder refuses an image; any other reason makes it unreadable.
_EXCLUSIONS = {
    Rejection.MULTIPLE_FRAMES: SEVERAL_FRAMES,
    Rejection.WRONG_BODY_PART: NOT_OF_THE_CHEST,
    Rejection.WRONG_MODALITY: NOT_A_RADIOGRAPH,
}

SPLITS = ("train", "validation", "test")
COLUMNS = (
    "path", "label", "finding", "finding_text", "source", "origin", "patient", "view", "sex",
    "age", "sha256", "dhash", "group", "synthetic",
)  # fmt: skip
_NULLABLE_TEXT = ("finding_text", "origin", "patient", "view", "sex")
_PATTERNS = {
    "sex": r"[FM]",
    "sha256": r"[0-9a-f]{64}",
    "dhash": r"[0-9a-f]{64}",
    "split": "|".join(SPLITS),
}
_DIGEST_COLUMNS = ["sha256", "label", "source", "patient", "group"]
_HASH_SIZE = 16  # 16 x 16 differences: 256 bits

# Counts of what was left out travel with the frame, into the Parquet file and out of it.
EXCLUDED = "excluded"

# A row of the manifest without its group, or why the image does not enter it.
HashedEntry = dict[str, object] | Exclusion


@dataclass(frozen=True)
class ManifestReport:
    """A manifest, and what did not enter it.

    Attributes:
        frame: the manifest.
        excluded: number of images left out, by reason.
    """

    frame: pd.DataFrame
    excluded: dict[str, int]


def build_manifest(
    folders: Sequence[Path],
    *,
    layout: str = "auto",
    task: str = DEFAULT_TASK,
    progress: bool = True,
) -> ManifestReport:
    """Read data sets into one manifest, with groups.

    Images that cannot be decoded are left out and counted. Of byte-identical images within a
    source, the first by path stays; if their findings differ, none does. Groups are found among
    all images, before copies and those that the task has no class for are left out.

    Args:
        folders: one folder for each data set.
        layout: name of the layout of all folders, or `auto` to recognise each.
        task: which classes to make of the findings; a name in :data:`labels.TASKS`.
        progress: draw a progress bar when stderr is a terminal.

    Returns:
        The manifest, ordered by source and path, without a `split` column. Its `attrs` hold the
        counts of what was left out under :data:`EXCLUDED`.

    Raises:
        DataError: a folder is missing, has an unknown layout, or has no usable image; the task is
            unknown.
    """
    find_task(task)
    entries = list_entries(folders, layout)
    total = sum(map(len, entries.values()))
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc="images", unit="image", disable=None if progress else True) as bar,
    ):
        results: dict[Path, list[HashedEntry]] = {folder: [] for folder in entries}
        for folder, found in entries.items():
            for result in pool.map(hash_entry, found):
                bar.update()
                results[folder].append(result)
    return assemble_manifest(results, task=task)


def list_entries(folders: Sequence[Path], layout: str) -> dict[Path, list[Entry]]:
    """What each data set says about its images, in the order of the folders.

    Raises:
        DataError: no folder is named, or one is missing or has an unknown layout.
    """
    if not folders:
        raise DataError("Name at least one folder.")
    return {folder: list(find_reader(folder, layout).read(folder)) for folder in folders}


def assemble_manifest(
    results: Mapping[Path, Sequence[HashedEntry]],
    near_duplicates: NearDuplicates = near_duplicates,
    *,
    task: str = DEFAULT_TASK,
) -> ManifestReport:
    """Make the manifest from hashed records, however they were computed.

    Args:
        results: for each folder, its entries in the readers' order, after :func:`hash_entry`.
        near_duplicates: finds the near-duplicates, as in :func:`assign_groups`.
        task: as in :func:`build_manifest`.

    Raises:
        DataError: a folder has no usable image, or none is left in all of them.
    """
    excluded: Counter[str] = Counter()
    rows: list[dict[str, object]] = []
    for folder, found in results.items():
        usable = [result for result in found if not isinstance(result, Exclusion)]
        excluded.update(result.reason for result in found if isinstance(result, Exclusion))
        if not usable:
            raise DataError(f"{folder} holds no image that can be used.")
        rows += usable
    frame = pd.DataFrame(rows).sort_values(["source", "path"])
    # Of all: a copy that is left out may be what shows that two patients are one.
    frame["group"] = assign_groups(frame, near_duplicates)
    frame = _without_duplicates(frame, excluded)
    if frame.empty:
        raise DataError("No image is left: all have copies with another finding.")
    frame = frame.assign(group=rename_groups(frame)).reset_index(drop=True)
    report = relabel(frame.assign(label=""), task)
    excluded.update(report.excluded)
    counts = dict(sorted(excluded.items()))
    report.frame.attrs[EXCLUDED] = counts
    return ManifestReport(report.frame, counts)


def relabel(frame: pd.DataFrame, task: str) -> ManifestReport:
    """The same manifest for another task.

    What an earlier task left out stays out: for a task with more findings, build the manifest anew.

    Args:
        frame: a manifest; its labels are not used.
        task: a name in :data:`labels.TASKS`.

    Returns:
        The manifest with the task's labels, and how many images it has no class for, by finding.

    Raises:
        DataError: the task is unknown, or has a class for none of the images.
    """
    label = find_task(task).label
    labels = frame["finding"].map(label)
    missing = frame.loc[labels.isna(), "finding"].value_counts().sort_index()
    excluded = {f"no class for {finding}": int(count) for finding, count in missing.items()}
    if labels.isna().all():
        raise DataError(f"The task '{task}' has a class for none of the images.")
    labelled = validate_manifest(frame.assign(label=labels)[labels.notna()])
    labelled.attrs[EXCLUDED] = Counter(frame.attrs.get(EXCLUDED, {})) + Counter(excluded)
    return ManifestReport(labelled, excluded)


def hash_entry(entry: Entry) -> HashedEntry:
    """A record with the hashes of its image; exclusions stay, and an unreadable image is one."""
    if isinstance(entry, Exclusion):
        return entry
    try:
        data = entry.path.read_bytes()
        image = decode(data)
    except BadImageError as error:
        return Exclusion(path=entry.path, reason=_EXCLUSIONS.get(error.reason, UNREADABLE))
    except OSError:
        return Exclusion(path=entry.path, reason=UNREADABLE)
    return _row(entry) | {
        "sha256": hashlib.sha256(data).hexdigest(),
        "dhash": str(imagehash.dhash(image.convert("L"), hash_size=_HASH_SIZE)),
    }


def _row(record: Record) -> dict[str, object]:
    return asdict(record) | {"path": str(record.path.absolute())}


def _without_duplicates(frame: pd.DataFrame, excluded: Counter[str]) -> pd.DataFrame:
    same_bytes = frame.groupby(["source", "sha256"])
    conflicting = same_bytes["finding"].transform("nunique") > 1
    duplicate = frame.duplicated(["source", "sha256"]) & ~conflicting
    for reason, mask in ((CONFLICTING, conflicting), (DUPLICATE, duplicate)):
        if mask.any():
            excluded[reason] += int(mask.sum())
    return frame[~conflicting & ~duplicate]


def validate_manifest(frame: pd.DataFrame) -> pd.DataFrame:
    """Check a manifest and give its columns their fixed order and types.

    Args:
        frame: columns of `COLUMNS`, and `split` if images are assigned to splits.

    Returns:
        A copy: text as Python strings with None for null, `age` float64 in years, `synthetic`
        bool, rows numbered from 0.

    Raises:
        DataError: a column is missing, empty where it must not be, or holds other values.
    """
    columns = [*COLUMNS, *(["split"] if "split" in frame else [])]
    if missing := [column for column in columns if column not in frame]:
        raise DataError(f"The manifest lacks the columns {', '.join(missing)}.")
    if frame.empty:
        raise DataError("The manifest has no rows.")
    checked = frame[columns].reset_index(drop=True)
    for column in columns:
        if column in ("age", "synthetic"):
            continue
        text = checked[column].astype(object)
        text = text.where(text.notna(), None)
        if column not in _NULLABLE_TEXT and text.isna().any():
            raise DataError(f"The manifest has rows without a value for '{column}'.")
        known = text.dropna()
        if not known.map(lambda value: isinstance(value, str)).all():
            raise DataError(f"The manifest's column '{column}' must hold text.")
        pattern = _PATTERNS.get(column)
        if pattern and not known.str.fullmatch(pattern).all():
            raise DataError(f"The manifest's column '{column}' holds values that do not belong.")
        checked[column] = text
    try:
        checked["age"] = checked["age"].astype("float64")
    except (TypeError, ValueError):
        raise DataError("The manifest's column 'age' must hold years as numbers.") from None
    if checked["synthetic"].dtype != bool:
        raise DataError("The manifest's column 'synthetic' must hold true or false.")
    return checked


def write_manifest(frame: pd.DataFrame, path: Path) -> None:
    """Write a manifest as Parquet; folders above `path` are made.

    Raises:
        DataError: the frame is not a valid manifest.
        OSError: the file cannot be written.
    """
    checked = validate_manifest(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    checked.to_parquet(path, index=False)


def read_manifest(path: Path) -> pd.DataFrame:
    """Read a manifest that :func:`write_manifest` wrote.

    Returns:
        The manifest, as :func:`validate_manifest` describes it.

    Raises:
        DataError: no such file, not Parquet, or not a valid manifest.
    """
    if not path.is_file():
        raise DataError(f"There is no manifest {path}; make one with 'cxr data manifest'.")
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError):  # pyarrow's errors are ValueErrors
        raise DataError(f"{path} is not a Parquet file.") from None
    return validate_manifest(frame)


def manifest_digest(frame: pd.DataFrame, *, splits: bool = False) -> str:
    """SHA-256 over what the manifest says about the images, in hexadecimal.

    It covers file hash, label, source, patient and group, and depends neither on where the files
    lie nor on the order of the rows.

    Args:
        frame: a manifest.
        splits: cover each image's split, too.
    """
    columns = [*_DIGEST_COLUMNS, *(["split"] if splits else [])]
    table = frame[columns].fillna("").sort_values(columns)
    text = table.to_json(orient="values", force_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
