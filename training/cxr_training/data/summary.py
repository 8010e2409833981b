"""Figures about a manifest that show what a model could learn the wrong way."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from cxr_training.data.audit import leaked_by_group, random_splits
from cxr_training.data.errors import DataError
from cxr_training.data.manifest import SPLITS, manifest_digest

_LARGEST = 5


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group: its id, the number of its images, their sources and labels."""

    group: str
    images: int
    sources: list[str]
    labels: list[str]


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Images and groups of one split, and its images by label."""

    images: int
    groups: int
    labels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ManifestSummary:
    """Counts over a manifest.

    Attributes:
        images: number of images.
        patients: number of known patients.
        images_without_patient: images whose patient is not known.
        groups: number of groups.
        synthetic: number of phantom images.
        labels: images by label, by source: `labels[source][label]`.
        largest_groups: the largest groups, largest first.
        cross_source_groups: groups with images of more than one source.
        cross_source_images: images in those groups.
        shared_groups: for each pair of sources with groups in common (`a + b`), their number.
        random_split: what the study's random split would do, as the mean of a few: `test_images`,
            and `leaked`, those of them with an image of the same group in training; None where a
            class has too few images to split. :func:`cxr_training.data.audit_split` says more.
        sha256: digest of the manifest.
    """

    images: int
    patients: int
    images_without_patient: int
    groups: int
    synthetic: int
    labels: dict[str, dict[str, int]]
    largest_groups: list[Group]
    cross_source_groups: int
    cross_source_images: int
    shared_groups: dict[str, int]
    random_split: dict[str, int] | None
    sha256: str


def summarize(frame: pd.DataFrame) -> ManifestSummary:
    """Count a valid manifest."""
    sources = frame.groupby("group")["source"].transform("nunique")
    members = frame.groupby("source")["group"].agg(set)
    shared = {f"{a} + {b}": len(members[a] & members[b]) for a, b in combinations(members.index, 2)}
    table = pd.crosstab(frame["source"], frame["label"])
    return ManifestSummary(
        images=len(frame),
        patients=frame["patient"].nunique(),
        images_without_patient=int(frame["patient"].isna().sum()),
        groups=frame["group"].nunique(),
        synthetic=int(frame["synthetic"].sum()),
        labels={
            str(source): {str(label): int(count) for label, count in row.items()}
            for source, row in table.iterrows()
        },
        largest_groups=_largest_groups(frame),
        cross_source_groups=frame.loc[sources > 1, "group"].nunique(),
        cross_source_images=int((sources > 1).sum()),
        shared_groups={pair: count for pair, count in shared.items() if count},
        random_split=_random_split(frame),
        sha256=manifest_digest(frame),
    )


def count_splits(frame: pd.DataFrame) -> dict[str, SplitCounts]:
    """Count each split of a manifest whose images are assigned; every label is listed."""
    labels = sorted(frame["label"].unique())
    parts = {name: frame[frame["split"] == name] for name in SPLITS}
    return {
        name: SplitCounts(
            images=len(part),
            groups=part["group"].nunique(),
            labels={label: int((part["label"] == label).sum()) for label in labels},
        )
        for name, part in parts.items()
    }


def _random_split(frame: pd.DataFrame) -> dict[str, int] | None:
    try:
        splits = random_splits(frame, seed=0)
    except DataError:
        return None
    return {
        "test_images": round(np.mean([(split == "test").sum() for split in splits])),
        "leaked": round(np.mean([leaked_by_group(frame, split).sum() for split in splits])),
    }


def _largest_groups(frame: pd.DataFrame) -> list[Group]:
    groups = frame.groupby("group").agg(
        images=("sha256", "size"), sources=("source", "unique"), labels=("label", "unique")
    )
    groups = groups.reset_index().sort_values(["images", "group"], ascending=[False, True])
    return [
        Group(
            group=row["group"],
            images=int(row["images"]),
            sources=sorted(row["sources"]),
            labels=sorted(row["labels"]),
        )
        for row in groups.head(_LARGEST).to_dict(orient="records")
    ]
