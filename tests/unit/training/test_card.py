import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cxr.config import ModelConfig
from cxr.mar import CARD_FILE, verify
from cxr_archive.packager import pack
from cxr_training.card import CardFacts, card_facts, limitations, model_card
from cxr_training.errors import TrainingError
from cxr_training.folds import summarize_folds, write_folds
from cxr_training.runs import Run
from support.bundles import LABELS, config_document, graph_bytes, make_bundle


def _config(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate(config_document(graph_bytes(), **changes))


def _facts() -> CardFacts:
    frame = pd.DataFrame(
        {
            "label": list(LABELS) * 4,
            "source": ["one"] * 6 + ["two"] * 6,
            "group": [f"g{number}" for number in range(12)],
        }
    )
    summary = summarize_folds(
        frame,
        [np.tile(np.eye(3), (4, 1))],
        LABELS,
        [frame["source"]],
        seeds=[0],
        scheme="leave-one-source-out",
        recipe="robust",
    )
    return CardFacts(sources_out=(summary,))


@pytest.mark.parametrize("facts", [None, _facts()])
def test_each_of_the_44_items_is_answered_or_named_once(facts: CardFacts | None) -> None:
    answered, _, missing = model_card(_config(), facts).partition("### Not answered")
    rows = [
        [
            int(number)
            for number in re.findall(r"^\| (\d+) \|", part.split("### Answered")[-1], re.M)
        ]
        for part in (answered, missing)
    ]
    assert sorted(rows[0] + rows[1]) == list(range(1, 45))
    assert (33 in rows[0]) == (facts is not None)


def test_the_card_gives_figures_with_intervals_and_says_what_is_missing() -> None:
    card = model_card(_config())
    assert "| accuracy | 1.000 (0.50 to 1.00) |" in card
    assert "No cross-validation" in card
    assert "whether it reads the lung is not known" in card
    assert "Synthetic data" in card
    assert "robust" in model_card(_config(), _facts())


def test_a_split_by_image_is_called_so() -> None:
    assert "stand in one split" in model_card(_config())
    assert "3 groups stand in more than one split" in model_card(_config(), CardFacts(parted=3))


def test_held_out_patients_are_claimed_only_where_each_is_known(run: Run) -> None:
    data = run.record.training_data.model_copy(update={"synthetic": False})
    real = replace(run, record=run.record.model_copy(update={"training_data": data}))
    assert "held-out patients" in " ".join(limitations(real))
    frame = run.frame.assign(patient=run.frame["patient"].where(run.frame.index > 1, None))
    text = " ".join(limitations(replace(real, frame=frame)))
    assert "held-out groups" in text
    assert "held-out patients" not in text
    assert f"patient of 2 of {len(frame)} images is not known" in text


def test_the_card_says_of_how_many_images_no_patient_is_known() -> None:
    assert "is not known, and only near-duplicates" not in model_card(_config())
    card = model_card(_config(), CardFacts(unknown=7))
    assert "The patient of 7 images is not known.\n\n| class" in card
    assert "the patient of 7 images is not known, and only near-duplicates" in card


def test_every_table_row_has_its_columns() -> None:
    rows = [line for line in model_card(_config(), _facts()).splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert widths <= {3, 4, 5, 7}


def test_text_of_the_users_cannot_become_markup() -> None:
    card = model_card(_config(limitations=["| broken <b>table</b>\n# heading"]))
    assert "\\| broken \\<b\\>table\\</b\\> \\# heading" in card


def test_the_archive_carries_the_card(bundle: Path, tmp_path: Path) -> None:
    card = (bundle / CARD_FILE).read_text(encoding="utf-8")
    assert card.startswith("# phantom 2.1\n")
    archive = tmp_path / "cxr.mar"
    pack(bundle, archive)
    verify(archive)
    with zipfile.ZipFile(archive) as mar:
        assert mar.read(CARD_FILE).decode() == card


def test_a_bundle_without_card_is_packed_too(tmp_path: Path) -> None:
    archive = tmp_path / "cxr.mar"
    pack(make_bundle(tmp_path / "bundle"), archive)
    with zipfile.ZipFile(archive) as mar:
        assert CARD_FILE not in mar.namelist()


def test_facts_of_an_earlier_run_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    write_folds(tmp_path / "loso.json", _facts().sources_out)
    assert card_facts(tmp_path) == _facts()
    os.utime(tmp_path / "loso.json", (0, 0))
    assert card_facts(tmp_path) == CardFacts()


def test_damaged_facts_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "cv.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TrainingError, match="damaged"):
        card_facts(tmp_path)
