"""Splits that never part a group."""

import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr_training.data.errors import DataError
from cxr_training.data.manifest import SPLITS

_MAX_FOLDS = 20
_SEEDS = 2**32


def assign_splits(
    frame: pd.DataFrame, *, seed: int, fractions: Sequence[float] = (0.64, 0.16, 0.20)
) -> "pd.Series[str]":
    """Assign each image to `train`, `validation` or `test`.

    No group is parted. Labels keep their share in each split, and so do sources within a label
    wherever they have enough groups. The result depends on the seed and on what the images are,
    not on the order of the rows.

    Args:
        frame: columns `label`, `source`, `sha256`, `group`.
        seed: 0 to 2**32 - 1.
        fractions: shares of train, validation and test; they sum to 1. They are met as nearly as
            whole groups allow.

    Returns:
        Split names on the frame's index.

    Raises:
        DataError: a fraction or the seed is out of range, or a class has too few groups to appear
            in each split.
    """
    _check(frame, seed, fractions)
    # The folds depend on the order of the rows; fix it.
    rows = frame.reset_index(drop=True).sort_values(["group", "sha256", "source", "label"])
    _, validation, test = fractions
    split = pd.Series(SPLITS[0], index=rows.index, dtype=object)
    split[_draw(rows, test, seed)] = SPLITS[2]
    rest = rows[split == SPLITS[0]]
    split[_draw(rest, validation / (1 - test), seed)] = SPLITS[1]
    for label, names in split.groupby(rows["label"]):
        if absent := [name for name in SPLITS if name not in set(names)]:
            raise DataError(
                f"The class '{label}' does not reach the {' and '.join(absent)} split: "
                "it has too few groups, or one of them is too large."
            )
    return pd.Series(split.sort_index().to_numpy(), index=frame.index, name="split")


def _check(frame: pd.DataFrame, seed: int, fractions: Sequence[float]) -> None:
    if len(fractions) != len(SPLITS) or min(fractions) <= 0 or not np.isclose(sum(fractions), 1):
        raise DataError("The fractions must be three numbers above 0 that sum to 1.")
    if not 0 <= seed < _SEEDS:
        raise DataError(f"The seed must be from 0 to {_SEEDS - 1}.")
    groups = frame.groupby("label")["group"].nunique()
    for label, count in groups[groups < len(SPLITS)].items():
        raise DataError(
            f"The class '{label}' has only {count} independent group(s) of images; "
            f"{len(SPLITS)} are needed, one for each split."
        )


def _draw(rows: pd.DataFrame, fraction: float, seed: int) -> pd.Index:
    """Index of about `fraction` of the rows, in whole groups."""
    # Slow to import, and the command line imports this module for its help.
    from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415

    per_label = rows.groupby("label")["group"].nunique()
    share = Fraction(fraction).limit_denominator(_MAX_FOLDS)
    folds = max(2, min(share.denominator, int(per_label.min())))
    taken = min(max(1, round(folds * fraction)), folds - 1)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A label with fewer images than folds is met by choosing among the folds below.
        warnings.simplefilter("ignore", UserWarning)
        parts = [part for _, part in splitter.split(rows, _strata(rows, folds), rows["group"])]
    # Folds are even in size, but a large group can leave one without a label: take the best run.
    runs = [
        np.concatenate([parts[(start + step) % folds] for step in range(taken)])
        for start in range(folds)
    ]
    return rows.index[min(runs, key=lambda run: _imbalance(rows, run, fraction))]


def _strata(rows: pd.DataFrame, folds: int) -> "pd.Series[str]":
    """Label and source, or the label alone where that source has too few groups for the folds."""
    groups = rows.groupby(["label", "source"])["group"].transform("nunique")
    return rows["label"].where(groups < folds, rows["label"] + "\0" + rows["source"])


def _imbalance(rows: pd.DataFrame, run: npt.NDArray[np.int64], fraction: float) -> float:
    """Largest distance of a label's share in the run from the fraction that was asked for."""
    totals = rows["label"].value_counts()
    drawn = rows["label"].iloc[run].value_counts().reindex(totals.index, fill_value=0)
    return float((drawn / totals - fraction).abs().max())
