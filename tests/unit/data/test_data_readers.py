"""Each layout is recognised and read as its authors meant it."""

from pathlib import Path

import pytest

from cxr_training.data import COVID, NO_FINDING, PNEUMONIA, DataError, build_manifest
from cxr_training.data.labels import finding_label, folder_label
from cxr_training.data.readers import case_key


def by_name(frame, column):
    return {
        Path(path).name: value for path, value in zip(frame["path"], frame[column], strict=True)
    }


@pytest.fixture
def ozturk(tmp_path, make_image):
    folder = tmp_path / "ozturk"
    names = [
        "Covid-19/nejmc2001573_f1a.jpg",
        "Covid-19/nejmc2001573_f1b.jpg",
        "Covid-19/171CB377-62FF-4B76-906C-F3787A01CB2E.jpg",
        "No_findings/00001629_000.jpg",
        "Pneumonia/00001629_004.png",
        "Pneumonia/00002000_001.png",
    ]
    for number, name in enumerate(names):
        make_image(folder / name, number)
    return folder


def cohen_row(filename, patient, finding, view="PA", **others):
    row = {
        "patientid": patient,
        "sex": "M",
        "age": "65",
        "finding": finding,
        "view": view,
        "modality": "X-ray",
        "folder": "images",
        "filename": filename,
    }
    return row | others


@pytest.fixture
def cohen(tmp_path, make_image, write_csv):
    folder = tmp_path / "cohen"
    rows = [
        cohen_row("a.jpg", "2", "COVID-19"),
        cohen_row("b.jpg", "2", "COVID-19, ARDS", view="AP Supine"),
        cohen_row("c.jpg", "", "Klebsiella", view="?", sex="", age=""),
        cohen_row("d.jpg", "4", "No Finding"),
        cohen_row("e.jpg", "5", "todo"),
        cohen_row("f.jpg", "6", "Unknown"),
        cohen_row("g.jpg", "7", "ARDS"),
        cohen_row("h.jpg", "8", "COVID-19", view="L"),
        cohen_row("i.jpg", "9", "COVID-19", view="Axial", modality="CT"),
        cohen_row("j.jpg", "10", "Pneumonia/Viral/COVID-19"),
        cohen_row("not there.jpg", "11", "COVID-19"),
    ]
    write_csv(folder / "metadata.csv", rows)
    for number, row in enumerate(rows[:-1]):
        make_image(folder / "images" / row["filename"], 100 + number)
    make_image(folder / "images" / "stray.jpg", 150)
    return folder


@pytest.fixture
def cxnet(tmp_path, make_image, write_csv):
    folder = tmp_path / "cxnet"
    row = {"filename": "260.jpg", "patient_id": "10", "sex": "female", "age": "0.25", "view": ""}
    rows = [
        row | {"label": "COVID-19", "pcr_test": "positive"},
        row | {"filename": "261.jpg", "label": "", "pcr_test": "negative"},
    ]
    write_csv(folder / "metadata.csv", rows)
    for number, name in enumerate(["260.jpg", "261.jpg", "001.jpg"]):
        make_image(folder / "images" / name, 200 + number)
    return folder


def test_ozturk_takes_patients_from_nih_names_and_publications(ozturk):
    frame = build_manifest([ozturk]).frame
    patients, groups = by_name(frame, "patient"), by_name(frame, "group")
    assert frame["label"].value_counts().to_dict() == {COVID: 3, PNEUMONIA: 2, NO_FINDING: 1}
    assert patients["00001629_000.jpg"] == patients["00001629_004.png"] == "nih:00001629"
    # One NIH patient in two classes, and one publication's figures, stay together.
    assert groups["00001629_000.jpg"] == groups["00001629_004.png"]
    assert groups["nejmc2001573_f1a.jpg"] == groups["nejmc2001573_f1b.jpg"]
    assert frame["group"].nunique() == 4
    assert set(frame["source"]) == {"ozturk"}


@pytest.mark.parametrize(
    "names",
    [
        ("covid-19-pneumonia-24-day6", "covid-19-pneumonia-24-day7", "covid-19-pneumonia-24-PA"),
        ("nejmc2001573_f1a", "nejmc2001573_f1b"),
        ("auntminnie-a-2020_01_28_Vietnam", "auntminnie-d-2020_01_28_Vietnam"),
        ("lancet-case2a", "lancet-case2b"),
        ("all14238-fig-0001-m-b", "all14238-fig-0002-m-f"),
        ("1-s2.0-S1684118220300682-main.pdf-002-a1", "1-s2.0-S1684118220300682-main.pdf-003-b2"),
        ("1-s2.0-S0929664620300449-gr2_lrg-a", "1-s2.0-S0929664620300449-gr2_lrg-d"),
        ("kjr-21-e24-g001-l-a", "kjr-21-e24-g003-l-a"),
        ("41591_2020_819_Fig1_HTML.webp-day10", "41591_2020_819_Fig1_HTML.webp-day5"),
        ("ards-rapidly-progressive-12-hours", "ards-rapidly-progressive-admission"),
    ],
)
def test_images_of_one_publication_or_case_share_a_key(names):
    assert len({case_key(name) for name in names}) == 1


