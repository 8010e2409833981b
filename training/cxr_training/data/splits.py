"""Splits and folds: what to train on and what to test on.

All but the split by image (`random`) keep groups whole.
"""

import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from cxr_training.data.errors import DataError
from cxr_training.data.manifest import SPLITS

SplitKind = Literal["grouped", "random"]

# Shares of train, validation and test. Those of `random` are the published study's.
FRACTIONS: dict[SplitKind, tuple[float, float, float]] = {
    "grouped": (0.64, 0.16, 0.20),
    "random": (0.70, 0.20, 0.10),
}

_MAX_FOLDS = 20
_SEEDS = 2**32
# What fixes the order of the rows, on which scikit-learn's draws depend.
_ORDER = ["group", "sha256", "source", "label"]


class SourceFold(NamedTuple):
    """One source to test on, and what the others leave to train on.

    Attributes:
        source: the source that is left out.
        train: bool `[images]`: images of other sources, without relatives of the test images.
        test: bool `[images]`: all images of `source`.
    """

    source: str
    train: npt.NDArray[np.bool_]
    test: npt.NDArray[np.bool_]

    @property
    def removed(self) -> int:
        """Images of other sources that stand in a group with a test image, so in neither mask."""
        return int((~(self.train | self.test)).sum())


def assign_splits(
    frame: pd.DataFrame,
    *,
    seed: int,
    fractions: Sequence[float] | None = None,
    kind: SplitKind = "grouped",
) -> "pd.Series[str]":
    """Assign each image to `train`, `validation` or `test`.

    `grouped` parts no group. Labels keep their share in each split, and so do sources within a
    label wherever they have enough groups. `random` draws image by image within each label, as
    published studies often do: relatives of test images stand in training, and figures on such a
    test split flatter the model. The result depends on the seed and on what the images are, not
    on the order of the rows.

    Args:
        frame: columns `label`, `source`, `sha256`, `group`.
        seed: 0 to 2**32 - 1.
        fractions: shares of train, validation and test; they sum to 1. They are met as nearly as
            whole groups allow. Without them, those of `FRACTIONS`.
        kind: `grouped` or `random`.

    Returns:
        Split names on the frame's index.

    Raises:
        DataError: the kind, a fraction or the seed is not valid, or a class has too few groups
            (`random`: images) to appear in each split.
    """
    if kind not in get_args(SplitKind):
        raise DataError(f"Unknown kind of split '{kind}'; choose {' or '.join(FRACTIONS)}.")
    fractions = FRACTIONS[kind] if fractions is None else fractions
    if len(fractions) != len(SPLITS) or min(fractions) <= 0 or not np.isclose(sum(fractions), 1):
        raise DataError("The fractions must be three numbers above 0 that sum to 1.")
    _check_seed(seed)
    rows = frame.reset_index(drop=True).sort_values(_ORDER)
    _check_enough(rows, "group" if kind == "grouped" else "sha256", len(SPLITS), "split")
    draw = _draw if kind == "grouped" else _draw_images
    _, validation, test = fractions
    split = pd.Series(SPLITS[0], index=rows.index, dtype=object)
    split[draw(rows, test, seed)] = SPLITS[2]
    rest = rows[split == SPLITS[0]]
    split[draw(rest, validation / (1 - test), seed)] = SPLITS[1]
    for label, names in split.groupby(rows["label"]):
        if absent := [name for name in SPLITS if name not in set(names)]:
            raise DataError(
                f"The class '{label}' does not reach the {' and '.join(absent)} split: "
                "it has too few groups, or one of them is too large."
            )
    return pd.Series(split.sort_index().to_numpy(), index=frame.index, name="split")


def grouped_folds(frame: pd.DataFrame, *, folds: int = 5, seed: int) -> "pd.Series[int]":
    """Assign each image to a fold of a cross-validation that parts no group.

    Labels keep their share in each fold, and so do sources within a label wherever they have
    enough groups. The result does not depend on the order of the rows.

    Args:
        frame: columns `label`, `source`, `sha256`, `group`.
        folds: number of folds, at least 2.
        seed: 0 to 2**32 - 1.

    Returns:
        Fold numbers from 0 on the frame's index.

    Raises:
        DataError: `folds` or the seed is out of range, or a class has too few groups to appear in
            each fold.
    """
    if folds < 2:  # noqa: PLR2004 - one fold leaves nothing to train on
        raise DataError("A cross-validation needs at least 2 folds.")
    _check_seed(seed)
    rows = frame.reset_index(drop=True).sort_values(_ORDER)
    _check_enough(rows, "group", folds, "fold")
    fold = pd.Series(0, index=rows.index)
    for number, part in enumerate(_parts(rows, folds, seed)):
        fold.iloc[part] = number
    for label, numbers in fold.groupby(rows["label"]):
        if numbers.nunique() < folds:
            raise DataError(
                f"The class '{label}' does not reach each of the {folds} folds: "
                "one of its groups is too large."
            )
    return pd.Series(fold.sort_index().to_numpy(), index=frame.index, name="fold")


