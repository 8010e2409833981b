from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import cxr_training.export as export_module
from cxr.answer import Prediction
from cxr.config import file_sha256, load_config
from cxr.engine import Engine
from cxr_training.errors import TrainingError
from cxr_training.export import ExportReport, export
from cxr_training.heads import CalibratedHead
from cxr_training.runs import Run
from cxr_training.train import predict_proba


def test_the_bundle_answers_like_the_run(run: Run, bundle: Path) -> None:
    frame = run.rows("test")
    expected = predict_proba(run, frame)
    answers = Engine(bundle).predict([Path(path).read_bytes() for path in frame["path"]])
    for answer, row in zip(answers, expected, strict=True):
        assert isinstance(answer, Prediction)
        assert answer.label == run.head.labels[int(row.argmax())]
        np.testing.assert_allclose(list(answer.probabilities.values()), row, atol=1e-4)


def test_the_report_says_how_far_the_runtimes_differ(run: Run, report: ExportReport) -> None:
    assert report.parity_images == len(run.rows("test"))
    assert 0 <= report.max_difference <= 1e-4


def test_the_graph_is_the_one_that_the_configuration_describes(bundle: Path) -> None:
    graph = load_config(bundle).graph
    model = onnx.load(bundle / graph.file)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [graph.opset]
    explanation, guards = load_config(bundle).explanation, load_config(bundle).guards
    assert explanation is not None
    assert guards is not None
    assert [value.name for value in model.graph.input] == [graph.input.name, explanation.switch]
    outputs = [graph.output.name, guards.output.name, explanation.output.name]
    assert [value.name for value in model.graph.output] == outputs
    assert file_sha256(bundle / graph.file) == graph.sha256


@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_takes_any_batch(bundle: Path, batch: int) -> None:
    engine = Engine(bundle)
    images = np.random.default_rng(0).normal(size=(batch, *engine.preprocessing.item_shape))
    probabilities = engine.forward(images.astype(np.float32))
    assert probabilities.shape == (batch, len(engine.labels))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_the_same_run_gives_the_same_bytes_in_place_of_an_older_bundle(
    run: Run, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "cxr-model.json").write_text("{}")
    export(run, tmp_path / "again")
    assert {file.name for file in bundle.iterdir()} == {
        "cxr-model.json",
        "model.onnx",
        "MODEL_CARD.md",
    }
    for file in bundle.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_the_bundle_names_no_folder_of_this_machine(run: Run, bundle: Path) -> None:
    here = [Path(run.frame["path"].iloc[0]).parent, bundle.parent, Path(export_module.__file__)]
    for file in bundle.iterdir():
        content = file.read_bytes()
        assert not [path for path in here if str(path).encode() in content]


def test_a_model_of_phantoms_says_so(bundle: Path) -> None:
    config = load_config(bundle)
    assert config.training_data.synthetic
    assert "knows nothing of real radiographs" in config.intended_use
    assert "ot a medical device" in config.intended_use
    assert any("synthetic" in limitation for limitation in config.limitations)


def test_a_model_of_radiographs_states_its_limits(run: Run, tmp_path: Path) -> None:
    data = run.record.training_data.model_copy(update={"synthetic": False})
    one_class = run.frame["label"].iloc[0]
    frame = run.frame.assign(synthetic=False, source="mixed")
    frame.loc[frame["label"] == one_class, "source"] = "one-sided"
    real = replace(run, record=run.record.model_copy(update={"training_data": data}), frame=frame)
    config = export(real, tmp_path / "bundle").config
    text = " ".join([config.intended_use, *config.limitations])
    for phrase in ("not a medical device", "adults", "confounded", "noisy", "label: one-sided."):
        assert phrase in text
    assert "synthetic" not in text


def test_no_bundle_where_the_runtimes_disagree(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faithful = export_module._torch_probabilities
    wrong = CalibratedHead(run.head, 3.0)
    monkeypatch.setattr(
        export_module,
        "_torch_probabilities",
        lambda backbone, _, frame: faithful(backbone, wrong, frame),
    )
    with pytest.raises(TrainingError, match="ONNX Runtime differs from PyTorch"):
        export(run, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_not_written_over_a_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bundle"
    file.write_text("mine")
    with pytest.raises(TrainingError, match="is a file"):
        export(run, file)
