"""Readers: one function for each folder layout, from files to records.

A reader only names what a folder says about its images; it opens no image, but the headers of DICOM
files. It yields a `Record` for an image to use and an `Exclusion` for one to leave out, so that
nothing disappears uncounted.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import pandas as pd

from cxr.dicom import is_dicom, read_tags
from cxr.errors import BadImageError
from cxr_training.data.errors import DataError
from cxr_training.data.labels import COVID, folder_finding, text_finding
from cxr_training.data.phantoms import METADATA_COLUMNS

UNREADABLE = "unreadable"
UNLABELLED = "unlabelled"
LATERAL = "lateral view"
NOT_A_RADIOGRAPH = "not a radiograph"
SEGMENTATION_MASK = "segmentation mask"
FILE_MISSING = "file missing"
NO_METADATA_ROW = "no metadata row"

_LATERAL_VIEWS = ("l", "ll", "rl")
_METADATA = "metadata.csv"
_IMAGES = "images"
_MASKS = "masks"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
_OZTURK_FOLDERS = ("Covid-19", "No_findings", "Pneumonia")
_COHEN_COLUMNS = ("patientid", "finding", "view", "modality", "filename")
_CXNET_COLUMNS = ("filename", "patient_id", "view", "label", "pcr_test")
_CHOWDHURY_FOLDERS = ("COVID", "Normal")
_CHOWDHURY_COLUMNS = ("FILE NAME", "URL")
_DICOM_TAGS: list[int | str] = ["PatientID", "PatientSex", "PatientAge", "ViewPosition"]
_HEAD_BYTES = 132


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a data set says about one image.

    Attributes:
        path: the image file, which exists.
        finding: canonical finding, or the data set's own name for one that has none.
        finding_text: the data set's own words for it, where it has any.
        source: name of the data set.
        origin: where the data set has the image from, as a URL, where it says so.
        patient: patient, namespaced (`cohen:12`), where it is known.
        view: projection (`PA`, `AP`, `AP Supine`, ...), where it is known.
        sex: `F` or `M`, where it is known.
        age: in years, where it is known.
        synthetic: True for a phantom.
    """

    path: Path
    finding: str
    finding_text: str | None = None
    source: str
    origin: str | None = None
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
            finding=folder_finding(path.parent.name),
            finding_text=path.parent.name,
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
        if reason := _not_frontal(row):
            yield Exclusion(path=path, reason=reason)
        else:
            yield _record(path, row, row["finding"], source="cohen", patient=row["patientid"])
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
        else:
            yield _record(path, row, row["label"], source="cxnet", patient=row["patient_id"])
    for path in _without_row(folder, rows):
        yield Record(path=path, finding=COVID, source="cxnet")


# Chowdhury et al.: COVID-19 Radiography Database


def _is_chowdhury(folder: Path) -> bool:
    return all((folder / name / _IMAGES).is_dir() for name in _CHOWDHURY_FOLDERS)


def read_chowdhury(folder: Path) -> Iterator[Entry]:
    """Chowdhury et al., COVID-19 Radiography Database: `images/` and `masks/` for each class.

    `<class>.metadata.xlsx` beside the folders says where an image comes from. Most of these
    addresses are of a whole collection. One of a case or article counts as one patient: too coarse
    where it shows several, but never a patient on both sides of a split.
    """
    for class_folder in (child for child in _folders(folder) if (child / _IMAGES).is_dir()):
        origins = _origins(folder / f"{class_folder.name}.metadata.xlsx")
        for path in _files(class_folder / _IMAGES):
            origin = origins.get(path.stem.lower())
            yield Record(
                path=path,
                finding=folder_finding(class_folder.name),
                finding_text=class_folder.name,
                source="chowdhury",
                origin=origin,
                patient=f"chowdhury:{origin}" if origin and _CASE_ADDRESS.search(origin) else None,
            )
        for path in _files(class_folder / _MASKS):
            yield Exclusion(path=path, reason=SEGMENTATION_MASK)


_CASE_ADDRESS = re.compile(
    r"/(?: cases? | articles? | doi | full ) / [^/]+ | doi\.org/", re.VERBOSE
)


def _origins(path: Path) -> dict[str, str]:
    """URL by file name, in lower case without suffix; nothing where there is no such table."""
    if not path.is_file():
        return {}
    try:
        frame = pd.read_excel(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path} is not an Excel table that can be read.") from error
    frame.columns = frame.columns.str.strip().str.upper()
    if missing := [column for column in _CHOWDHURY_COLUMNS if column not in frame]:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}.")
    # The tables write `NORMAL-1` for the file `Normal-1.png`.
    names = frame["FILE NAME"].str.strip().str.lower()
    return {name: url for name, url in zip(names, frame["URL"].str.strip(), strict=True) if url}


# DICOM files, a folder per class


def _is_dicom(folder: Path) -> bool:
    classes = _folders(folder)
    return len(classes) > 1 and any(map(_starts_as_dicom, (_first_file(c) for c in classes)))


