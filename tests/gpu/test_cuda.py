"""On a machine with an NVIDIA GPU: `make test-gpu`. Without one, every test fails."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import onnxruntime as ort
import pytest
import yaml
from tritonclient.grpc import service_pb2_grpc

from conftest import Trained, cxr
from cxr.answer import Options, Prediction
from cxr.config import load_config
from cxr.engine import CPU, CUDA, TENSORRT, Engine
from cxr_server.settings import RuntimeName
from support.protocols import BINARY, V1, grpc_request
from support.servers import Server, serving

# Probabilities on GPU and CPU; float32 sums in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def on_gpu(trained: Trained) -> Engine:
    engine = Engine(trained.bundle, threads=4)
    assert engine.provider == CUDA, f"ONNX Runtime has {ort.get_available_providers()}"
    assert engine.unusable == ()
    return engine


@pytest.fixture(scope="module")
def on_cpu(trained: Trained) -> Engine:
    return Engine(trained.bundle, providers=[CPU])


def probabilities(engine: Engine, images: list[bytes]) -> np.ndarray:
    answers = engine.predict(images)
    assert all(isinstance(answer, Prediction) for answer in answers), answers
    return np.asarray([list(answer.probabilities.values()) for answer in answers])


class TestEngine:
    def test_answers_as_on_a_cpu(self, trained: Trained, on_gpu: Engine, on_cpu: Engine) -> None:
        images = trained.images
        there, here = on_gpu.predict(images), on_cpu.predict(images)
        for one, other in zip(there, here, strict=True):
            assert isinstance(one, Prediction)
            assert isinstance(other, Prediction)
            assert one.label == other.label
            assert one.decisions == other.decisions
            assert one.probabilities == pytest.approx(other.probabilities, abs=TOLERANCE)
            assert one.quality is not None
            assert other.quality is not None
            assert one.quality.reasons == other.quality.reasons
            assert one.quality.scores == pytest.approx(other.quality.scores, abs=1e-2, rel=1e-3)
            assert (one.provider, one.batch) == (CUDA, len(images))

    def test_an_answer_does_not_depend_on_its_batch(self, trained: Trained, on_gpu: Engine) -> None:
        images = trained.images[:8]
        together = probabilities(on_gpu, images)
        apart = np.concatenate([probabilities(on_gpu, [image]) for image in images])
        np.testing.assert_allclose(together, apart, atol=TOLERANCE)

    def test_explains_as_on_a_cpu(self, trained: Trained, on_gpu: Engine, on_cpu: Engine) -> None:
        image = trained.images[0]
        (there,) = on_gpu.predict([image], [Options(explain=True)])
        (here,) = on_cpu.predict([image], [Options(explain=True)])
        assert isinstance(there, Prediction)
        assert isinstance(here, Prediction)
        assert there.explanation is not None
        assert here.explanation is not None
        np.testing.assert_allclose(there.explanation.heatmap, here.explanation.heatmap, atol=1e-2)


@pytest.fixture(scope="module", params=RuntimeName)
def server(trained: Trained, request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(trained.archive, f"--runtime={request.param}", "--workers=1") as running:
        yield running


def ask(server: Server, image: bytes) -> httpx.Response:
    return httpx.post(server.rest + V1, content=image, headers={"Content-Type": BINARY}, timeout=60)


class TestServer:
    def test_answers_as_on_a_cpu(self, server: Server, trained: Trained, on_cpu: Engine) -> None:
        images = trained.images * 3
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda image: ask(server, image).json(), images))
        for answer, expected in zip(answers, on_cpu.predict(images), strict=True):
            assert isinstance(expected, Prediction)
            (found,) = answer["predictions"]
            assert found["label"] == expected.label
            assert found["probabilities"] == pytest.approx(expected.probabilities, abs=TOLERANCE)

    def test_tells_what_it_runs_on(self, server: Server, trained: Trained) -> None:
        ask(server, trained.images[0]).raise_for_status()
        metrics = httpx.get(server.metrics).text
        assert f'provider="{CUDA}"' in metrics
        assert "cannot be used here" not in server.log
        alone, batches = (
            float(re.findall(rf"^{name} (\S+)", metrics, re.MULTILINE)[0])
            for name in (r'cxr_batch_images_bucket{le="1.0"}', "cxr_batch_images_count")
        )
        # TorchServe passes over what the archive asks for on a GPU.
        assert (alone < batches) == (server.runtime == RuntimeName.INPROCESS)

    def test_a_bad_image_harms_no_other_of_its_batch(
        self, server: Server, trained: Trained
    ) -> None:
        images = [*trained.images[:8], b"no image"] * 4
        with ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(lambda image: ask(server, image).status_code, images))
        assert statuses == ([200] * 8 + [400]) * 4

    def test_answers_over_grpc(self, server: Server, trained: Trained, on_cpu: Engine) -> None:
        images = trained.images[:8]
        with grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            response = stub.ModelInfer(grpc_request(images), timeout=60)
        labels = next(tensor for tensor in response.outputs if tensor.name == "label")
        expected = [answer.label for answer in on_cpu.predict(images)]
        assert [label.decode() for label in labels.contents.bytes_contents] == expected


def test_a_network_is_fine_tuned(train: Callable[..., Trained], tmp_path: Path) -> None:
    """By mixed precision; and it is exported for CPUs, too, which the export itself checks."""
    recipe = tmp_path / "tuned.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "tuned",
                "description": "All layers, for a few epochs.",
                "backbones": [{"name": "efficientnet-lite0", "pooling": "last"}],
                "finetune": {"epochs": 6, "learning_rate": 1e-3, "batch_size": 8},
            }
        )
    )
    tuned = train("--recipe", recipe)
    images = tuned.images
    here, there = Engine(tuned.bundle, providers=[CPU]), Engine(tuned.bundle)
    np.testing.assert_allclose(
        probabilities(there, images), probabilities(here, images), atol=TOLERANCE
    )
    metrics = load_config(tuned.bundle).metrics
    # Phantoms are easy; a network that has learned nothing is right in a third.
    assert metrics is not None
    assert metrics.accuracy.value > 0.6


def test_tensorrt_runs_or_is_refused(trained: Trained, on_cpu: Engine, tmp_path: Path) -> None:
    """It is chosen only where it ran, and then it answers as the CPU does."""
    out = tmp_path / "compiled"
    words = ("compile", trained.bundle, "--manifest", trained.manifest, "--out", out, "--tensorrt")
    done = cxr(*words, check=False)
    if done.returncode:
        assert "TensorRT" in done.stderr.splitlines()[-1]
        assert not out.exists()
        return
    compilation = load_config(out).compilation
    assert compilation is not None
    engine = Engine(out)
    assert engine.provider == (compilation.execution_provider or CUDA)
    assert (engine.provider == TENSORRT) == compilation.chosen.startswith("tensorrt")
    found, expected = (probabilities(one, trained.images) for one in (engine, on_cpu))
    np.testing.assert_allclose(found, expected, atol=0.05)
