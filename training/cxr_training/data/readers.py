"""Readers: one function for each folder layout, from files to records.

A reader only names what a folder says about its images; it opens no image. It yields a `Record`
for an image to use and an `Exclusion` for one to leave out, so that nothing disappears uncounted.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cxr_training.data.errors import DataError
from cxr_training.data.labels import COVID, finding_label, folder_label
from cxr_training.data.phantoms import METADATA_COLUMNS

UNLABELLED = "unlabelled"
LATERAL = "lateral view"
NOT_A_RADIOGRAPH = "not a radiograph"
SEGMENTATION_MASK = "segmentation mask"
FILE_MISSING = "file missing"
NO_METADATA_ROW = "no metadata row"

_METADATA = "metadata.csv"
_IMAGES = "images"
_MASKS = "masks"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_OZTURK_FOLDERS = ("Covid-19", "No_findings", "Pneumonia")
_COHEN_COLUMNS = ("patientid", "finding", "view", "modality", "filename")
_CXNET_COLUMNS = ("filename", "patient_id", "view", "label", "pcr_test")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a data set says about one image.

    Attributes:
        path: the image file, which exists.
        label: canonical label, or the data set's own name for a class without one.
        source: name of the data set.
        patient: patient, namespaced (`cohen:12`), where it is known.
        view: projection (`PA`, `AP`, `AP Supine`, ...), where it is known.
        sex: `F` or `M`, where it is known.
        age: in years, where it is known.
        synthetic: True for a phantom.
    """

    path: Path
    label: str
    source: str
    patient: str | None = None
    view: str | None = None
    sex: str | None = None
    age: float | None = None
    synthetic: bool = False


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """An image that a reader leaves out, and why."""

    path: Path
    reason: str


Entry = Record | Exclusion


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A folder layout.

    Attributes:
        detects: whether a folder has this layout.
        read: the folder's images, in a fixed order.
    """

    detects: Callable[[Path], bool]
    read: Callable[[Path], Iterator[Entry]]


def find_reader(folder: Path, layout: str = "auto") -> Reader:
    """The reader for a folder.

    Args:
        folder: the data set's folder.
        layout: a name in `READERS`, or `auto` to recognise it.

    Raises:
        DataError: no such folder, no such layout, or none that fits.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    if layout != "auto":
        if layout not in READERS:
            raise DataError(f"Unknown layout '{layout}'; choose auto, {', '.join(READERS)}.")
        return READERS[layout]
    for reader in READERS.values():
        if reader.detects(folder):
            return reader
    raise DataError(f"{folder} has none of the known layouts: {', '.join(READERS)}.")


# Ozturk et al.: a folder per class


def case_key(stem: str) -> str:
    """The case or publication that a file name stands for, for images without a patient id.

    Images cut from a publication carry its identifier and a part (`nejmc2001573_f1a`,
    `covid-19-pneumonia-24-day6`). The part is cut off, so that all images of a publication count
    as one patient: too coarse where it shows several, but never a patient on both sides of a
    split. A name without a part stays whole.

    Args:
        stem: file name without its suffix.
    """
    head = re.split(_PART, stem, maxsplit=1)[0]
    return re.sub(_TAIL, "", head) or stem


_PART = re.compile(
    r"""
      [-_.]? (?: main\.pdf | pdf- | webp- )           # page of an article
    | [-_.] (?: fig | figure ) -? \d                  # figure number
    | _f \d                                           # ... nejmc2001573_f1a
    | - gr? \d+ (?: [-_] l ){0,1}                     # ... kjr-21-e24-g001-l-a, -gr2_lrg-a
    | -day | - \d+ - (?: hour | day | week ) s? $     # day of a series
    | -admission
    | (?<=auntminnie) -                               # auntminnie-a-2020_01_28_...
    """,
    re.VERBOSE | re.IGNORECASE,
)
_TAIL = re.compile(
    r"(?: [-_] (?: pa | ap | ap-?supine | l | left | right | [a-f]\d? ) | (?<=case\d) [a-f] )+ $",
    re.VERBOSE | re.IGNORECASE,
)
_NIH_NAME = re.compile(r"(\d{8})_\d{3}")


def _is_ozturk(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in _OZTURK_FOLDERS)


def read_ozturk(folder: Path) -> Iterator[Entry]:
    """Ozturk et al. 2020: NIH ChestX-ray8 images, named by patient, and COVID-19 images."""
    for path in (path for name in _OZTURK_FOLDERS for path in _files(folder / name)):
        nih = _NIH_NAME.fullmatch(path.stem)
        yield Record(
            path=path,
            label=folder_label(path.parent.name),
            source="ozturk",
            patient=f"nih:{nih[1]}" if nih else f"ozturk:{case_key(path.stem)}",
        )


# Cohen et al.: covid-chestxray-dataset


def _is_cohen(folder: Path) -> bool:
    return _has_columns(folder, _COHEN_COLUMNS)


def read_cohen(folder: Path) -> Iterator[Entry]:
    """Cohen et al., covid-chestxray-dataset: `metadata.csv` and `images/`."""
    rows = _metadata(folder, _COHEN_COLUMNS)
    for row in rows:
        path = folder / _IMAGES / str(row["filename"])
        label = finding_label(row["finding"] or "")
        if reason := _not_frontal(row):
            yield Exclusion(path=path, reason=reason)
        elif label is None:
            yield Exclusion(path=path, reason=UNLABELLED)
        else:
            yield _record(path, row, label=label, source="cohen", patient=row["patientid"])
    yield from (Exclusion(path=path, reason=NO_METADATA_ROW) for path in _without_row(folder, rows))