def read_dicom(folder: Path) -> Iterator[Entry]:
    """A folder for each class, with DICOM files at any depth below it.

    A patient's identifier becomes a hash, so that none stands in a manifest. Files of another kind
    are taken too, as images of an unknown patient. What is no frontal radiograph of the chest is
    left out: a lateral view here, the rest when the image is decoded.
    """
    source = folder.resolve().name
    for class_folder in _folders(folder):
        for path in sorted(path for path in class_folder.rglob("[!.]*") if path.is_file()):
            record = Record(
                path=path,
                finding=folder_finding(class_folder.name),
                finding_text=class_folder.name,
                source=source,
            )
            yield _with_header(record) if _starts_as_dicom(path) else record


def _with_header(record: Record) -> Entry:
    """A record with what the header of its DICOM file says."""
    try:
        with record.path.open("rb") as file:
            header = read_tags(file, _DICOM_TAGS)
        tags = {str(name): str(header.get(name) or "").strip() or None for name in _DICOM_TAGS}
    except (BadImageError, OSError, ValueError):
        return Exclusion(path=record.path, reason=UNREADABLE)
    row = {"view": tags["ViewPosition"]}
    if reason := _not_frontal(row):
        return Exclusion(path=record.path, reason=reason)
    return replace(
        record,
        patient=_pseudonym(tags["PatientID"]),
        view=_view(row),
        sex=_sex(tags["PatientSex"]),
        age=_dicom_age(tags["PatientAge"]),
    )


def _pseudonym(identifier: str | None) -> str | None:
    if identifier is None:
        return None
    return f"dicom:{hashlib.sha256(identifier.encode()).hexdigest()[:16]}"


def _dicom_age(text: str | None) -> float | None:
    """Years from an age string (`070Y`, `018M`, `003W`, `010D`)."""
    match = re.fullmatch(r"(\d{1,3})([YMWD])", text or "")
    return int(match[1]) / {"Y": 1, "M": 12, "W": 52.18, "D": 365.25}[match[2]] if match else None


def _first_file(folder: Path) -> Path | None:
    return next((path for path in sorted(folder.rglob("[!.]*")) if path.is_file()), None)


def _starts_as_dicom(path: Path | None) -> bool:
    if path is None:
        return False
    with path.open("rb") as file:
        return is_dicom(file.read(_HEAD_BYTES))


# Phantoms


def _is_phantom(folder: Path) -> bool:
    return _has_columns(folder, METADATA_COLUMNS)


def read_phantom(folder: Path) -> Iterator[Entry]:
    """The tree that :func:`cxr_training.data.generate_phantoms` writes."""
    for row in _metadata(folder, METADATA_COLUMNS):
        path = folder / _IMAGES / str(row["filename"])
        yield _record(
            path, row, row["label"], source=f"phantom-{row['style']}",
            patient=row["patient"], namespace="phantom", synthetic=True,
        )  # fmt: skip


# Any folder per class


def _is_folder_per_class(folder: Path) -> bool:
    return len([child for child in _folders(folder) if _holds_images(child)]) > 1


def read_folder_per_class(folder: Path) -> Iterator[Entry]:
    """A folder for each class, with images in it or one level below.

    The finding is the class folder's name, in canonical spelling where that is known. A folder
    `masks` within a class holds segmentations, not radiographs.
    """
    source = folder.resolve().name
    for class_folder in _folders(folder):
        finding = folder_finding(class_folder.name)
        for child in [class_folder, *_folders(class_folder)]:
            for path in _files(child):
                if child.name.lower() == _MASKS:
                    yield Exclusion(path=path, reason=SEGMENTATION_MASK)
                else:
                    yield Record(
                        path=path, finding=finding, finding_text=class_folder.name, source=source
                    )


# A layout that fits many folders stands last.
READERS: dict[str, Reader] = {
    "phantom": Reader(detects=_is_phantom, read=read_phantom),
    "cohen": Reader(detects=_is_cohen, read=read_cohen),
    "cxnet": Reader(detects=_is_cxnet, read=read_cxnet),
    "ozturk": Reader(detects=_is_ozturk, read=read_ozturk),
    "chowdhury": Reader(detects=_is_chowdhury, read=read_chowdhury),
    "dicom": Reader(detects=_is_dicom, read=read_dicom),
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
    text: str | None,
    *,
    source: str,
    patient: str | None,
    namespace: str | None = None,
    synthetic: bool = False,
) -> Entry:
    if (finding := text_finding(text or "")) is None:
        return Exclusion(path=path, reason=UNLABELLED)
    if not path.is_file():
        return Exclusion(path=path, reason=FILE_MISSING)
    return Record(
        path=path,
        finding=finding,
        finding_text=text,
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
    return LATERAL if view in _LATERAL_VIEWS or view.startswith("lat") else None


def _sex(text: str | None) -> str | None:
    first = (text or "").upper()[:1]
    return first if first in ("F", "M") else None


def _age(text: str | None) -> float | None:
    age = pd.to_numeric(text or "", errors="coerce")
    return None if pd.isna(age) else float(age)
