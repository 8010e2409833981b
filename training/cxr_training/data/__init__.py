"""Data sets to manifest to splits: what stands before training.

A manifest is a table with one row for each image (:mod:`cxr_training.data.manifest`). Its groups
hold together what must not be parted (:mod:`cxr_training.data.grouping`), and splits respect them
(:mod:`cxr_training.data.splits`).
"""

from cxr_training.data.errors import DataError
from cxr_training.data.grouping import assign_groups
from cxr_training.data.labels import COVID, NO_FINDING, PNEUMONIA
from cxr_training.data.manifest import (
    COLUMNS,
    SPLITS,
    ManifestReport,
    build_manifest,
    manifest_digest,
    read_manifest,
    validate_manifest,
    write_manifest,
)
from cxr_training.data.phantoms import PHANTOM_LABELS, generate_phantoms
from cxr_training.data.readers import READERS, Exclusion, Reader, Record
from cxr_training.data.splits import assign_splits
from cxr_training.data.summary import ManifestSummary, summarize

__all__ = [
    "COLUMNS",
    "COVID",
    "NO_FINDING",
    "PHANTOM_LABELS",
    "PNEUMONIA",
    "READERS",
    "SPLITS",
    "DataError",
    "Exclusion",
    "ManifestReport",
    "ManifestSummary",
    "Reader",
    "Record",
    "assign_groups",
    "assign_splits",
    "build_manifest",
    "generate_phantoms",
    "manifest_digest",
    "read_manifest",
    "summarize",
    "validate_manifest",
    "write_manifest",
]
