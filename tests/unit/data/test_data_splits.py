"""Splits never part a group, keep the classes' shares, and repeat."""

import numpy as np
import pandas as pd
import pytest

from cxr_training.data import (
    DataError,
    assign_splits,
    build_manifest,
    grouped_folds,
    leave_one_source_out,
)

LABELS = ("COVID-19", "No finding", "Pneumonia")


def made_up(groups_per_label: int, seed: int = 0, largest: int = 5) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [
        {
            "label": label,
            "source": f"source{group % 3}",
            "group": f"{label}-{group}",
            "sha256": f"{label}-{group}-{image}",
        }
        for label in LABELS
        for group in range(groups_per_label)
        for image in range(int(rng.integers(1, largest + 1)))
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_parted_and_shares_hold(seed):
    frame = made_up(150)
    split = assign_splits(frame, seed=seed)
    assert (split.groupby(frame["group"]).nunique() == 1).all()
    for column in ("label", "source"):
        shares = pd.crosstab(frame[column], split, normalize="index")
        assert np.allclose(shares[["train", "validation", "test"]], [0.64, 0.16, 0.20], atol=0.03)


@pytest.mark.parametrize("groups", [3, 4, 5, 7, 12])
@pytest.mark.parametrize("seed", range(4))
def test_few_groups_still_reach_every_split(groups, seed):
    frame = made_up(groups, seed=seed)
    split = assign_splits(frame, seed=seed)
    assert (pd.crosstab(frame["label"], split) > 0).all(axis=None)
    assert (split.groupby(frame["group"]).nunique() == 1).all()


def test_other_fractions():
    frame = made_up(200)
    shares = assign_splits(frame, seed=1, fractions=(0.5, 0.2, 0.3)).value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.5, abs=0.02)
    assert shares["test"] == pytest.approx(0.3, abs=0.02)


def test_same_seed_same_split_whatever_the_order():
    frame = made_up(40)
    split = assign_splits(frame, seed=3)
    shuffled = frame.sample(frac=1, random_state=9)
    again = assign_splits(shuffled, seed=3)
    pd.testing.assert_series_equal(again.sort_index(), split)
    assert not assign_splits(frame, seed=4).equals(split)


def test_phantom_patients_stand_on_one_side(phantom_tree):
    frame = build_manifest([phantom_tree]).frame
    frame["split"] = assign_splits(frame, seed=0)
    assert (frame.groupby("patient")["split"].nunique() == 1).all()
    assert set(frame["split"]) == {"train", "validation", "test"}


def test_class_with_too_few_groups():
    frame = made_up(10)
    few = frame["label"].eq("Pneumonia") & ~frame["group"].isin(["Pneumonia-0", "Pneumonia-1"])
    with pytest.raises(DataError, match=r"'Pneumonia' has only 2 independent group\(s\)"):
        assign_splits(frame[~few], seed=0)


def test_classes_that_share_one_large_group():
    frame = made_up(3, largest=1)
    frame.loc[frame["group"].str.endswith(("-0", "-1")), "group"] = "welded"
    with pytest.raises(DataError, match="has only 2 independent"):
        assign_splits(frame, seed=0)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.6, 0.2, 0.3), (1.0, 0.0, 0.0)])
def test_fractions_out_of_range(fractions):
    with pytest.raises(DataError, match="fractions"):
        assign_splits(made_up(5), seed=0, fractions=fractions)


def test_seed_out_of_range():
    with pytest.raises(DataError, match="seed"):
        assign_splits(made_up(5), seed=-1)


def test_unknown_kind_of_split():
    with pytest.raises(DataError, match="'by patient'; choose grouped or random"):
        assign_splits(made_up(5), seed=0, kind="by patient")


def test_random_split_goes_by_image_as_the_study_did():
    frame = made_up(150)
    split = assign_splits(frame, seed=3, kind="random")
    shares = pd.crosstab(frame["label"], split, normalize="index")
    assert np.allclose(shares[["train", "validation", "test"]], [0.7, 0.2, 0.1], atol=0.01)
    assert (split.groupby(frame["group"]).nunique() > 1).any()
    shuffled = assign_splits(frame.sample(frac=1, random_state=9), seed=3, kind="random")
    pd.testing.assert_series_equal(shuffled.sort_index(), split)
    assert not assign_splits(frame, seed=4, kind="random").equals(split)


def test_random_split_reaches_three_images_of_one_group():
    frame = made_up(3, largest=1).assign(group="one")
    split = assign_splits(frame, seed=0, kind="random")
    assert (pd.crosstab(frame["label"], split) == 1).all(axis=None)
    with pytest.raises(DataError, match="has only 2"):
        assign_splits(frame[1:], seed=0, kind="random")


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_keep_groups_and_shares(folds):
    frame = made_up(100)
    fold = grouped_folds(frame, folds=folds, seed=1)
    assert sorted(fold.unique()) == list(range(folds))
    assert (fold.groupby(frame["group"]).nunique() == 1).all()
    assert np.allclose(pd.crosstab(frame["label"], fold, normalize="index"), 1 / folds, atol=0.03)
    shuffled = grouped_folds(frame.sample(frac=1, random_state=9), folds=folds, seed=1)
    pd.testing.assert_series_equal(shuffled.sort_index(), fold)
    assert not grouped_folds(frame, folds=folds, seed=2).equals(fold)


def test_folds_that_cannot_be():
    with pytest.raises(DataError, match="at least 2 folds"):
        grouped_folds(made_up(5), folds=1, seed=0)
    with pytest.raises(DataError, match=r"has only 4 independent group\(s\).*5 are needed"):
        grouped_folds(made_up(4), folds=5, seed=0)
    with pytest.raises(DataError, match="seed"):
        grouped_folds(made_up(5), seed=2**32)


def test_leaving_a_source_out_takes_relatives_of_its_images_out_of_training():
    frame = pd.DataFrame(
        {
            "source": ["b", "a", "a", "b", "c", "c"],
            "group": ["1", "1", "2", "3", "1", "4"],
        },
        index=[7, 3, 9, 1, 4, 8],
    )
    found = {source: (train, test) for source, train, test in leave_one_source_out(frame)}
    assert list(found) == ["a", "b", "c"]
    train, test = found["a"]
    assert test.tolist() == [False, True, True, False, False, False]
    assert train.tolist() == [False, False, False, True, False, True]
    assert [fold.removed for fold in leave_one_source_out(frame)] == [2, 2, 2]


def test_one_source_cannot_be_left_out():
    with pytest.raises(DataError, match="at least two sources"):
        leave_one_source_out(made_up(3).assign(source="only"))
