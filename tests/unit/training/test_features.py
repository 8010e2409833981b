import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import pytest
from PIL import Image

from cxr.engine import Engine
from cxr.preprocess import REVISION
from cxr_training import features
from cxr_training.backbones import Backbone
from cxr_training.errors import TrainingError
from cxr_training.features import extract_features, image_batches, load_image
from cxr_training.runs import Run


def _image_file(folder: Path, kind: str) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    if kind == "grey-jpeg":
        Image.fromarray(pixels[:, :, 0]).save(buffer, "JPEG")
    elif kind == "rgb-jpeg":
        Image.fromarray(pixels).save(buffer, "JPEG")
    elif kind == "png-16-bit":
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).convert("RGBA").save(buffer, "PNG")
    file = folder / kind
    file.write_bytes(buffer.getvalue())
    return file


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["grey-jpeg", "rgb-jpeg", "png-16-bit", "rgba-png"])
def test_training_and_serving_make_the_same_tensor(
    tmp_path: Path, bundle: Path, run: Run, kind: str
) -> None:
    file = _image_file(tmp_path, kind)
    trained = load_image(file, _sha256(file), run.record.preprocessing)
    served = Engine(bundle).tensor(file.read_bytes())
    assert trained.dtype == served.dtype == np.float32
    np.testing.assert_array_equal(trained, served)


def test_batches_come_in_the_manifests_order(frame: pd.DataFrame, backbone: Backbone) -> None:
    rows = frame.iloc[[4, 0, 2]]
    batches = list(image_batches(rows, backbone.preprocessing, 2))
    assert [len(batch) for batch in batches] == [2, 1]
    for tensor, (_, row) in zip(np.concatenate(batches), rows.iterrows(), strict=True):
        expected = load_image(Path(row["path"]), row["sha256"], backbone.preprocessing)
        np.testing.assert_array_equal(tensor, expected)


def test_onnx_runtime_gives_the_features_that_pytorch_gives(
    frame: pd.DataFrame, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = frame.head(6)
    expected = extract_features(rows, backbone, torch_only=True)
    monkeypatch.setattr(features, "_WORTH_A_GRAPH", 1)
    found = extract_features(rows, backbone)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    # Another runtime rounds otherwise, so that equal bits would mean that none was asked.
    assert not np.array_equal(found, expected)


def test_batch_size_does_not_matter(frame: pd.DataFrame, backbone: Backbone) -> None:
    rows = frame.head(3)
    one = extract_features(rows, backbone, batch_size=1)
    three = extract_features(rows, backbone, batch_size=3)
    np.testing.assert_allclose(one, three, rtol=1e-3, atol=1e-4)


def test_cached_images_are_not_read_again(tmp_path: Path, backbone: Backbone) -> None:
    file = _image_file(tmp_path, "grey-jpeg")
    rows = pd.DataFrame({"path": [str(file)] * 2, "sha256": [_sha256(file)] * 2})
    first = extract_features(rows, backbone, cache=tmp_path / "cache")
    file.unlink()
    second = extract_features(rows, backbone, cache=tmp_path / "cache")
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[0], first[1])


@pytest.mark.parametrize("missing", [0, 1, 6])
def test_what_a_cache_holds_does_not_change_who_computes_the_rest(
    frame: pd.DataFrame,
    backbone: Backbone,
    missing: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = frame.head(6)
    extract_features(rows.head(6 - missing), backbone, cache=tmp_path)
    asked: list[int] = []

    def network(backbone: Backbone, images: int) -> features.Network:
        asked.append(images)
        return features._torch_network(backbone)

    monkeypatch.setattr(features, "feature_network", network)
    extract_features(rows, backbone, cache=tmp_path)
    # A graph for no image would be made for nothing.
    assert asked == ([6] if missing else [])


def test_features_of_another_preprocessing_are_not_taken_from_the_cache(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(REVISION) in features._MADE_BY
    assert PIL.__version__ in features._MADE_BY
    file = _image_file(tmp_path, "grey-jpeg")
    rows = pd.DataFrame({"path": [str(file)], "sha256": [_sha256(file)]})
    extract_features(rows, backbone, cache=tmp_path / "cache")
    file.unlink()
    monkeypatch.setattr(features, "_MADE_BY", "another")
    with pytest.raises(TrainingError, match="Cannot read"):
        extract_features(rows, backbone, cache=tmp_path / "cache")


def test_a_damaged_cache_entry_is_computed_again(tmp_path: Path, backbone: Backbone) -> None:
    file = _image_file(tmp_path, "grey-jpeg")
    rows = pd.DataFrame({"path": [str(file)], "sha256": [_sha256(file)]})
    first = extract_features(rows, backbone, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").rglob("*.npy")
    entry.write_bytes(entry.read_bytes()[:100])
    np.testing.assert_array_equal(extract_features(rows, backbone, cache=tmp_path / "cache"), first)


def test_a_file_that_changed_after_its_manifest_is_refused(
    tmp_path: Path, backbone: Backbone
) -> None:
    file = _image_file(tmp_path, "grey-jpeg")
    rows = pd.DataFrame({"path": [str(file)], "sha256": ["0" * 64]})
    with pytest.raises(TrainingError, match="has changed since"):
        extract_features(rows, backbone)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, backbone: Backbone) -> None:
    file = tmp_path / "broken.jpg"
    file.write_bytes(b"\xff\xd8 no more")
    rows = pd.DataFrame({"path": [str(file)], "sha256": [_sha256(file)]})
    with pytest.raises(TrainingError, match=r"broken\.jpg cannot be used: .*damaged"):
        extract_features(rows, backbone)


def test_an_image_that_is_gone_is_named(tmp_path: Path, backbone: Backbone) -> None:
    rows = pd.DataFrame({"path": [str(tmp_path / "gone.jpg")], "sha256": ["0" * 64]})
    with pytest.raises(TrainingError, match=r"gone\.jpg: No such file"):
        extract_features(rows, backbone)


def test_no_images_give_no_features(frame: pd.DataFrame, backbone: Backbone) -> None:
    assert extract_features(frame.head(0), backbone).shape == (0, backbone.feature_count)