# Haghanifar et al.: COVID-CXNet


def _is_cxnet(folder: Path) -> bool:
    return _has_columns(folder, _CXNET_COLUMNS)


def read_cxnet(folder: Path) -> Iterator[Entry]:
    """Haghanifar et al., COVID-CXNet: `metadata.csv` and `images/`, all COVID-19.

    A file without a row is COVID-19 as well, of an unknown patient. A row without a label is left
    out: its authors withheld the label (from a patient who tested negative).
    """
    rows = _metadata(folder, _CXNET_COLUMNS)
    for row in rows:
        path = folder / _IMAGES / str(row["filename"])
        if reason := _not_frontal(row):
            yield Exclusion(path=path, reason=reason)
        elif (label := finding_label(row["label"] or "")) is None:
            yield Exclusion(path=path, reason=UNLABELLED)
        else:
            yield _record(path, row, label=label, source="cxnet", patient=row["patient_id"])
    for path in _without_row(folder, rows):
        yield Record(path=path, label=COVID, source="cxnet")


# Phantoms


def _is_phantom(folder: Path) -> bool:
    return _has_columns(folder, METADATA_COLUMNS)


def read_phantom(folder: Path) -> Iterator[Entry]:
    """The tree that :func:`cxr_training.data.generate_phantoms` writes."""
    for row in _metadata(folder, METADATA_COLUMNS):
        path = folder / _IMAGES / str(row["filename"])
        if not row["label"]:
            yield Exclusion(path=path, reason=UNLABELLED)
            continue
        yield _record(
            path, row, label=row["label"], source=f"phantom-{row['style']}",
            patient=row["patient"], namespace="phantom", synthetic=True,
        )  # fmt: skip


# Any folder per class


def _is_folder_per_class(folder: Path) -> bool:
    return len([child for child in _folders(folder) if _holds_images(child)]) > 1


def read_folder_per_class(folder: Path) -> Iterator[Entry]:
    """A folder for each class, with images in it or one level below.

    The label is the class folder's name, in canonical spelling where that is known. A folder
    `masks` within a class holds segmentations, not radiographs.
    """
    source = folder.resolve().name
    for class_folder in _folders(folder):
        label = folder_label(class_folder.name)
        for child in [class_folder, *_folders(class_folder)]:
            for path in _files(child):
                if child.name.lower() == _MASKS:
                    yield Exclusion(path=path, reason=SEGMENTATION_MASK)
                else:
                    yield Record(path=path, label=label, source=source)


# A layout that fits many folders stands last.
READERS: dict[str, Reader] = {
    "phantom": Reader(detects=_is_phantom, read=read_phantom),
    "cohen": Reader(detects=_is_cohen, read=read_cohen),
    "cxnet": Reader(detects=_is_cxnet, read=read_cxnet),
    "ozturk": Reader(detects=_is_ozturk, read=read_ozturk),
    "folder-per-class": Reader(detects=_is_folder_per_class, read=read_folder_per_class),
}


# Files and metadata

Row = dict[str, str | None]


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """All files but hidden ones: one that is no image must be counted as unreadable."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def _holds_images(folder: Path) -> bool:
    return any(
        path.suffix.lower() in _IMAGE_SUFFIXES
        for child in [folder, *_folders(folder)]
        for path in _files(child)
    )


def _has_columns(folder: Path, columns: tuple[str, ...]) -> bool:
    try:
        return set(columns) <= set(pd.read_csv(folder / _METADATA, nrows=0).columns)
    except (OSError, ValueError):  # pandas' parser and encoding errors are ValueErrors
        return False


def _metadata(folder: Path, columns: tuple[str, ...]) -> list[Row]:
    """Rows of `metadata.csv`: text without surrounding space, None for an empty cell."""
    path = folder / _METADATA
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise DataError(f"{folder} has no {_METADATA}, which this layout needs.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    if missing := [column for column in columns if column not in frame]:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}.")
    return [
        {str(key): value.strip() or None for key, value in row.items()}
        for row in frame.to_dict(orient="records")
        if row["filename"].strip()
    ]


def _without_row(folder: Path, rows: list[Row]) -> list[Path]:
    named = {row["filename"] for row in rows}
    return [path for path in _files(folder / _IMAGES) if path.name not in named]


def _record(
    path: Path,
    row: Row,
    *,
    label: str | None,
    source: str,
    patient: str | None,
    namespace: str | None = None,
    synthetic: bool = False,
) -> Entry:
    if label is None or not path.is_file():
        return Exclusion(path=path, reason=FILE_MISSING)
    return Record(
        path=path,
        label=label,
        source=source,
        patient=f"{namespace or source}:{patient}" if patient else None,
        view=_view(row),
        sex=_sex(row.get("sex")),
        age=_age(row.get("age")),
        synthetic=synthetic,
    )


def _view(row: Row) -> str | None:
    view = row["view"]
    return None if view in (None, "?") else view


def _not_frontal(row: Row) -> str | None:
    """Why an image is not a frontal radiograph, or None if it is."""
    modality = row.get("modality")
    if modality and modality.lower() not in ("x-ray", "xray", "cxr"):
        return NOT_A_RADIOGRAPH
    view = (_view(row) or "").lower()
    return LATERAL if view == "l" or view.startswith("lat") else None


def _sex(text: str | None) -> str | None:
    first = (text or "").upper()[:1]
    return first if first in ("F", "M") else None


def _age(text: str | None) -> float | None:
    age = pd.to_numeric(text or "", errors="coerce")
    return None if pd.isna(age) else float(age)