def test_unrelated_names_keep_keys_of_their_own():
    names = [
        "covid-19-pneumonia-2",
        "covid-19-pneumonia-24-day6",
        "covid-19-pneumonia-28",
        "171CB377-62FF-4B76-906C-F3787A01CB2E",
        "7D2CF6CE-F529-4470-8356-D33FFAF98600",
        "7D2CF6CE-F530-4470-8356-D33FFAF98601",
        "kjr-21-e24-g001-l-a",
        "kjr-21-e25-g001-l-a",
    ]
    assert len({case_key(name) for name in names}) == len(names)


def test_cohen_maps_findings_and_counts_what_it_leaves_out(cohen):
    report = build_manifest([cohen])
    labels = by_name(report.frame, "label")
    assert labels == {
        "a.jpg": COVID,
        "b.jpg": COVID,
        "c.jpg": PNEUMONIA,
        "d.jpg": NO_FINDING,
        "j.jpg": COVID,
    }
    assert report.excluded == {
        "file missing": 1,
        "lateral view": 1,
        "no metadata row": 1,
        "not a radiograph": 1,
        "unlabelled": 3,
    }


def test_cohen_metadata_becomes_typed_columns_and_null_where_unknown(cohen):
    frame = build_manifest([cohen]).frame.set_index("path")
    frame.index = [Path(path).name for path in frame.index]
    assert frame.loc["b.jpg", ["patient", "view", "sex", "age"]].tolist() == [
        "cohen:2",
        "AP Supine",
        "M",
        65.0,
    ]
    assert frame.loc["c.jpg", ["patient", "view", "sex", "age"]].isna().all()
    assert frame.loc["a.jpg", "group"] == frame.loc["b.jpg", "group"]


def test_cxnet_files_without_a_row_are_covid_of_unknown_patients(cxnet):
    report = build_manifest([cxnet])
    patients = by_name(report.frame, "patient")
    assert patients == {"260.jpg": "cxnet:10", "001.jpg": None}
    assert set(report.frame["label"]) == {COVID}
    assert by_name(report.frame, "sex")["260.jpg"] == "F"
    assert by_name(report.frame, "age")["260.jpg"] == 0.25
    assert report.excluded == {"unlabelled": 1}


def test_folder_per_class_knows_common_spellings_and_leaves_masks_out(tmp_path, make_image):
    folder = tmp_path / "radiography"
    for number, name in enumerate(
        ["COVID/images/1.png", "Normal/images/1.png", "Viral Pneumonia/images/1.png", "Edema/1.jpg"]
    ):
        make_image(folder / name, number)
    make_image(folder / "COVID/masks/1.png", 50)
    (folder / "COVID.metadata.xlsx").write_bytes(b"a sheet beside the classes")
    report = build_manifest([folder])
    assert sorted(report.frame["label"]) == [COVID, "Edema", NO_FINDING, PNEUMONIA]
    assert set(report.frame["source"]) == {"radiography"}
    assert report.frame["patient"].isna().all()
    assert report.excluded == {"segmentation mask": 1}


def test_layout_can_be_named(ozturk):
    frame = build_manifest([ozturk], layout="folder-per-class").frame
    assert frame["patient"].isna().all()


@pytest.mark.parametrize(
    ("finding", "label"),
    [
        ("COVID-19", COVID),
        ("COVID-19, ARDS", COVID),
        ("Pneumocystis", PNEUMONIA),
        ("Pneumonia/Bacterial/Klebsiella", PNEUMONIA),
        ("No Finding", NO_FINDING),
        ("ARDS", None),
        ("todo", None),
        ("", None),
    ],
)
def test_findings(finding, label):
    assert finding_label(finding) == label


def test_unknown_class_folder_keeps_its_name():
    assert folder_label("Lung_Opacity") == "Lung_Opacity"
    assert folder_label("viral-PNEUMONIA") == PNEUMONIA


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        build_manifest([tmp_path / "nowhere"])


def test_unknown_layout(tmp_path):
    with pytest.raises(DataError, match="Unknown layout 'dicom'"):
        build_manifest([tmp_path], layout="dicom")


def test_folder_without_a_known_layout(tmp_path, make_image):
    make_image(tmp_path / "loose.png", 1)
    with pytest.raises(DataError, match="none of the known layouts"):
        build_manifest([tmp_path])


@pytest.mark.parametrize("layout", ["ozturk", "folder-per-class"])
def test_folder_without_images(tmp_path, layout):
    with pytest.raises(DataError, match="holds no image"):
        build_manifest([tmp_path], layout=layout)


def test_layout_that_needs_metadata(tmp_path):
    with pytest.raises(DataError, match=r"has no metadata\.csv"):
        build_manifest([tmp_path], layout="cohen")


def test_metadata_without_the_columns(cxnet):
    with pytest.raises(DataError, match="lacks the columns patientid"):
        build_manifest([cxnet], layout="cohen")


def test_damaged_metadata(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(b'\xff\xfe"\x00\n,,,')
    with pytest.raises(DataError, match="Cannot read"):
        build_manifest([tmp_path], layout="cohen")
