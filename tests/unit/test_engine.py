"""Loading a bundle, and answering images with it."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import cxr.engine
from cxr.answer import Prediction, Stage, decide
from cxr.config import file_sha256
from cxr.decode import DecodeLimits
from cxr.engine import CONFIG_FILE, Engine, usable_providers
from cxr.errors import BadImageError, ModelLoadError, Rejection
from support.bundles import LABELS, encoded_image, graph_bytes, make_bundle

# ONNX Runtime's names, and not those that the engine has for them.
CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(make_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / CONFIG_FILE
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_onnx_runtime_tells_nobody(bundle: Path, tmp_path: Path) -> None:
    """Its telemetry would leave a session file in the temporary folder, and open connections."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    environment = os.environ | {"TMPDIR": str(folder)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    code = f"import pathlib, cxr.engine; cxr.engine.Engine(pathlib.Path({str(bundle)!r})).warm_up()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(folder.iterdir()) == []


def replace_graph(bundle: Path, graph: bytes) -> None:
    """Another graph, with the digest that belongs to it."""
    (bundle / "model.onnx").write_bytes(graph)
    sha256 = file_sha256(bundle / "model.onnx")
    edit(bundle, lambda document: document["graph"].update(sha256=sha256))


class TestPredict:
    def test_probabilities_are_named_in_order_and_sum_to_one(self, engine: Engine) -> None:
        (answer,) = engine.predict([encoded_image()])
        assert isinstance(answer, Prediction)
        assert tuple(answer.probabilities) == LABELS
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert answer.label == max(answer.probabilities, key=answer.probabilities.__getitem__)

    def test_the_answer_is_the_softmax_of_the_graph(self, engine: Engine) -> None:
        (answer,) = engine.predict([encoded_image(brightness=180, kind="JPEG")])
        assert isinstance(answer, Prediction)
        tensor = engine.tensor(encoded_image(brightness=180, kind="JPEG"))
        weights = np.linspace(-2, 2, 9).reshape(3, 3)
        logits = weights @ tensor.mean(axis=(1, 2)) + np.linspace(0.3, -0.3, 3)
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(list(answer.probabilities.values()), expected, atol=1e-5)

    def test_no_images_give_no_answers(self, engine: Engine) -> None:
        assert engine.predict([]) == []

    def test_a_bad_image_harms_no_other(self, engine: Engine) -> None:
        dark, bright = encoded_image(brightness=40), encoded_image(brightness=220)
        answers = engine.predict([dark, b"not an image", bright, b""])
        assert answers[0] == engine.predict([dark])[0]
        assert answers[2] == engine.predict([bright])[0]
        assert answers[0] != answers[2]
        reasons = [a.reason for a in answers if isinstance(a, BadImageError)]
        assert reasons == [Rejection.NOT_AN_IMAGE, Rejection.EMPTY]

    def test_only_bad_images(self, engine: Engine) -> None:
        (answer,) = engine.predict([b"x"])
        assert isinstance(answer, BadImageError)

    def test_limits_are_applied(self, bundle: Path) -> None:
        engine = Engine(bundle, limits=DecodeLimits(max_pixels=5000))
        small, large = engine.predict([encoded_image(size=(70, 70)), encoded_image(size=(71, 71))])
        assert isinstance(small, Prediction)
        assert isinstance(large, BadImageError)
        assert large.reason is Rejection.TOO_MANY_PIXELS

    def test_threads_share_an_engine(self, engine: Engine) -> None:
        images = [encoded_image(brightness=20 + i * 7, seed=i) for i in range(30)]
        expected = [engine.predict([image])[0] for image in images]
        with ThreadPoolExecutor(8) as pool:
            actual = list(pool.map(lambda image: engine.predict([image])[0], images * 4))
        assert actual == expected * 4

    def test_a_forward_pass_may_use_several_threads(self, bundle: Path, engine: Engine) -> None:
        image = encoded_image()
        (answer,) = Engine(bundle, threads=2).predict([image])
        assert answer == engine.predict([image])[0]


