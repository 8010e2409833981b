"""Explanations on demand, over every protocol."""

import base64
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from PIL import Image

from cxr.answer import Explanation, Options, Prediction
from cxr.engine import Engine
from cxr_archive.packager import pack
from support.bundles import LABELS, encoded_image, make_bundle
from support.protocols import V1, V2, v1_body, v2_document
from support.servers import Server, serving

EXPLAIN = V1.replace(":predict", ":explain")
IMAGE = encoded_image(120, size=(400, 300), kind="JPEG")
OTHER = encoded_image(30)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.rest) as client:
        yield client


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[str, Explanation]:
    """What the engine answers in this process, by class; the predicted one under ``."""
    asked = ["", *LABELS]
    options = [Options(explain=label or True) for label in asked]
    answers = Engine(bundle).predict([IMAGE] * len(asked), options)
    found = {}
    for label, answer in zip(asked, answers, strict=True):
        assert isinstance(answer, Prediction)
        assert answer.explanation is not None
        found[label] = answer.explanation
    return found


def assert_v1(found: dict[str, Any], expected: Explanation) -> None:
    assert (found["class"], found["method"]) == (expected.label, expected.method)
    np.testing.assert_allclose(found["heatmap"], expected.heatmap, atol=1e-4)
    assert_overlay(base64.b64decode(found["overlay"]["b64"]), expected)


def assert_overlay(data: bytes, expected: Explanation) -> None:
    with Image.open(BytesIO(data)) as a, Image.open(BytesIO(expected.overlay)) as b:
        assert (a.format, a.size) == ("PNG", b.size)
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), atol=2)


def test_v1_explains_the_predicted_class(
    http: httpx.Client, expected: dict[str, Explanation]
) -> None:
    answer = http.post(EXPLAIN, content=v1_body([IMAGE, b"no image", OTHER]))
    assert answer.status_code == 200
    document = answer.json()
    assert_v1(document["explanations"][0], expected[""])
    assert document["explanations"][1] is None
    assert document["predictions"][0]["label"] == expected[""].label
    assert document["predictions"][1]["reason"] == "not_an_image"
    assert document["explanations"][2]["class"] == document["predictions"][2]["label"]


@pytest.mark.parametrize("label", LABELS)
def test_v1_explains_a_named_class(
    http: httpx.Client, expected: dict[str, Explanation], label: str
) -> None:
    body = json.loads(v1_body([IMAGE])) | {"class": label}
    named = http.post(EXPLAIN, json=body).json()
    raw = http.post(
        EXPLAIN, params={"class": label}, content=IMAGE, headers={"Content-Type": "image/jpeg"}
    ).json()
    for document in (named, raw):
        assert_v1(document["explanations"][0], expected[label])


def test_v1_predict_explains_nothing(http: httpx.Client) -> None:
    document = http.post(V1, content=v1_body([IMAGE])).json()
    assert "explanations" not in document
    assert "explanation" not in document["predictions"][0]


@pytest.mark.parametrize("explain", [True, LABELS[0]])
def test_v2_rest_by_parameter(
    http: httpx.Client, expected: dict[str, Explanation], explain: bool | str
) -> None:
    body = v2_document([IMAGE]) | {"parameters": {"explain": explain}}
    document = http.post(V2, json=body).json()
    outputs = {output["name"]: output for output in document["outputs"]}
    assert list(outputs) == ["probabilities", "label", "heatmap", "overlay", "explained"]
    known = expected[explain if isinstance(explain, str) else ""]
    assert outputs["heatmap"]["shape"] == [1, 64, 64]
    found = np.reshape(outputs["heatmap"]["data"], (64, 64))
    np.testing.assert_allclose(found, known.heatmap, atol=1e-4)
    assert_overlay(base64.b64decode(outputs["overlay"]["data"][0]), known)
    assert outputs["explained"]["data"] == [known.label]


def test_v2_rest_by_output_and_in_binary(server: Server, expected: dict[str, Explanation]) -> None:
    image = triton_http.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([IMAGE], dtype=np.object_))
    wanted = [triton_http.InferRequestedOutput(name) for name in ("overlay", "decision")]
    with triton_http.InferenceServerClient(server.rest.removeprefix("http://")) as client:
        answer = client.infer("cxr", [image], outputs=wanted)
    assert_overlay(answer.as_numpy("overlay")[0], expected[""])
    assert {d.decode() for d in answer.as_numpy("decision")[0]} <= {"positive", "negative"}
    assert answer.as_numpy("heatmap") is None


@pytest.mark.parametrize("explain", [True, LABELS[1]])
def test_grpc(server: Server, expected: dict[str, Explanation], explain: bool | str) -> None:
    image = triton_grpc.InferInput("image", [2], "BYTES")
    image.set_data_from_numpy(np.array([IMAGE, b"no image"], dtype=np.object_))
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        answer = client.infer("cxr", [image], parameters={"explain": explain})
    known = expected[explain if isinstance(explain, str) else ""]
    np.testing.assert_allclose(answer.as_numpy("heatmap")[0], known.heatmap, atol=1e-4)
    assert np.isnan(answer.as_numpy("heatmap")[1]).all()
    assert_overlay(answer.as_numpy("overlay")[0], known)
    assert answer.as_numpy("explained").tolist() == [known.label.encode(), b""]


def test_metadata_declares_the_outputs(http: httpx.Client) -> None:
    outputs = {
        o["name"]: (o["datatype"], o["shape"]) for o in http.get("/v2/models/cxr").json()["outputs"]
    }
    assert outputs["heatmap"] == ("FP32", [-1, 64, 64])
    assert outputs["overlay"] == outputs["explained"] == ("BYTES", [-1])
    assert outputs["decision"] == ("BYTES", [-1, len(LABELS)])


def test_what_cannot_be_explained_is_a_bad_request(http: httpx.Client) -> None:
    cases = [
        http.post(EXPLAIN, json=json.loads(v1_body([IMAGE])) | {"class": "Fracture"}),
        http.post(EXPLAIN, json=json.loads(v1_body([IMAGE])) | {"class": 3}),
        http.post(V2, json=v2_document([IMAGE]) | {"parameters": {"explain": "Fracture"}}),
        http.post(V2, json=v2_document([IMAGE]) | {"parameters": {"explain": 3}}),
    ]
    for answer in cases:
        assert answer.status_code == 400
        assert "class" in answer.json()["error"]
        assert "Fracture" not in answer.json()["error"]


def test_an_archive_of_before_says_that_it_has_no_explanation(tmp_path: Path) -> None:
    pack(make_bundle(tmp_path / "bundle"), tmp_path / "cxr.mar")
    with (
        serving(tmp_path / "cxr.mar", "--runtime=inprocess", "--workers=1") as server,
        httpx.Client(base_url=server.rest) as http,
    ):
        refused = [
            http.post(EXPLAIN, content=v1_body([IMAGE])),
            http.post(V2, json=v2_document([IMAGE]) | {"parameters": {"explain": True}}),
        ]
        assert [answer.status_code for answer in refused] == [400, 400]
        for answer in refused:
            assert answer.json()["error"] == ("This model has no explanation; export it again.")
        assert http.post(V1, content=v1_body([IMAGE])).status_code == 200
        names = [output["name"] for output in http.get("/v2/models/cxr").json()["outputs"]]
        assert "heatmap" not in names
