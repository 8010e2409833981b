"""What a split by image would leak: test images with a relative in training."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr_training.data.grouping import Edges, near_duplicates
from cxr_training.data.splits import assign_splits

SEEDS = 5
_EXAMPLES = 3
_DIGITS = 12

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Mean counts over the random splits.

    Attributes:
        test_images: images of the test split.
        any: those of them with an image of their group in training, by whatever links.
        patient: those with another image of their patient in training.
        near_duplicate: those with a near-duplicate in training that is no identical copy.
        identical: those with a byte-identical copy in training.
    """

    test_images: float
    any: float
    patient: float
    near_duplicate: float
    identical: float


@dataclass(frozen=True, kw_only=True)
class LeakExample:
    """A test image and its relative in training; nothing in it names a patient.

    Attributes:
        relation: `patient`, `near_duplicate` or `identical`.
        test: first digits of the test image's SHA-256.
        train: first digits of the training image's SHA-256.
        test_source: data set of the test image.
        train_source: data set of the training image.
        distance: bits in which the difference hashes differ, of 256.
    """

    relation: str
    test: str
    train: str
    test_source: str
    train_source: str
    distance: int


@dataclass(frozen=True, kw_only=True)
class LeakAudit:
    """What the study's random split (70, 20, 10 % by image) leaks.

    Attributes:
        seeds: seeds of the splits over which the counts are means.
        images: images of the manifest.
        total: over all test images.
        by_source: by data set of the test image.
        by_label: by label of the test image.
        examples: a few pairs of the first split for each relation, the closest first.
    """

    seeds: list[int]
    images: int
    total: Leak
    by_source: dict[str, Leak]
    by_label: dict[str, Leak]
    examples: list[LeakExample]


def audit_split(frame: pd.DataFrame, seed: int) -> LeakAudit:
    """Say what a random split of a manifest would leak, as the mean over `SEEDS` splits.

    Args:
        frame: a manifest with groups; a column `split` is not looked at.
        seed: of the first split; the others follow it.

    Raises:
        DataError: the seed is out of range, or a class has too few images to split.
    """
    frame = frame.reset_index(drop=True)
    splits = random_splits(frame, seed)
    links = _links(frame)
    leaked = [_leaked(frame, split, links) for split in splits]
    tested = [split == "test" for split in splits]

    def count(where: BoolArray) -> Leak:
        def mean(masks: list[BoolArray]) -> float:
            return float(np.mean([(mask & where).sum() for mask in masks]))

        return Leak(
            test_images=mean(tested),
            **{name: mean([m[name] for m in leaked]) for name in leaked[0]},
        )

    def by(column: str) -> dict[str, Leak]:
        values = frame[column].to_numpy()
        return {str(value): count(values == value) for value in sorted(set(values))}

    return LeakAudit(
        seeds=list(range(seed, seed + SEEDS)),
        images=len(frame),
        total=count(np.ones(len(frame), dtype=bool)),
        by_source=by("source"),
        by_label=by("label"),
        examples=_examples(frame, splits[0], links),
    )


def random_splits(frame: pd.DataFrame, seed: int) -> list[npt.NDArray[np.object_]]:
    """Split names `[images]` of `SEEDS` random splits, from `seed` on.

    Raises:
        DataError: the seed is out of range, or a class has too few images to split.
    """
    return [
        assign_splits(frame, seed=each, kind="random").to_numpy()
        for each in range(seed, seed + SEEDS)
    ]


def leaked_by_group(frame: pd.DataFrame, split: npt.NDArray[np.object_]) -> BoolArray:
    """Which rows are test images with an image of their group in training."""
    trained = frame["group"].isin(frame["group"][split == "train"]).to_numpy()
    leaked: BoolArray = (split == "test") & trained
    return leaked


def _links(frame: pd.DataFrame) -> dict[str, Edges]:
    """Pairs of different rows, by relation."""
    links = {"patient": _pairs(frame["patient"]), "identical": _pairs(frame["sha256"])}
    left, right = near_duplicates(frame["dhash"])
    sha256 = frame["sha256"].to_numpy()
    apart = sha256[left] != sha256[right]
    return links | {"near_duplicate": (left[apart], right[apart])}


def _pairs(column: "pd.Series[str]") -> Edges:
    """Pairs of rows with the same value, each once; null pairs with nothing."""
    rows = pd.DataFrame({"value": column, "row": np.arange(len(column))}).dropna()
    pairs = rows.merge(rows, on="value")
    pairs = pairs[pairs["row_x"] < pairs["row_y"]]
    return pairs["row_x"].to_numpy(), pairs["row_y"].to_numpy()


def _leaked(
    frame: pd.DataFrame, split: npt.NDArray[np.object_], links: dict[str, Edges]
) -> dict[str, BoolArray]:
    """By relation, which rows are test images with a relative in training."""
    training, test = split == "train", split == "test"
    masks = {"any": leaked_by_group(frame, split)}
    for name, pairs in links.items():
        masks[name] = np.zeros(len(frame), dtype=bool)
        for one, other in (pairs, pairs[::-1]):
            masks[name][one[test[one] & training[other]]] = True
    return masks


def _examples(
    frame: pd.DataFrame, split: npt.NDArray[np.object_], links: dict[str, Edges]
) -> list[LeakExample]:
    sha256, dhash, source = (frame[name].to_numpy() for name in ("sha256", "dhash", "source"))
    examples = []
    for relation, (left, right) in links.items():
        pairs = [*zip(left, right, strict=True), *zip(right, left, strict=True)]
        found = [
            LeakExample(
                relation=relation,
                test=sha256[one][:_DIGITS],
                train=sha256[other][:_DIGITS],
                test_source=source[one],
                train_source=source[other],
                distance=(int(dhash[one], 16) ^ int(dhash[other], 16)).bit_count(),
            )
            for one, other in pairs
            if split[one] == "test" and split[other] == "train"
        ]
        found.sort(key=lambda example: (example.distance, example.test, example.train))
        examples += found[:_EXAMPLES]
    return examples