class TestDecide:
    def test_thresholds_are_inclusive_and_each_class_has_its_own(self) -> None:
        answer = decide([0.5, 0.2, 0.3], LABELS, dict(zip(LABELS, (0.5, 0.3, 0.25), strict=True)))
        assert answer.label == "COVID-19"
        assert answer.positive == ("COVID-19", "Pneumonia")

    def test_every_label_needs_a_probability(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            decide([0.5, 0.5], LABELS, dict.fromkeys(LABELS, 0.5))


class TestLoad:
    def test_facts(self, engine: Engine) -> None:
        assert (engine.name, engine.version, engine.labels) == ("cxr", "1.0", LABELS)
        assert engine.provider.endswith("ExecutionProvider")
        assert isinstance(engine.warm_up(), Prediction)

    @pytest.mark.parametrize(
        ("available", "compiled_for", "asked"),
        [
            ([CPU], None, [CPU]),
            ([CPU, TENSORRT, CUDA], None, [CUDA, CPU]),
            ([TENSORRT, CUDA, CPU], TENSORRT, [TENSORRT, CUDA, CPU]),
            ([CUDA, CPU], TENSORRT, [CUDA, CPU]),
        ],
    )
    def test_a_gpu_comes_first_where_there_is_one(
        self,
        available: list[str],
        compiled_for: str | None,
        asked: list[str],
        bundle: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        seen = []
        session = ort.InferenceSession

        def record(
            model: bytes, options: Any, *, providers: Any, enable_fallback: int
        ) -> ort.InferenceSession:
            seen.append([name for name, _ in providers])
            return session(model, options, providers=[CPU])

        if compiled_for:
            edit(
                bundle,
                lambda document: document.update(compilation={"execution_provider": compiled_for}),
            )
        monkeypatch.setattr(ort, "get_available_providers", lambda: available)
        monkeypatch.setattr(ort, "InferenceSession", record)
        engine = Engine(bundle)
        Engine(bundle, providers=[CPU])
        assert seen == [asked, [CPU]]
        assert engine.unusable == tuple(asked[:-1])

    def test_the_package_of_tensorrt_is_loaded_where_it_is_wanted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its libraries lie where no loader looks, and it loads them when it is imported."""
        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        float32, float16 = {"trt_fp16_enable": "0"}, {"trt_fp16_enable": "1"}
        # Not installed is not refused: the libraries may lie where loaders look.
        assert usable_providers([TENSORRT, CPU]) == [(TENSORRT, float32), (CPU, {})]
        (tmp_path / "tensorrt_libs.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        usable_providers([CUDA, CPU])
        assert "tensorrt_libs" not in sys.modules
        try:
            assert usable_providers([TENSORRT], float16=True) == [(TENSORRT, float16)]
            assert "tensorrt_libs" in sys.modules
        finally:
            sys.modules.pop("tensorrt_libs", None)

    def test_without_tensorrts_libraries_cuda_is_asked_as_ever(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """ONNX Runtime's own way back would leave out the options that keep its sums exact."""
        session, seen = ort.InferenceSession, []

        def without(model: bytes, options: Any, **more: Any) -> ort.InferenceSession:
            if more["providers"][0][0] == TENSORRT:
                raise RuntimeError("libnvinfer.so.10: cannot open shared object file")
            seen.append(more)
            return session(model, options, providers=[CPU])

        compilation = {"execution_provider": TENSORRT}
        edit(bundle, lambda document: document.update(compilation=compilation))
        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        monkeypatch.setattr(ort, "InferenceSession", without)
        assert Engine(bundle).unusable == (TENSORRT, CUDA)
        assert seen == [{"providers": usable_providers([CUDA, CPU]), "enable_fallback": 0}]
        assert seen[0]["providers"][0][1]["use_tf32"] == "0"

    def test_a_gpu_gets_its_batches_from_several_threads(
        self, bundle: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class OnGpu(ort.InferenceSession):
            def get_providers(self) -> list[str]:
                return [CUDA, CPU]

        load, names = cxr.engine.load, set()

        def record(*values: Any) -> Any:
            names.add(threading.current_thread().name)
            together.wait()
            return load(*values)

        images = [encoded_image(brightness=20 + 40 * i) for i in range(4)] + [b"no image"] * 2
        expected = engine.predict(images)
        monkeypatch.setattr(ort, "InferenceSession", OnGpu)
        monkeypatch.setattr(cxr.engine, "load", record)
        # Three images at a time: one thread alone would wait for ever.
        together = threading.Barrier(3, timeout=30)
        answers = Engine(bundle, threads=3).predict(images)
        assert len(names) == 3
        assert [str(answer) for answer in answers[4:]] == [str(answer) for answer in expected[4:]]
        assert answers[:4] == expected[:4]

    def test_on_a_gpu_all_batches_have_the_size_of_the_largest(
        self, bundle: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = []

        class OnGpu(ort.InferenceSession):
            def get_providers(self) -> list[str]:
                return [CUDA, CPU]

            def run(self, names: Any, inputs: Any) -> Any:
                sizes.append(len(next(iter(inputs.values()))))
                return super().run(names, inputs)

        images = [encoded_image(brightness=20 + 40 * i) for i in range(4)]
        monkeypatch.setattr(ort, "InferenceSession", OnGpu)
        on_gpu = Engine(bundle)
        for part in (images[:1], images[:3], images[:2], images[3:]):
            assert on_gpu.predict([b"no image", *part])[1:] == engine.predict(part)
        assert sizes == [1, 3, 3, 3]

    def test_a_changed_graph(self, bundle: Path) -> None:
        graph = bytearray((bundle / "model.onnx").read_bytes())
        graph[-10] ^= 1
        (bundle / "model.onnx").write_bytes(graph)
        with pytest.raises(ModelLoadError, match=r"model\.onnx is damaged or not the graph"):
            Engine(bundle)

    @pytest.mark.parametrize("file", ["model.onnx", CONFIG_FILE])
    def test_a_missing_file(self, bundle: Path, file: str) -> None:
        (bundle / file).unlink()
        with pytest.raises(ModelLoadError, match=f"Cannot read {file}: No such file"):
            Engine(bundle)

    def test_a_graph_that_is_none(self, bundle: Path) -> None:
        replace_graph(bundle, b"not a graph")
        with pytest.raises(ModelLoadError, match="cannot load the model's graph"):
            Engine(bundle)

    def test_a_graph_of_another_input_size(self, bundle: Path) -> None:
        replace_graph(bundle, graph_bytes(size=32))
        with pytest.raises(
            ModelLoadError, match=r"inputs are .*32, 32.* names image with .*64, 64"
        ):
            Engine(bundle)

    def test_a_graph_with_another_number_of_classes(self, bundle: Path) -> None:
        replace_graph(bundle, graph_bytes(classes=4))
        with pytest.raises(ModelLoadError, match=r"outputs are .*-1, 4.* names probabilities"):
            Engine(bundle)

    def test_a_graph_of_another_type(self, bundle: Path) -> None:
        nodes = [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float"], ["probabilities"], axes=[2, 3], keepdims=0),
        ]
        graph = helper.make_graph(
            nodes,
            "bytes",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 3, 64, 64])],
            [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 3])],
        )
        opset = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        onnx.checker.check_model(model)
        replace_graph(bundle, model.SerializeToString())
        with pytest.raises(ModelLoadError, match=r"inputs are .*uint8"):
            Engine(bundle)

    def test_another_schema_version(self, bundle: Path) -> None:
        edit(bundle, lambda document: document.update(schema_version=2))
        with pytest.raises(ModelLoadError, match="schema version 2; this release reads 1"):
            Engine(bundle)

    @pytest.mark.parametrize("text", ["", "{", "[]"])
    def test_a_configuration_that_is_none(self, bundle: Path, text: str) -> None:
        (bundle / CONFIG_FILE).write_text(text, encoding="utf-8")
        with pytest.raises(ModelLoadError, match=CONFIG_FILE):
            Engine(bundle)

    @pytest.mark.parametrize("change", [{"layout": "CHW"}, {"gamma": 2.2}, {"std": [1, 1, -1]}])
    def test_invalid_preprocessing(self, bundle: Path, change: dict[str, Any]) -> None:
        edit(bundle, lambda document: document["preprocessing"].update(change))
        with pytest.raises(ModelLoadError, match=f"preprocessing .*{next(iter(change))}"):
            Engine(bundle)

    def test_a_graph_without_softmax_fails_the_warm_up(self, bundle: Path) -> None:
        model = onnx.load_from_string((bundle / "model.onnx").read_bytes())
        model.graph.node[-1].op_type = "HardSigmoid"
        model.graph.node[-1].ClearField("attribute")
        replace_graph(bundle, model.SerializeToString())
        with pytest.raises(ModelLoadError, match=r"sum to 1\.5, not 1; its graph must end"):
            Engine(bundle).warm_up()

    def test_a_graph_that_answers_nonsense_fails_the_warm_up(self, bundle: Path) -> None:
        model = onnx.load_from_string((bundle / "model.onnx").read_bytes())
        weights = np.full((3, 3), np.nan, np.float32)
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "weights"))
        replace_graph(bundle, model.SerializeToString())
        with pytest.raises(ModelLoadError, match="non-finite"):
            Engine(bundle).warm_up()


def test_an_answer_says_how_long_its_steps_took(bundle: Path) -> None:
    image = encoded_image(1)
    start = time.perf_counter()
    first, bad, second = Engine(bundle).predict([image, b"", image])
    took = time.perf_counter() - start
    assert isinstance(bad, BadImageError)
    for answer in (first, second):
        assert isinstance(answer, Prediction)
        assert set(answer.seconds) == {
            Stage.DECODE,
            Stage.PREPROCESS,
            Stage.INFERENCE,
            Stage.POSTPROCESS,
        }
        assert all(seconds > 0 for seconds in answer.seconds.values())
        assert sum(answer.seconds.values()) < took