def leave_one_source_out(frame: pd.DataFrame) -> Iterator[SourceFold]:
    """Test on each source in turn, after training on the others.

    Every group that has an image in the left-out source is taken out of training altogether:
    the public sources copy from each other, and a copy would give the answer away.
    :attr:`SourceFold.removed` says how many images that costs.

    Args:
        frame: columns `source`, `group`.

    Returns:
        One `(source, train, test)` for each source, by name.

    Raises:
        DataError: the frame has only one source.
    """
    sources = sorted(frame["source"].unique())
    if len(sources) < 2:  # noqa: PLR2004 - one to leave out, one to train on
        raise DataError("Leaving a source out needs a manifest of at least two sources.")
    return (_source_fold(frame, source) for source in sources)


def _source_fold(frame: pd.DataFrame, source: str) -> SourceFold:
    test = (frame["source"] == source).to_numpy()
    related = frame["group"].isin(frame["group"][test]).to_numpy()
    return SourceFold(source=source, train=~related, test=test)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < _SEEDS:
        raise DataError(f"The seed must be from 0 to {_SEEDS - 1}.")


def _check_enough(rows: pd.DataFrame, unit: str, needed: int, part: str) -> None:
    units = rows.groupby("label")[unit].nunique()
    for label, count in units[units < needed].items():
        raise DataError(
            f"The class '{label}' has only {count} independent group(s) of images; "
            f"{needed} are needed, one for each {part}."
        )


def _draw(rows: pd.DataFrame, fraction: float, seed: int) -> pd.Index:
    """Index of about `fraction` of the rows, in whole groups."""
    per_label = rows.groupby("label")["group"].nunique()
    share = Fraction(fraction).limit_denominator(_MAX_FOLDS)
    folds = max(2, min(share.denominator, int(per_label.min())))
    taken = min(max(1, round(folds * fraction)), folds - 1)
    parts = _parts(rows, folds, seed)
    # Folds are even in size, but a large group can leave one without a label: take the best run.
    runs = [
        np.concatenate([parts[(start + step) % folds] for step in range(taken)])
        for start in range(folds)
    ]
    return rows.index[min(runs, key=lambda run: _imbalance(rows, run, fraction))]


def _draw_images(rows: pd.DataFrame, fraction: float, seed: int) -> pd.Index:
    """Index of about `fraction` of each label's rows, and of at least one."""
    generator = np.random.default_rng(seed)
    order = pd.Series(generator.permutation(len(rows)), index=rows.index)
    rank = order.groupby(rows["label"]).rank(method="first")
    size = rows.groupby("label")["label"].transform("size")
    return rows.index[rank <= (size * fraction).round().clip(lower=1)]


def _parts(rows: pd.DataFrame, folds: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Positions of the rows of each fold, in whole groups."""
    # Slow to import, and the command line imports this module for its help.
    from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A stratum with fewer images than folds: the callers look at what each fold holds.
        warnings.simplefilter("ignore", UserWarning)
        return [part for _, part in splitter.split(rows, _strata(rows, folds), rows["group"])]


def _strata(rows: pd.DataFrame, folds: int) -> "pd.Series[str]":
    """Label and source, or the label alone where that source has too few groups for the folds."""
    groups = rows.groupby(["label", "source"])["group"].transform("nunique")
    return rows["label"].where(groups < folds, rows["label"] + "\0" + rows["source"])


def _imbalance(rows: pd.DataFrame, run: npt.NDArray[np.int64], fraction: float) -> float:
    """Largest distance of a label's share in the run from the fraction that was asked for."""
    totals = rows["label"].value_counts()
    drawn = rows["label"].iloc[run].value_counts().reindex(totals.index, fill_value=0)
    return float((drawn / totals - fraction).abs().max())
