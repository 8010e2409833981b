"""`cxr compile`: what it tries, what it refuses, and what it writes down."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import cxr_training.compilation as compilation_module
from cxr.answer import Options, Prediction
from cxr.config import Compilation, ModelConfig, file_sha256, load_config
from cxr.engine import CONFIG_FILE, CPU, CUDA, TENSORRT, Engine
from cxr.errors import ModelLoadError, Rejection
from cxr.mar import CARD_FILE, verify
from cxr.quality import PIXEL_REASONS
from cxr_archive.packager import pack
from cxr_training.compilation import ORIGINAL, Gate, compile_bundle
from cxr_training.compile_cli import compile_command
from cxr_training.data import write_manifest
from cxr_training.errors import TrainingError
from cxr_training.runs import Run
from support.bundles import config_document, graph_bytes

LOOSE = Gate(accuracy=1.0, difference=1.0, flags=1.0)


@pytest.fixture(scope="module", autouse=True)
def one_share() -> Iterator[None]:
    """A network of random weights says nothing about shares; one is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation_module, "_FLOAT_SHARES", (0.5,))
        patch.setattr(compilation_module, "_CALIBRATION_IMAGES", 4)
        yield


@pytest.fixture(scope="module")
def manifest(run_folder: Path) -> Path:
    return run_folder / "manifest.parquet"


