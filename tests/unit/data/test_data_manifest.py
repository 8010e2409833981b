"""Manifests: groups across sources, exclusions, validation, digest."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_training.data import (
    EXCLUDED,
    DataError,
    assign_groups,
    build_manifest,
    manifest_digest,
    read_manifest,
    summarize,
    write_manifest,
)
from cxr_training.data.manifest import assemble_manifest


@pytest.fixture(scope="module")
def frame(phantom_tree):
    return build_manifest([phantom_tree]).frame


def group_of(frame, path):
    return frame.set_index("path").loc[str(path), "group"]


def test_resized_and_reencoded_copies_in_another_source_join_the_group(tmp_path, phantom_tree):
    originals = sorted((phantom_tree / "images").iterdir())[:6]
    other = tmp_path / "other"
    for number, original in enumerate(originals):
        copy = other / ("Normal" if number % 2 else "COVID") / f"{number}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(original)
        size = (round(image.width * 0.6), round(image.height * 0.6))
        image.convert("RGB").resize(size).save(copy, quality=70)
    frame = build_manifest([phantom_tree, other]).frame
    for number, original in enumerate(originals):
        copy = other / ("Normal" if number % 2 else "COVID") / f"{number}.jpg"
        assert group_of(frame, copy) == group_of(frame, original)
    summary = summarize(frame)
    assert summary.cross_source_images >= 12
    assert any("other" in pair for pair in summary.shared_groups)


def test_images_of_different_patients_are_not_welded(frame):
    assert frame["patient"].nunique() == 18
    assert frame["group"].nunique() >= 16
    assert (frame.groupby("patient")["group"].nunique() == 1).all()


def test_blank_images_do_not_weld_groups(tmp_path, make_image):
    rng = np.random.default_rng(0)
    for level in range(5):
        path = tmp_path / "a" / f"blank{level}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64), 40 * level, dtype=np.uint8)).save(path)
        noisy = rng.normal(128, 2, (64, 64)).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / "a" / f"noise{level}.png")
    make_image(tmp_path / "b" / "1.png", 1)
    frame = build_manifest([tmp_path]).frame
    assert frame["group"].nunique() == len(frame) == 11


def test_a_chain_of_relations_is_one_group():
    # 0 and 1 share a patient, 1 and 2 are near-duplicates, 2 and 3 have the same bytes.
    rng = np.random.default_rng(1)
    hashes = [rng.bytes(32) for _ in range(5)]
    near = bytearray(hashes[1])
    near[0] ^= 0xFF
    near[1] ^= 0xFF
    frame = pd.DataFrame(
        {
            "patient": ["a:1", "a:1", "b:1", None, None],
            "sha256": [digit * 64 for digit in "54331"],
            "dhash": [raw.hex() for raw in (hashes[0], hashes[1], near, hashes[3], hashes[4])],
        }
    )
    groups = assign_groups(frame)
    assert groups[:4].nunique() == 1
    assert groups[4] != groups[0]
    shuffled = assign_groups(frame.sample(frac=1, random_state=2))
    pd.testing.assert_series_equal(shuffled.sort_index(), groups)


def test_hashes_beyond_the_threshold_stay_apart():
    first = bytes([0xF0] * 32)
    second = bytes([0x0F] * 3 + [0xF0] * 29)  # 24 bits away
    frame = pd.DataFrame(
        {
            "patient": [None, None],
            "sha256": ["a" * 64, "b" * 64],
            "dhash": [first.hex(), second.hex()],
        }
    )
    assert assign_groups(frame).nunique() == 2


def test_unreadable_images_are_counted_not_fatal(tmp_path, make_image):
    make_image(tmp_path / "set/COVID/1.jpg", 1)
    whole = make_image(tmp_path / "set/Normal/1.jpg", 2)
    (tmp_path / "set/Normal/cut.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "set/Normal/empty.png").touch()
    (tmp_path / "set/Normal/notes.txt").write_text("no image")
    report = build_manifest([tmp_path / "set"])
    assert len(report.frame) == 2
    assert report.excluded == {"unreadable": 3}


def test_folder_with_nothing_but_damage(tmp_path):
    for name in ("COVID", "Normal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(DataError, match="holds no image"):
        build_manifest([tmp_path])


def test_byte_identical_images_are_kept_once_in_a_source(tmp_path, make_image):
    first = make_image(tmp_path / "set/COVID/1.jpg", 1)
    shutil.copy(first, tmp_path / "set/COVID/2.jpg")
    make_image(tmp_path / "set/Normal/3.jpg", 2)
    report = build_manifest([tmp_path / "set"])
    assert [Path(path).name for path in report.frame["path"]] == ["1.jpg", "3.jpg"]
    assert report.excluded == {"byte-identical duplicate": 1}


def test_byte_identical_images_of_two_findings_are_both_left_out(tmp_path, make_image):
    first = make_image(tmp_path / "set/COVID/1.jpg", 1)
    make_image(tmp_path / "set/Normal/2.jpg", 2)
    shutil.copy(first, tmp_path / "set/Normal/1.jpg")
    report = build_manifest([tmp_path / "set"])
    assert [Path(path).name for path in report.frame["path"]] == ["2.jpg"]
    assert report.excluded == {"byte-identical with another finding": 2}


@pytest.mark.parametrize("second", ["Pneumonia", "No finding"])
def test_a_copy_that_is_left_out_still_links_its_patients(second):
    # Two patients, one file: a duplicate, or with another finding, and then neither copy stays.
    rng = np.random.default_rng(0)
    rows = [
        ("1.png", "p1", "b", "No finding"),
        ("2.png", "p1", "a", "No finding"),
        ("3.png", "p2", "a", second),
        ("4.png", "p2", "c", "Pneumonia"),
        ("5.png", "p3", "d", "No finding"),
    ]
    images = {name: rng.bytes(32).hex() for name in "abcd"}
    entries = [
        {
            "path": path, "finding": finding, "finding_text": None, "source": "set",
            "origin": None, "patient": patient, "view": None, "sex": None, "age": None,
            "sha256": name * 64, "dhash": images[name], "synthetic": False,
        }
        for path, patient, name, finding in rows
    ]  # fmt: skip
    frame = assemble_manifest({Path("set"): entries}).frame
    groups = frame.set_index("patient")["group"].groupby("patient").agg(set)
    assert groups["p1"] == groups["p2"] != groups["p3"]
    # Named by what is left: by "b" where both copies of "a" are gone.
    smallest = frame["sha256"].groupby(frame["group"]).transform("min").str[:16]
    assert frame["group"].tolist() == smallest.tolist()


def test_no_folder():
    with pytest.raises(DataError, match="at least one folder"):
        build_manifest([])


def test_round_trip_keeps_values_and_nulls(tmp_path, make_image):
    for name in ("COVID", "Normal"):
        make_image(tmp_path / "set" / name / "1.jpg", len(name))
    frame = build_manifest([tmp_path / "set"]).frame
    path = tmp_path / "new folder" / "manifest.parquet"
    write_manifest(frame, path)
    pd.testing.assert_frame_equal(read_manifest(path), frame)
    assert frame["patient"].tolist() == [None, None]
    assert all(Path(image).is_absolute() for image in frame["path"])


def test_digest_ignores_place_and_order_but_not_content(tmp_path, phantom_tree, frame):
    moved = shutil.copytree(phantom_tree, tmp_path / "elsewhere")
    again = build_manifest([moved]).frame
    digest = manifest_digest(frame)
    assert manifest_digest(again) == digest
    assert manifest_digest(frame.sample(frac=1, random_state=0)) == digest
    relabelled = frame.assign(label=frame["label"].where(frame.index > 0, "Other"))
    assert manifest_digest(relabelled) != digest
    train, test = frame.assign(split="train"), frame.assign(split="test")
    assert manifest_digest(train) == manifest_digest(test) == digest
    assert manifest_digest(train, splits=True) != manifest_digest(test, splits=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns=["group", "view"]), "lacks the columns view, group"),
        (lambda f: f.iloc[:0], "no rows"),
        (lambda f: f.assign(label=None), "without a value for 'label'"),
        (lambda f: f.assign(label=3), "'label' must hold text"),
        (lambda f: f.assign(sha256="abc"), "'sha256' holds values that do not belong"),
        (lambda f: f.assign(split="holdout"), "'split' holds values that do not belong"),
        (lambda f: f.assign(age="old"), "'age' must hold years"),
        (lambda f: f.assign(synthetic="yes"), "'synthetic' must hold true or false"),
    ],
)
def test_invalid_manifests_are_refused_in_clear_words(tmp_path, frame, change, message):
    with pytest.raises(DataError, match=message):
        write_manifest(change(frame), tmp_path / "manifest.parquet")


def test_manifest_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="There is no manifest"):
        read_manifest(tmp_path / "manifest.parquet")


def test_manifest_that_is_no_parquet(tmp_path):
    path = tmp_path / "manifest.parquet"
    path.write_text("path,label\n")
    with pytest.raises(DataError, match="is not a Parquet file"):
        read_manifest(path)


def test_summary_counts_what_a_random_split_would_leak():
    # Two groups of two images and six single ones.
    groups = ["a", "a", "b", "b", *"cdefgh"]
    frame = pd.DataFrame(
        {
            "label": "COVID-19",
            "source": ["x", "y", "x", "x", *["x"] * 6],
            "patient": [None] * 4 + ["x:1", "x:2"] + [None] * 4,
            "sha256": [f"{number:064x}" for number in range(10)],
            "group": groups,
            "synthetic": False,
        }
    )
    copies = [frame.assign(group=frame["group"] + str(number)) for number in range(10)]
    frame = pd.concat(copies, ignore_index=True)
    summary = summarize(frame)
    # The study's split tests 10 % and trains on 70 %: about 0.1 x 40 images x 0.7.
    assert summary.random_split["test_images"] == 10
    assert 1 <= summary.random_split["leaked"] <= 5
    assert summarize(frame[:2]).random_split is None
    assert summary.cross_source_groups == 10
    assert summary.shared_groups == {"x + y": 10}
    assert summary.labels == {"x": {"COVID-19": 90}, "y": {"COVID-19": 10}}
    assert summary.images_without_patient == 80


def test_counts_of_what_was_left_out_travel_with_the_manifest(tmp_path: Path) -> None:
    for name, seed in (("covid/1", 1), ("covid/2", 1), ("normal/1", 2)):
        file = tmp_path / "data" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    report = build_manifest([tmp_path / "data"], layout="folder-per-class", progress=False)
    write_manifest(report.frame, tmp_path / "m.parquet")
    assert report.excluded == {"byte-identical duplicate": 1}
    assert read_manifest(tmp_path / "m.parquet").attrs[EXCLUDED] == report.excluded
