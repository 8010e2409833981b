"""Every call of the three protocols, through clients that other people wrote."""

import base64
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2, service_pb2_grpc

import cxr
from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_server.settings import available_cores
from integration.conftest import MAX_BATCH
from support.bundles import LABELS, encoded_image
from support.dicoms import dicom_bytes
from support.protocols import V1, V2, grpc_request, v1_body, v2_binary, v2_document
from support.servers import Server

KSERVE_CLIENT = Path(__file__).parents[1] / "support" / "kserve_client.py"

TOLERANCE = 1e-6

IMAGES = [
    encoded_image(30, kind="PNG", seed=1),
    encoded_image(120, kind="JPEG", seed=2),
    encoded_image(240, size=(400, 300), kind="JPEG", seed=3),
    dicom_bytes(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) % 4096),
]


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[Prediction]:
    """What the engine answers in this process, with as many threads as each of two workers."""
    answers = Engine(bundle, threads=max(1, available_cores() // 2)).predict(IMAGES)
    predictions = [answer for answer in answers if isinstance(answer, Prediction)]
    assert len({answer.label for answer in predictions}) > 1, "the images must differ"
    return predictions


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.rest) as client:
        yield client


@pytest.fixture(scope="module")
def triton(server: Server) -> Iterator[triton_grpc.InferenceServerClient]:
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def triton_rest(server: Server) -> Iterator[triton_http.InferenceServerClient]:
    with triton_http.InferenceServerClient(server.rest.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def kserve(server: Server) -> dict[str, Any]:
    """What the KServe SDK's clients get."""
    job = {
        "rest": server.rest,
        "grpc": server.grpc,
        "model": "cxr",
        "images": [base64.b64encode(image).decode() for image in IMAGES],
    }
    done = subprocess.run(
        [sys.executable, str(KSERVE_CLIENT)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(expected: list[Prediction]) -> Any:
    matrix = [[answer.probabilities[label] for label in LABELS] for answer in expected]
    return pytest.approx(np.array(matrix), abs=TOLERANCE)


def assert_v1(document: dict[str, Any], expected: list[Prediction]) -> None:
    assert document["model_name"] == "cxr"
    assert document["model_version"] == "1.0"
    assert len(document["predictions"]) == len(expected)
    for answer, prediction in zip(document["predictions"], expected, strict=True):
        assert answer["label"] == prediction.label
        assert answer["probabilities"] == prediction.probabilities, "to the last bit"
        assert answer["positive"] == list(prediction.positive)


def assert_tensors(tensors: dict[str, Any], expected: list[Prediction]) -> None:
    assert np.array(tensors["probabilities"]).reshape(-1, len(LABELS)) == rows(expected)
    assert tensors["label"] == [answer.label for answer in expected]
    assert (tensors["id"], tensors["model_name"]) == ("an-id", "cxr")


class TestKServeClients:
    def test_v1(self, kserve: dict[str, Any], expected: list[Prediction]) -> None:
        answers = kserve["v1"]
        assert answers["live"] is True
        assert answers["model_ready"] is True
        assert_v1(answers["infer"], expected)
        assert answers["unknown"] == 404

    def test_v2_health(self, kserve: dict[str, Any]) -> None:
        for call in ("live", "ready", "model_ready"):
            assert kserve["v2"][call] is True

    @pytest.mark.parametrize("form", ["binary", "json"])
    def test_v2_infer(self, kserve: dict[str, Any], form: str, expected: list[Prediction]) -> None:
        assert_tensors(kserve["v2"][form], expected)
        assert kserve["v2"]["unknown"] == 404

    def test_grpc_health(self, kserve: dict[str, Any]) -> None:
        for call in ("live", "ready", "model_ready"):
            assert kserve["grpc"][call] is True

    @pytest.mark.parametrize("form", ["raw", "contents"])
    def test_grpc_infer(
        self, kserve: dict[str, Any], form: str, expected: list[Prediction]
    ) -> None:
        assert_tensors(kserve["grpc"][form], expected)
        assert kserve["grpc"]["unknown"] == "NOT_FOUND"


class TestTritonGrpcClient:
    def test_health(self, triton: triton_grpc.InferenceServerClient) -> None:
        assert triton.is_server_live()
        assert triton.is_server_ready()
        assert triton.is_model_ready("cxr")
        assert triton.is_model_ready("cxr", "1.0")

    def test_metadata(self, triton: triton_grpc.InferenceServerClient) -> None:
        metadata = triton.get_server_metadata()
        assert (metadata.name, metadata.version) == ("cxr-serve", cxr.__version__)
        model = triton.get_model_metadata("cxr", as_json=True)
        assert_model_metadata(model)

    @pytest.mark.parametrize("images", [IMAGES[:1], IMAGES], ids=["one", "several"])
    @pytest.mark.parametrize("version", ["", "1.0"])
    def test_infer(
        self,
        triton: triton_grpc.InferenceServerClient,
        images: list[bytes],
        version: str,
        expected: list[Prediction],
    ) -> None:
        result = triton.infer("cxr", [tensor(triton_grpc, images)], version, request_id="an-id")
        response = result.get_response()
        assert_tensors(
            {
                "id": response.id,
                "model_name": response.model_name,
                "probabilities": result.as_numpy("probabilities"),
                "label": [item.decode() for item in result.as_numpy("label")],
            },
            expected[: len(images)],
        )
        assert response.model_version == "1.0"
        labels = result.get_output("probabilities").parameters["labels"].string_param
        assert json.loads(labels) == list(LABELS)
        assert result.as_numpy("error") is None

    def test_configuration_with_the_model_card(
        self, triton: triton_grpc.InferenceServerClient, bundle: Path
    ) -> None:
        described = triton.get_model_config("cxr").config
        assert described.name == "cxr"
        config = described.parameters["cxr-model.json"].string_value
        assert config == (bundle / "cxr-model.json").read_text(encoding="utf-8")

    def test_chosen_outputs(self, triton: triton_grpc.InferenceServerClient) -> None:
        outputs = [triton_grpc.InferRequestedOutput("label")]
        result = triton.infer("cxr", [tensor(triton_grpc, IMAGES)], outputs=outputs)
        assert [output.name for output in result.get_response().outputs] == ["label"]

    def test_typed_contents_of_a_matrix_of_words(
        self, server: Server, expected: list[Prediction]
    ) -> None:
        request = grpc_request(IMAGES)
        request.outputs.add(name="decision")
        with grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            (decision,) = stub.ModelInfer(request).outputs
        assert list(decision.shape) == [len(IMAGES), len(LABELS)]
        words = [word for answer in expected for word in answer.decisions.values()]
        assert [item.decode() for item in decision.contents.bytes_contents] == words

    def test_one_answer_in_place_of_raw_data(
        self, server: Server, expected: list[Prediction]
    ) -> None:
        """A request with typed contents is answered with typed contents."""
        with grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            response = stub.ModelInfer(grpc_request(IMAGES))
        probabilities, label = response.outputs
        assert not response.raw_output_contents
        assert list(probabilities.shape) == [len(IMAGES), len(LABELS)]
        values = np.array(probabilities.contents.fp32_contents).reshape(-1, len(LABELS))
        assert values == rows(expected)
        assert [item.decode() for item in label.contents.bytes_contents] == [
            answer.label for answer in expected
        ]


class TestTritonRestClient:
    def test_health(self, triton_rest: triton_http.InferenceServerClient) -> None:
        assert triton_rest.is_server_live()
        assert triton_rest.is_server_ready()
        assert triton_rest.is_model_ready("cxr")
        assert triton_rest.is_model_ready("cxr", "1.0")

    def test_metadata(self, triton_rest: triton_http.InferenceServerClient) -> None:
        assert triton_rest.get_server_metadata() == {
            "name": "cxr-serve",
            "version": cxr.__version__,
            "extensions": ["binary_tensor_data"],
        }
        assert_model_metadata(triton_rest.get_model_metadata("cxr"))

    @pytest.mark.parametrize("binary_outputs", [True, False])
    @pytest.mark.parametrize("version", ["", "1.0"])
    def test_infer_binary(
        self,
        triton_rest: triton_http.InferenceServerClient,
        binary_outputs: bool,
        version: str,
        expected: list[Prediction],
    ) -> None:
        outputs = [
            triton_http.InferRequestedOutput(name, binary_data=binary_outputs)
            for name in ("label", "probabilities")
        ]
        result = triton_rest.infer(
            "cxr", [tensor(triton_http, IMAGES)], version, outputs=outputs, request_id="an-id"
        )
        response = result.get_response()
        labels = result.as_numpy("label")
        assert_tensors(
            {
                "id": response["id"],
                "model_name": response["model_name"],
                "probabilities": result.as_numpy("probabilities"),
                "label": [item.decode() if isinstance(item, bytes) else item for item in labels],
            },
            expected,
        )
        assert response["model_version"] == "1.0"
        assert [output["name"] for output in response["outputs"]] == ["label", "probabilities"]
        probabilities = response["outputs"][1]
        assert json.loads(probabilities["parameters"]["labels"]) == list(LABELS)
        assert ("data" in probabilities) is not binary_outputs


def tensor(client: Any, images: list[bytes]) -> Any:
    """The input of a tritonclient, of either transport."""
    given = client.InferInput("image", [len(images)], "BYTES")
    return given.set_data_from_numpy(np.array(images, dtype=np.object_))


def assert_model_metadata(model: dict[str, Any]) -> None:
    shapes = {
        item["name"]: (item["datatype"], [int(size) for size in item["shape"]])
        for item in (*model["inputs"], *model["outputs"])
    }
    assert model["name"] == "cxr"
    assert model["versions"] == ["1.0"]
    assert shapes == {
        "image": ("BYTES", [-1]),
        "probabilities": ("FP32", [-1, len(LABELS)]),
        "label": ("BYTES", [-1]),
        "decision": ("BYTES", [-1, len(LABELS)]),
        "heatmap": ("FP32", [-1, 64, 64]),
        "overlay": ("BYTES", [-1]),
        "explained": ("BYTES", [-1]),
        "error": ("BYTES", [-1]),
    }


class TestPlainHttp:
    @pytest.mark.parametrize("index", range(len(IMAGES)))
    @pytest.mark.parametrize(
        "content_type",
        ["image/jpeg", "image/png", "image/tiff", "application/dicom", "application/octet-stream"],
    )
    def test_raw_image(
        self, http: httpx.Client, index: int, content_type: str, expected: list[Prediction]
    ) -> None:
        """The bytes say which format it is, not the header."""
        answer = http.post(V1, content=IMAGES[index], headers={"Content-Type": content_type})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert_v1(answer.json(), [expected[index]])

    def test_chunked_body(self, http: httpx.Client, expected: list[Prediction]) -> None:
        parts = (IMAGES[0][start : start + 1000] for start in range(0, len(IMAGES[0]), 1000))
        answer = http.post(V1, content=parts, headers={"Content-Type": "image/png"})
        assert_v1(answer.json(), [expected[0]])

    @pytest.mark.parametrize(
        "content_type",
        [
            None,
            "application/x-www-form-urlencoded",  # what `curl -d` sends
            "application/json",
            "Application/JSON; charset=utf-8",
        ],
    )
    def test_v1_json(
        self, http: httpx.Client, content_type: str | None, expected: list[Prediction]
    ) -> None:
        headers = {"Content-Type": content_type} if content_type else {}
        answer = http.post(V1, content=v1_body(IMAGES), headers=headers)
        assert_v1(answer.json(), expected)

    @pytest.mark.parametrize("path", [V2, "/v2/models/cxr/versions/1.0/infer"])
    def test_v2_json(self, http: httpx.Client, path: str, expected: list[Prediction]) -> None:
        answer = http.post(path, json=v2_document(IMAGES))
        document = answer.json()
        probabilities, label = document["outputs"]
        assert probabilities["name"] == "probabilities"
        assert probabilities["datatype"] == "FP32"
        assert probabilities["shape"] == [len(IMAGES), len(LABELS)]
        assert np.array(probabilities["data"]).reshape(-1, len(LABELS)) == rows(expected)
        assert label["data"] == [answer.label for answer in expected]
        assert label["shape"] == [len(IMAGES)]
        assert document["id"], "a request without an id gets one"

    def test_v2_all_outputs_binary(self, http: httpx.Client, expected: list[Prediction]) -> None:
        body, headers = v2_binary(IMAGES, parameters={"binary_data_output": True})
        answer = http.post(V2, content=body, headers=headers)
        split = int(answer.headers["inference-header-content-length"])
        header = json.loads(answer.content[:split])
        sizes = [output["parameters"]["binary_data_size"] for output in header["outputs"]]
        assert split + sum(sizes) == len(answer.content)
        data = np.frombuffer(answer.content[split:][: sizes[0]], "<f4")
        assert data.reshape(-1, len(LABELS)) == rows(expected)

    def test_the_whole_batch_size_is_accepted(self, http: httpx.Client) -> None:
        answer = http.post(V1, content=v1_body([encoded_image()] * MAX_BATCH))
        assert len(answer.json()["predictions"]) == MAX_BATCH

    @pytest.mark.parametrize(
        ("path", "expected_answer"),
        [
            ("/", {"status": "alive"}),
            ("/v1/models", {"models": ["cxr"]}),
            ("/v1/models/cxr", {"name": "cxr", "ready": True}),
            ("/v2/health/live", {"live": True}),
            ("/v2/health/ready", {"ready": True}),
            ("/v2/models/cxr/ready", {"name": "cxr", "ready": True}),
            ("/v2/models/cxr/versions/1.0/ready", {"name": "cxr", "ready": True}),
        ],
    )
    def test_get(self, http: httpx.Client, path: str, expected_answer: dict[str, Any]) -> None:
        answer = http.get(path)
        assert answer.status_code == 200
        assert answer.json() == expected_answer

    def test_versioned_metadata(self, http: httpx.Client) -> None:
        assert_model_metadata(http.get("/v2/models/cxr/versions/1.0").json())


class TestMixedBatch:
    """A bad image is marked in its place, and the good ones are answered."""

    BAD = b"this is not an image"
    SENTENCE = "The data is not an image; send one JPEG, PNG, TIFF or DICOM file."

    @pytest.fixture
    def batch(self) -> list[bytes]:
        return [IMAGES[0], self.BAD, IMAGES[1]]

    def test_v1(self, http: httpx.Client, batch: list[bytes], expected: list[Prediction]) -> None:
        answer = http.post(V1, content=v1_body(batch))
        document = answer.json()
        assert answer.status_code == 200
        assert document["predictions"].pop(1) == {
            "error": self.SENTENCE,
            "reason": "not_an_image",
        }
        assert_v1(document, expected[:2])

    def test_v1_marks_what_is_no_image_at_all(
        self, http: httpx.Client, expected: list[Prediction]
    ) -> None:
        body = json.loads(v1_body([IMAGES[0]]))
        body["instances"] += [{"b64": "*not Base64*"}, {"image": "?"}, 7]
        document = http.post(V1, json=body).json()
        good, *bad = document["predictions"]
        assert_v1(document | {"predictions": [good]}, expected[:1])
        assert [set(mark) for mark in bad] == [{"error", "reason"}] * 3

    def test_v2_json(
        self, http: httpx.Client, batch: list[bytes], expected: list[Prediction]
    ) -> None:
        answer = http.post(V2, json=v2_document(batch))
        outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
        assert answer.status_code == 200
        assert outputs["probabilities"][3:6] == [None] * 3, "JSON has no NaN"
        good = outputs["probabilities"][:3] + outputs["probabilities"][6:]
        assert np.array(good).reshape(-1, 3) == rows(expected[:2])
        assert outputs["label"] == [expected[0].label, "", expected[1].label]
        assert outputs["error"] == ["", self.SENTENCE, ""]

    def test_v2_binary(
        self,
        triton_rest: triton_http.InferenceServerClient,
        batch: list[bytes],
        expected: list[Prediction],
    ) -> None:
        result = triton_rest.infer("cxr", [tensor(triton_http, batch)])
        self.assert_marked(result, expected)

    def test_grpc(
        self,
        triton: triton_grpc.InferenceServerClient,
        batch: list[bytes],
        expected: list[Prediction],
    ) -> None:
        result = triton.infer("cxr", [tensor(triton_grpc, batch)])
        self.assert_marked(result, expected)

    def assert_marked(self, result: Any, expected: list[Prediction]) -> None:
        probabilities = result.as_numpy("probabilities")
        assert np.isnan(probabilities[1]).all()
        assert probabilities[[0, 2]] == rows(expected[:2])
        labels = [text(item) for item in result.as_numpy("label")]
        assert labels == [expected[0].label, "", expected[1].label]
        assert [text(item) for item in result.as_numpy("error")] == ["", self.SENTENCE, ""]


def text(item: bytes | str) -> str:
    return item.decode() if isinstance(item, bytes) else item


def test_nothing_loads_or_unloads_models_over_grpc(server: Server) -> None:
    """No call of the standard's repository extension, which loads and unloads models."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for call, request in (
            (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
            (
                stub.RepositoryModelLoad,
                service_pb2.RepositoryModelLoadRequest(model_name="cxr"),
            ),
            (
                stub.RepositoryModelUnload,
                service_pb2.RepositoryModelUnloadRequest(model_name="cxr"),
            ),
        ):
            with pytest.raises(grpc.RpcError) as failure:
                call(request)
            assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_head_and_body_of_an_answer_arrive_together(server: Server) -> None:
    host, port = server.rest.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for _ in range(10):
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: cxr\r\n\r\n")
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert json.loads(body)["models"] == ["cxr"]