@pytest.fixture(scope="module")
def compiled(bundle: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        # Whichever is faster here, the int8 graph is the one to look at.
        patch.setattr(compilation_module, "_figures", _only_int8_is_faster)
        compile_bundle(bundle, manifest, out, gate=LOOSE)
    return out


_real_figures = compilation_module._figures


def _only_int8_is_faster(name: str, *rest: object) -> object:
    speedup = 2.0 if name.startswith("int8") else 1.0
    return _real_figures(name, *rest).model_copy(update={"speedup": speedup})  # type: ignore[arg-type]


def test_the_compiled_bundle_serves_and_answers_nearly_the_same(
    run: Run, bundle: Path, compiled: Path
) -> None:
    images = [Path(path).read_bytes() for path in run.rows("test")["path"][:4]]
    before, after = Engine(bundle).predict(images), Engine(compiled).predict(images)
    for one, other in zip(before, after, strict=True):
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        np.testing.assert_allclose(
            list(one.probabilities.values()), list(other.probabilities.values()), atol=0.2
        )
    assert (compiled / "model.onnx").stat().st_size < (bundle / "model.onnx").stat().st_size


def test_explanations_stay(run: Run, bundle: Path, compiled: Path) -> None:
    image = Path(run.rows("test")["path"].iloc[0]).read_bytes()
    options = [Options(explain=run.head.labels[0])]
    maps = []
    for folder in (bundle, compiled):
        (answer,) = Engine(folder).predict([image], options)
        assert isinstance(answer, Prediction)
        assert answer.explanation is not None
        maps.append(answer.explanation.heatmap.ravel())
    assert np.corrcoef(maps)[0, 1] > 0.9


def test_the_choice_and_its_figures_travel_in_the_configuration(
    run: Run, bundle: Path, compiled: Path
) -> None:
    original, config = load_config(bundle), load_config(compiled)
    found = config.compilation
    assert found is not None
    assert found.chosen == "int8-0.5"
    assert found.source_sha256 == original.graph.sha256
    assert config.graph.sha256 == file_sha256(compiled / "model.onnx") != original.graph.sha256
    assert found.images == len(run.rows("validation"))
    assert [one.name for one in found.candidates] == ["original", "optimized", "int8-0.5"]
    first, second, _ = found.candidates
    assert (first.labels_changed, first.difference_max, first.speedup) == (0, 0.0, 1.0)
    assert second.difference_max < 1e-4
    assert "## Compilation" in (compiled / CARD_FILE).read_text()
    # Its answers differ a little, and so does what they are compared with.
    assert config.reference is not None
    assert config.reference.keys() == (original.reference or {}).keys()
    changed = {"graph", "compilation", "guards", "reference"}
    assert config.model_dump(exclude=changed) == original.model_dump(exclude=changed)


def test_a_compiled_model_packs_and_verifies(compiled: Path, tmp_path: Path) -> None:
    pack(compiled, tmp_path / "cxr.mar")
    assert verify(tmp_path / "cxr.mar") == load_config(compiled)


def test_a_worse_graph_is_refused_and_the_original_stays(
    bundle: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation_module, "_figures", _only_int8_is_faster)
    pack(bundle, tmp_path / "cxr.mar")
    result = CliRunner().invoke(
        compile_command,
        [str(tmp_path / "cxr.mar"), "--manifest", str(manifest), "--max-difference", "1e-7",
         "--out", str(tmp_path / "out.mar"), "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["chosen"] == ORIGINAL
    assert [one["passed"] for one in document["candidates"] if "int8" in one["name"]] == [False]
    config = verify(tmp_path / "out.mar")
    assert config.compilation is not None
    assert config.graph.sha256 == load_config(bundle).graph.sha256


def trial(right: np.ndarray) -> compilation_module._Trial:
    no_flags = np.zeros((len(right), 1), dtype=np.bool_)
    return compilation_module._Trial(
        right,
        right.astype(int),
        np.zeros(len(right)),
        np.ones(len(right)),
        {Rejection.ROTATED: 0.5},
        no_flags,
    )


def test_a_graph_that_moves_the_guards_is_refused() -> None:
    original = trial(np.arange(200) < 190)
    for changed, passed in ((2, True), (3, False)):
        flags = (np.arange(200) < changed)[:, None]
        figures = _real_figures("other", replace(original, flags=flags), original, Gate(flags=0.01))
        assert (figures.flags_changed, figures.passed) == (changed, passed)


def test_limits_move_as_their_scores_do(bundle: Path, compiled: Path) -> None:
    before, after = load_config(bundle).guards, load_config(compiled).guards
    assert before is not None
    assert after is not None
    of_pixels = {reason: before.limits[reason] for reason in PIXEL_REASONS}
    assert {reason: after.limits[reason] for reason in PIXEL_REASONS} == of_pixels
    scores = [np.array([0.1, 1.0]), np.array([0.2, 1.2]), np.array([0.4, 1.1])]
    two = before.model_copy(update={"scores": (Rejection.ROTATED, Rejection.OUT_OF_DISTRIBUTION)})
    limits, flags = compilation_module._guarded(
        [row + np.array([0.0, 0.3]) for row in scores], scores, two
    )
    assert limits[Rejection.ROTATED] == before.limits[Rejection.ROTATED]
    assert limits[Rejection.OUT_OF_DISTRIBUTION] == pytest.approx(
        before.limits[Rejection.OUT_OF_DISTRIBUTION] + 0.3
    )
    assert flags.shape == (3, 2)


def test_lost_accuracy_is_refused_whatever_the_probabilities() -> None:
    right = np.arange(200) < 190
    original = trial(right)
    worse = replace(original, right=np.arange(200) < 188)
    assert not _real_figures("worse", worse, original, Gate(accuracy=0.005)).passed
    just = replace(original, right=np.arange(200) < 189)
    assert _real_figures("just", just, original, Gate(accuracy=0.005)).passed


def spoiled(graph: Path, output: str, out: Path) -> Path:
    """The same graph, but that all numbers of an output are NaN."""
    model = onnx.load(graph)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}_before" if name == output else name for name in names]
    model.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
    model.graph.node.append(helper.make_node("Mul", [f"{output}_before", "nan"], [output]))
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("of", ["graph", "guards"])
def test_a_graph_that_answers_no_numbers_is_refused_by_any_gate(
    of: str, bundle: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(bundle)
    original = bundle / config.graph.file
    broken = spoiled(original, getattr(config, of).output.name, tmp_path / "broken.onnx")
    ways = {name: compilation_module._Way(graph) for name, graph in
            ((ORIGINAL, original), ("int8-broken", broken))}  # fmt: skip
    monkeypatch.setattr(compilation_module, "_candidates", lambda *_: ways)
    monkeypatch.setattr(compilation_module, "_figures", _only_int8_is_faster)
    found = compile_bundle(bundle, manifest, tmp_path / "out", gate=LOOSE)
    assert [candidate.passed for candidate in found.candidates] == [True, False]
    assert found.candidates[1].difference_max == (1 if of == "graph" else 0)
    assert load_config(tmp_path / "out").graph.sha256 == config.graph.sha256


def test_no_card_of_another_model_stays(bundle: Path, manifest: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(bundle, tmp_path / "bare"))
    (bare / CARD_FILE).unlink()
    out = Path(shutil.copytree(bundle, tmp_path / "out"))
    compile_bundle(bare, manifest, out, gate=LOOSE)
    assert not (out / CARD_FILE).exists()


def test_another_models_manifest_is_refused(bundle: Path, run: Run, tmp_path: Path) -> None:
    run.frame.iloc[1:].to_parquet(tmp_path / "other.parquet")
    with pytest.raises(TrainingError, match="not the manifest that the model was trained on"):
        compile_bundle(bundle, tmp_path / "other.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_images_under_other_splits_are_refused(
    bundle: Path, run: Run, tmp_path: Path
) -> None:
    other = {"train": "validation", "validation": "train"}
    write_manifest(run.frame.replace({"split": other}), tmp_path / "manifest.parquet")
    with pytest.raises(TrainingError, match="not the manifest"):
        compile_bundle(bundle, tmp_path / "manifest.parquet", tmp_path / "out")


def test_an_archive_without_digest_of_the_splits_compiles(
    bundle: Path, manifest: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(bundle, tmp_path / "old"))
    document = json.loads((old / CONFIG_FILE).read_text())
    del document["training_data"]["splits_sha256"]
    (old / CONFIG_FILE).write_text(json.dumps(document))
    compile_bundle(old, manifest, tmp_path / "out")
    assert load_config(tmp_path / "out").training_data.splits_sha256 is None


def test_a_compiled_model_is_not_compiled_again(
    compiled: Path, manifest: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="compiled already"):
        compile_bundle(compiled, manifest, tmp_path / "out")


def test_tensorrt_needs_its_provider(bundle: Path, manifest: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        compile_command,
        [str(bundle), "--manifest", str(manifest), "--out", str(tmp_path / "out"), "--tensorrt"],
    )
    assert result.exit_code == 1
    assert "ONNX Runtime has no TensorRT here" in result.output


def test_tensorrt_that_cannot_be_loaded_is_refused(
    bundle: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`onnxruntime-gpu` offers it on every machine, and runs the graph on the CPU then."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CPU])
    with pytest.raises(TrainingError, match="cannot use TensorRT here"):
        compile_bundle(bundle, manifest, tmp_path / "out", tensorrt=True)
    assert not (tmp_path / "out").exists()


class Gpu(ort.InferenceSession):  # type: ignore[misc]
    """Says that it is on a GPU. TensorRT answers `off` more, and in float16 `coarse` more."""

    asked: list[Any]
    off = 0.0
    coarse = 0.0

    def __init__(self, model: Any, options: Any, *, providers: Any, **more: Any) -> None:
        self.asked.append(providers)
        self._given = [name for name, _ in providers]
        first, settings = providers[0]
        self._more = 0.0
        if first == TENSORRT:
            self._more = self.coarse if settings["trt_fp16_enable"] == "1" else self.off
        super().__init__(model, options, providers=[CPU], **more)

    def get_providers(self) -> list[str]:
        return self._given

    def run(self, names: Any, inputs: Any) -> Any:
        if np.isinf(self._more):
            raise RuntimeError("no engine could be built")
        first, *rest = super().run(names, inputs)
        return [first + np.float32(self._more), *rest]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Gpu]:
    """TensorRT in float16 is the fastest, and in float32 faster than CUDA."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    fresh = type("Gpu", (Gpu,), {"asked": []})
    monkeypatch.setattr(ort, "InferenceSession", fresh)
    speed = {ORIGINAL: 1.0, "tensorrt-float32": 2.0, "tensorrt-float16": 3.0}

    def figures(name: str, *rest: object) -> object:
        return _real_figures(name, *rest).model_copy(update={"speedup": speed[name]})  # type: ignore[arg-type]

    monkeypatch.setattr(compilation_module, "_figures", figures)
    return fresh


@pytest.mark.parametrize(
    ("off", "expected"),
    [
        ((0.0, 0.01), ("tensorrt-float16", TENSORRT, "float16")),
        ((0.01, 0.1), ("tensorrt-float32", TENSORRT, None)),
        ((0.1, 0.1), (ORIGINAL, None, None)),
    ],
)
def test_tensorrt_has_to_answer_as_cuda_does(
    *,
    off: tuple[float, float],
    expected: tuple[str, str | None, str | None],
    bundle: Path,
    manifest: Path,
    tmp_path: Path,
    gpu: type[Gpu],
) -> None:
    gpu.off, gpu.coarse = off
    found = compile_bundle(bundle, manifest, tmp_path / "out", tensorrt=True)
    assert (found.chosen, found.execution_provider, found.precision) == expected
    assert load_config(tmp_path / "out").graph.sha256 == load_config(bundle).graph.sha256
    # It is served as it was measured.
    gpu.asked.clear()
    assert Engine(tmp_path / "out").provider == (found.execution_provider or CUDA)
    options = dict(gpu.asked[0]).get(TENSORRT, {})
    assert options.get("trt_fp16_enable", "0") == str(int(found.precision == "float16"))


def test_an_engine_that_tensorrt_cannot_build_is_told(
    bundle: Path, manifest: Path, tmp_path: Path, gpu: type[Gpu]
) -> None:
    gpu.coarse = np.inf
    with pytest.raises(TrainingError, match="tensorrt-float16 here: no engine could be built"):
        compile_bundle(bundle, manifest, tmp_path / "out", tensorrt=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_archive_is_refused(bundle: Path, manifest: Path, tmp_path: Path) -> None:
    pack(bundle, tmp_path / "cxr.mar")
    data = bytearray((tmp_path / "cxr.mar").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "cxr.mar").write_bytes(data)
    with pytest.raises(ModelLoadError):
        compile_bundle(tmp_path / "cxr.mar", manifest, tmp_path / "out")


class TestConfiguration:
    def test_an_uncompiled_model_has_no_such_field(self) -> None:
        config = ModelConfig.model_validate(config_document(graph_bytes()))
        assert config.compilation is None
        assert "compilation" not in config.to_json()

    def test_what_was_refused_cannot_be_chosen(self, compiled: Path) -> None:
        found = load_config(compiled).compilation
        assert found is not None
        document = found.model_dump()
        document["candidates"] = [one | {"passed": False} for one in document["candidates"]]
        with pytest.raises(ValueError, match="chosen must name a candidate that passed"):
            Compilation.model_validate(document)

    def test_a_provider_that_is_missing_is_passed_over(
        self, compiled: Path, tmp_path: Path
    ) -> None:
        document = json.loads((compiled / "cxr-model.json").read_bytes())
        document["compilation"]["execution_provider"] = TENSORRT
        for file in compiled.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "cxr-model.json").write_text(json.dumps(document))
        assert load_config(tmp_path).compilation is not None
        assert Engine(tmp_path).provider == CPU
