"""Tasks: which classes they make of the findings, and what they leave out."""

import pandas as pd
import pytest

from cxr_training.data import FINDINGS, TASKS, DataError, build_manifest, relabel
from cxr_training.data.labels import find_task


@pytest.fixture
def tree(tmp_path, make_image):
    folder = tmp_path / "set"
    for number, name in enumerate(
        ["COVID", "Normal", "Viral Pneumonia", "Bacterial pneumonia", "Pneumonia", "Lung_Opacity"]
    ):
        make_image(folder / name / "1.png", 500 + number)
    make_image(folder / "Edema" / "1.png", 600)
    return folder


def labels(report):
    return dict(zip(report.frame["finding"], report.frame["label"], strict=True))


DISEASES = ("COVID-19", "Viral pneumonia", "Bacterial pneumonia", "Pneumonia", "Lung opacity")
COVID_AND_NONE = {"COVID-19": "COVID-19", "No finding": "No finding"}
NO_EDEMA, NO_OPACITY = {"no class for Edema": 1}, {"no class for Lung opacity": 1}


@pytest.mark.parametrize(
    ("task", "expected", "excluded"),
    [
        (
            "covid",
            dict.fromkeys([*DISEASES, "No finding"], "Other") | {"COVID-19": "COVID-19"},
            NO_EDEMA,
        ),
        ("abnormal", dict.fromkeys(DISEASES, "Abnormal") | {"No finding": "No finding"}, NO_EDEMA),
        (
            "three-class",
            COVID_AND_NONE | {"Edema": "Edema"} | dict.fromkeys(DISEASES[1:4], "Pneumonia"),
            NO_OPACITY,
        ),
        (
            "four-class",
            COVID_AND_NONE
            | {"Viral pneumonia": "Viral pneumonia"}
            | dict.fromkeys(DISEASES[2:4], "Bacterial or other pneumonia"),
            NO_EDEMA | NO_OPACITY,
        ),
    ],
)
def test_the_classes_of_a_task(tree, task, expected, excluded):
    report = build_manifest([tree], task=task)
    assert labels(report) == expected
    assert report.excluded == excluded


def test_relabelling_gives_what_building_gives(tree):
    widest = build_manifest([tree], task="abnormal").frame
    again = relabel(widest, "four-class")
    pd.testing.assert_frame_equal(again.frame, build_manifest([tree], task="four-class").frame)
    assert again.excluded == NO_OPACITY


def test_relabelling_keeps_splits(tree):
    frame = build_manifest([tree], task="abnormal").frame.assign(split="train")
    assert set(relabel(frame, "covid").frame["split"]) == {"train"}


def test_a_task_without_a_class_for_anything(tmp_path, make_image):
    for number, name in enumerate(["Edema", "Fracture"]):
        make_image(tmp_path / name / "1.png", 700 + number)
    assert set(build_manifest([tmp_path]).frame["label"]) == {"Edema", "Fracture"}
    with pytest.raises(DataError, match="'abnormal' has a class for none of the images"):
        build_manifest([tmp_path], task="abnormal")


def test_every_task_is_made_of_known_findings_once():
    for task in TASKS.values():
        assert set(task.label_of) <= set(FINDINGS)
    names = [name for names in FINDINGS.values() for name in names]
    assert len(names) == len(set(names))
    with pytest.raises(DataError, match="Unknown task"):
        find_task("five-class")
