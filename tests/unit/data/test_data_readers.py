"""Each layout is recognised and read as its authors meant it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_training.data import COVID, NO_FINDING, PNEUMONIA, DataError, build_manifest
from cxr_training.data.labels import folder_finding, text_finding
from cxr_training.data.readers import case_key
from support.dicoms import dicom_bytes


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
    report = build_manifest([folder], layout="folder-per-class")
    assert sorted(report.frame["label"]) == [COVID, "Edema", NO_FINDING, PNEUMONIA]
    assert set(report.frame["source"]) == {"radiography"}
    assert report.frame["patient"].isna().all()
    assert report.excluded == {"segmentation mask": 1}


def test_layout_can_be_named(ozturk):
    frame = build_manifest([ozturk], layout="folder-per-class").frame
    assert frame["patient"].isna().all()


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("COVID-19", COVID),
        ("COVID-19, ARDS", COVID),
        ("Pneumonia/Viral/COVID-19", COVID),
        ("Pneumonia/Viral/SARS", "Viral pneumonia"),
        ("Pneumocystis", "Fungal pneumonia"),
        ("Pneumonia/Bacterial/Klebsiella", "Bacterial pneumonia"),
        ("Pneumonia/Lipoid", "Other pneumonia"),
        ("Pneumonia", PNEUMONIA),
        ("No Finding", NO_FINDING),
        ("ARDS", None),
        ("todo", None),
        ("", None),
    ],
)
def test_findings(text, finding):
    assert text_finding(text) == finding


def test_unknown_class_folder_keeps_its_name():
    assert folder_finding("Edema") == "Edema"
    assert folder_finding("Lung_Opacity") == "Lung opacity"
    assert folder_finding("viral-PNEUMONIA") == "Viral pneumonia"


def test_a_row_keeps_the_words_of_its_data_set(cohen):
    frame = build_manifest([cohen]).frame
    assert by_name(frame, "finding_text")["j.jpg"] == "Pneumonia/Viral/COVID-19"
    assert by_name(frame, "finding")["c.jpg"] == "Bacterial pneumonia"
    assert set(frame["source"]) == {"cohen"}


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        build_manifest([tmp_path / "nowhere"])


def test_unknown_layout(tmp_path):
    with pytest.raises(DataError, match="Unknown layout 'nifti'"):
        build_manifest([tmp_path], layout="nifti")


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


# COVID-19 Radiography Database

CASE = "https://www.eurorad.org/case/16660"
COLLECTION = "https://github.com/armiro/COVID-CXNet"


@pytest.fixture
def chowdhury(tmp_path, make_image):
    folder = tmp_path / "COVID-19_Radiography_Dataset"
    names = [
        "COVID/images/COVID-1.png", "COVID/images/COVID-2.png", "COVID/images/COVID-3.png",
        "COVID/images/COVID-4.png", "Normal/images/Normal-1.png",
        "Viral Pneumonia/images/Viral Pneumonia-1.png", "Lung_Opacity/images/Lung_Opacity-1.png",
    ]  # fmt: skip
    for number, name in enumerate(names):
        make_image(folder / name, 300 + number)
        make_image(folder / name.replace("images", "masks"), 400 + number)
    tables = {
        "COVID": [("COVID-1", CASE), ("COVID-2", CASE), ("COVID-3", COLLECTION)],
        "Normal": [
            ("NORMAL-1", "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data")
        ],
    }
    for name, rows in tables.items():
        table = [
            {"FILE NAME": n, "FORMAT": "PNG", "SIZE": "256*256", "URL": url} for n, url in rows
        ]
        pd.DataFrame(table).to_excel(folder / f"{name}.metadata.xlsx", index=False)
    return folder


def test_chowdhury_keeps_the_origin_and_groups_by_case(chowdhury):
    report = build_manifest([chowdhury], task="covid")
    origins, patients = by_name(report.frame, "origin"), by_name(report.frame, "patient")
    assert origins["COVID-1.png"] == CASE
    assert origins["Normal-1.png"].endswith("rsna-pneumonia-detection-challenge/data")
    assert origins["COVID-4.png"] is None
    assert patients["COVID-1.png"] == patients["COVID-2.png"] == f"chowdhury:{CASE}"
    assert patients["COVID-3.png"] is patients["Normal-1.png"] is None
    assert by_name(report.frame, "finding")["Lung_Opacity-1.png"] == "Lung opacity"
    assert set(report.frame["source"]) == {"chowdhury"}
    assert report.excluded == {"segmentation mask": 7}


def test_chowdhury_lung_opacity_is_no_class_of_the_three(chowdhury):
    report = build_manifest([chowdhury])
    assert set(report.frame["label"]) == {COVID, NO_FINDING, PNEUMONIA}
    assert report.excluded == {"no class for Lung opacity": 1, "segmentation mask": 7}


def test_chowdhury_table_that_cannot_be_read(chowdhury):
    table = chowdhury / "COVID.metadata.xlsx"
    pd.DataFrame({"FILE NAME": ["COVID-1"]}).to_excel(table, index=False)
    with pytest.raises(DataError, match="lacks the columns URL"):
        build_manifest([chowdhury])
    table.write_bytes(b"no table")
    with pytest.raises(DataError, match="is not an Excel table"):
        build_manifest([chowdhury])


# DICOM folders


def write_dicom(path, number, **tags):
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((64, 72), Image.Resampling.BICUBIC)).astype(np.uint16) * 16
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dicom_bytes(pixels, BitsStored=12, HighBit=11, **tags))
    return path


@pytest.fixture
def dicom_tree(tmp_path, make_image):
    folder = tmp_path / "hospital"
    own = {"PatientID": "SECRET-1", "ViewPosition": "PA", "PatientAge": "070Y"}
    write_dicom(folder / "COVID/study1/a", 1, **own)
    write_dicom(folder / "Normal/b.dcm", 2, **own, PatientSex="O")
    write_dicom(folder / "Normal/c.dcm", 3, PatientID=None, PatientAge="006M", PatientSex="M")
    write_dicom(folder / "Normal/lateral.dcm", 4, ViewPosition="LL")
    write_dicom(folder / "Normal/ct.dcm", 5, Modality="CT")
    write_dicom(folder / "Normal/hand.dcm", 6, BodyPartExamined="HAND")
    write_dicom(folder / "Normal/film.dcm", 7, NumberOfFrames=2)
    write_dicom(folder / "Normal/cut.dcm", 8).write_bytes(bytes(128) + b"DICM" + b"x" * 40)
    make_image(folder / "Normal/d.png", 9)
    return folder


def test_dicom_folders_give_patients_without_naming_them(dicom_tree):
    report = build_manifest([dicom_tree])
    frame = report.frame
    assert by_name(frame, "label") == {
        "a": COVID, "b.dcm": NO_FINDING, "c.dcm": NO_FINDING, "d.png": NO_FINDING,
    }  # fmt: skip
    patients = by_name(frame, "patient")
    assert patients["a"] == patients["b.dcm"]
    assert patients["a"].startswith("dicom:")
    assert patients["c.dcm"] is patients["d.png"] is None
    assert by_name(frame, "group")["a"] == by_name(frame, "group")["b.dcm"]
    assert by_name(frame, "view")["a"] == "PA"
    assert (by_name(frame, "sex")["a"], by_name(frame, "sex")["b.dcm"]) == ("F", None)
    assert (by_name(frame, "age")["a"], by_name(frame, "age")["c.dcm"]) == (70.0, 0.5)
    assert "SECRET" not in frame.to_csv()
    assert report.excluded == {
        "lateral view": 1, "not a radiograph": 1, "not of the chest": 1, "several frames": 1,
        "unreadable": 1,
    }  # fmt: skip
