"""Phantoms: deterministic, complete, marked, and free of cues other than the finding."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_training.data import (
    COVID,
    NO_FINDING,
    PHANTOM_LABELS,
    PNEUMONIA,
    DataError,
    build_manifest,
    generate_phantoms,
)
from cxr_training.data.phantoms import STYLES, draw_patient


@pytest.fixture(scope="module")
def metadata(phantom_tree):
    return pd.read_csv(phantom_tree / "metadata.csv")


def test_tree_reads_back_as_synthetic_sources(phantom_tree, metadata):
    report = build_manifest([phantom_tree])
    frame = report.frame
    assert report.excluded == {}
    assert len(frame) == len(metadata)
    assert frame["synthetic"].all()
    assert set(frame["source"]) == {f"phantom-{style}" for style in STYLES}
    assert set(frame["label"]) == set(PHANTOM_LABELS)
    assert frame["patient"].str.startswith("phantom:").all()
    assert frame["age"].between(18, 100).all()
    assert frame[["view", "sex"]].notna().all(axis=None)


def test_classes_have_the_patients_asked_for_in_all_styles(metadata):
    patients = metadata.drop_duplicates("patient")
    assert patients["label"].value_counts().to_dict() == dict.fromkeys(PHANTOM_LABELS, 6)
    assert metadata.groupby("patient").size().between(1, 3).all()
    # A patient keeps one style; every class has every style.
    assert (metadata.groupby("patient")["style"].nunique() == 1).all()
    assert (pd.crosstab(patients["label"], patients["style"]) > 0).all(axis=None)


def test_same_seed_same_bytes(tmp_path):
    first, second, other = (
        generate_phantoms(tmp_path / name, patients_per_class=1, seed=seed, size_range=(96, 128))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )

    def content(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert content(first) == content(second)
    assert set(content(first).values()).isdisjoint(content(other).values())


def test_patients_of_two_seeds_are_different_people(tmp_path):
    folders = [
        generate_phantoms(tmp_path / str(s), patients_per_class=2, seed=s, size_range=(96, 128))
        for s in (1, 2)
    ]
    assert build_manifest(folders).frame["patient"].nunique() == 12


def test_images_are_grey_in_both_formats_and_sized_as_asked(phantom_tree, metadata):
    formats = set()
    for name in metadata["filename"]:
        with Image.open(phantom_tree / "images" / name) as image:
            formats.add(image.format)
            assert image.mode == "L"
            assert 160 * 0.7 - 1 <= image.height <= 240
    assert formats == {"PNG", "JPEG"}


def test_every_image_is_marked_synthetic(phantom_tree, metadata):
    for name in metadata["filename"]:
        pixels = np.asarray(Image.open(phantom_tree / "images" / name), dtype=int)
        height, width = pixels.shape
        text = pixels[round(0.93 * height) :, round(0.35 * width) : round(0.65 * width)]
        # White letters with a black outline, at the same place everywhere.
        assert (text > 180).sum() > 10
        assert (text < 60).sum() > 20


@pytest.mark.parametrize("seed", range(4))
def test_findings_stand_where_they_should(seed):
    """Pneumonia on one side of the chest, COVID-19 on both."""
    halves = {}
    for label in PHANTOM_LABELS:
        opacity = draw_patient(np.random.default_rng(seed), "F", label).opacity
        middle = opacity.shape[1] // 2
        halves[label] = opacity[:, :middle].sum(), opacity[:, middle:].sum()
    assert sum(halves[NO_FINDING]) == 0
    assert min(halves[PNEUMONIA]) < 0.05 * max(halves[PNEUMONIA])
    assert min(halves[COVID]) > 0.2 * max(halves[COVID]) > 0


def test_covid_opacities_are_low_and_near_the_wall():
    opacity = sum(draw_patient(np.random.default_rng(s), "M", COVID).opacity for s in range(6))
    height, width = opacity.shape
    total = opacity.sum()
    assert opacity[height // 2 :].sum() > 0.6 * total
    middle_third = opacity[:, round(0.35 * width) : round(0.65 * width)].sum()
    assert middle_third < 0.25 * total


def test_a_missing_phantom_is_counted(tmp_path):
    folder = generate_phantoms(tmp_path / "p", patients_per_class=1, seed=0, size_range=(96, 96))
    next((folder / "images").iterdir()).unlink()
    assert build_manifest([folder]).excluded == {"file missing": 1}


def test_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder"):
        generate_phantoms(tmp_path, patients_per_class=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients_per_class": 0}, "patients_per_class"),
        ({"seed": -1}, "seed"),
        ({"images_per_patient": (0, 2)}, "images_per_patient"),
        ({"size_range": (400, 300)}, "size_range"),
    ],
)
def test_arguments_out_of_range(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        generate_phantoms(tmp_path / "p", **({"patients_per_class": 1, "seed": 0} | arguments))
    assert not (tmp_path / "p").exists()
