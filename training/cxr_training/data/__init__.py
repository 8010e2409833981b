"""Data sets to manifest to splits: what stands before training.

A manifest is a table with one row for each image (:mod:`cxr_training.data.manifest`). Its groups
hold together what must not be parted (:mod:`cxr_training.data.grouping`), and splits respect them
(:mod:`cxr_training.data.splits`).
"""

from cxr_training.data.audit import Leak, LeakAudit, LeakExample, audit_split
from cxr_training.data.errors import DataError
from cxr_training.data.grouping import assign_groups
from cxr_training.data.labels import (
    COVID,
    DEFAULT_TASK,
    FINDINGS,
    NO_FINDING,
    PNEUMONIA,
    TASKS,
    Task,
)
from cxr_training.data.manifest import (
    COLUMNS,
    EXCLUDED,
    SPLITS,
    ManifestReport,
    build_manifest,
    manifest_digest,
    read_manifest,
    relabel,
    validate_manifest,
    write_manifest,
)
from cxr_training.data.phantoms import PHANTOM_LABELS, generate_phantoms
from cxr_training.data.readers import READERS, Exclusion, Reader, Record
from cxr_training.data.splits import (
    SourceFold,
    SplitKind,
    assign_splits,
    grouped_folds,
    leave_one_source_out,
)
from cxr_training.data.summary import ManifestSummary, summarize

__all__ = [
    "COLUMNS",
    "COVID",
    "DEFAULT_TASK",
    "EXCLUDED",
    "FINDINGS",
    "NO_FINDING",
    "PHANTOM_LABELS",
    "PNEUMONIA",
    "READERS",
    "SPLITS",
    "TASKS",
    "DataError",
    "Exclusion",
    "Leak",
    "LeakAudit",
    "LeakExample",
    "ManifestReport",
    "ManifestSummary",
    "Reader",
    "Record",
    "SourceFold",
    "SplitKind",
    "Task",
    "assign_groups",
    "assign_splits",
    "audit_split",
    "build_manifest",
    "generate_phantoms",
    "grouped_folds",
    "leave_one_source_out",
    "manifest_digest",
    "read_manifest",
    "relabel",
    "summarize",
    "validate_manifest",
    "write_manifest",
]
