from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from cxr_training.errors import TrainingError
from cxr_training.shortcuts import (
    FILL,
    ShortcutAudit,
    audit_shortcuts,
    masked,
    read_audit,
    source_readability,
)

LABELS = ("ill", "well")


def _images(folder: Path, *, cue: str, count: int = 12) -> pd.DataFrame:
    """Grey images of two classes that differ in the lungs or at the border only."""
    rows = []
    for number in range(2 * count):
        label = LABELS[number % 2]
        pixels = np.full((100, 100), 100, np.uint8)
        value = 220 if label == "ill" else 20
        if cue == "border":
            pixels[:3] = value
        else:
            pixels[30:60, 20:40] = value
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        rows.append({"path": str(path), "label": label, "group": f"g{number}", "source": "s"})
    return pd.DataFrame(rows)


def _features(images: Sequence[Image.Image]) -> npt.NDArray[np.float64]:
    return np.stack([np.asarray(image.resize((25, 25)), float).ravel() for image in images])


def _predict(images: Sequence[Image.Image]) -> npt.NDArray[np.float64]:
    """Ill where anything is very bright, well where anything is very dark."""
    bright = [np.ptp([image.getextrema()[1], 220]) < 20 for image in images]
    return np.asarray([[0.9, 0.1] if found else [0.1, 0.9] for found in bright])


def test_the_views_hide_the_lungs_or_all_else() -> None:
    image = Image.new("RGB", (200, 100), (250, 250, 250))
    blanked, kept = masked(image, "blanked"), masked(image, "only_lungs")
    lung, middle, corner = (50, 50), (100, 50), (1, 1)
    grey, white = (FILL,) * 3, (250, 250, 250)
    assert [blanked.getpixel(point) for point in (lung, middle, corner)] == [grey, grey, white]
    assert [kept.getpixel(point) for point in (lung, middle, corner)] == [white, grey, grey]
    assert image.getpixel(lung) == white
    assert masked(image, "original").size == blanked.size == kept.size


def test_a_model_that_reads_the_border_is_found_out(tmp_path: Path) -> None:
    frame = _images(tmp_path, cue="border")
    audit = audit_shortcuts(frame, _predict, LABELS, seed=0, features=_features)
    assert audit.views["original"].accuracy.value == 1
    assert audit.views["blanked"].accuracy.value == 1
    assert audit.views["only_lungs"].balanced_accuracy.value == 0.5
    assert "Shortcuts explain most" in audit.verdict[0]


def test_a_model_that_reads_the_lungs_is_not_accused(tmp_path: Path) -> None:
    audit = audit_shortcuts(_images(tmp_path, cue="lung"), _predict, LABELS, seed=0)
    assert audit.views["only_lungs"].accuracy.value == 1
    assert audit.views["blanked"].balanced_accuracy.value == 0.5
    assert audit.views["blanked"].retrained is None
    assert "No shortcut was found" in audit.verdict[0]


def test_a_model_that_knows_nothing_gets_no_verdict(tmp_path: Path) -> None:
    def guess(images: Sequence[Image.Image]) -> npt.NDArray[np.float64]:
        return np.tile([0.6, 0.4], (len(images), 1))

    audit = audit_shortcuts(_images(tmp_path, cue="lung"), guess, LABELS, seed=0)
    assert "nothing follows" in audit.verdict[0]


def _two_sources(shift: float) -> tuple[pd.DataFrame, npt.NDArray[np.float64]]:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "label": ["ill"] * 60 + ["well"] * 20,
            "source": ["here", "there"] * 30 + ["here"] * 20,
            "group": [f"g{number}" for number in range(80)],
        }
    )
    features = random.normal(size=(80, 4))
    features[:, 0] += shift * (frame["source"] == "there")
    return frame, features


def test_a_source_that_the_features_show_is_named() -> None:
    frame, features = _two_sources(5.0)
    (row,) = source_readability(frame, features, seed=0)
    assert (row.label, row.sources, row.chance) == ("ill", {"here": 30, "there": 30}, 0.5)
    assert row.balanced_accuracy.low > 0.9


def test_a_source_that_the_features_hide_is_at_chance() -> None:
    (row,) = source_readability(*_two_sources(0.0), seed=0)
    assert row.balanced_accuracy.low < 0.5 < row.balanced_accuracy.high


def test_copies_in_two_sources_do_not_count() -> None:
    frame, features = _two_sources(5.0)
    frame["group"] = [f"g{number // 2}" for number in range(60)] + [f"h{n}" for n in range(20)]
    assert source_readability(frame, features, seed=0) == ()


def test_an_audit_is_read_back(tmp_path: Path) -> None:
    audit = audit_shortcuts(
        _images(tmp_path, cue="lung"),
        _predict,
        LABELS,
        seed=0,
        sources=source_readability(*_two_sources(5.0), seed=0),
    )
    assert "can see where an image comes from" in audit.verdict[-1]
    path = tmp_path / "shortcuts.json"
    assert read_audit(path) is None
    path.write_text(audit.model_dump_json(), encoding="utf-8")
    assert read_audit(path) == ShortcutAudit.model_validate_json(path.read_bytes()) == audit
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(TrainingError, match="damaged"):
        read_audit(path)


def test_one_class_cannot_be_audited(tmp_path: Path) -> None:
    frame = _images(tmp_path, cue="lung").query("label == 'ill'")
    with pytest.raises(TrainingError, match="at least two classes"):
        audit_shortcuts(frame, _predict, LABELS, seed=0)


def test_an_unusable_image_is_an_error_that_names_no_file(tmp_path: Path) -> None:
    frame = _images(tmp_path, cue="lung")
    Path(frame["path"][3]).rename(tmp_path / "moved.png")
    with pytest.raises(TrainingError, match="Cannot read an image of the manifest") as caught:
        audit_shortcuts(frame, _predict, LABELS, seed=0)
    assert str(tmp_path) not in str(caught.value)
