"""Guards over every protocol, under each policy."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from tritonclient.grpc import service_pb2_grpc

from cxr_archive.packager import pack
from support.bundles import encoded_image, make_bundle
from support.protocols import V1, V2, grpc_request, v1_body, v2_document
from support.servers import Server, serving

GOOD = encoded_image(140)
BRIGHT = encoded_image(225)  # the small model's guards take it for no radiograph


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    pack(make_bundle(folder / "bundle", guarded=True), folder / "cxr.mar")
    return folder / "cxr.mar"


@contextlib.contextmanager
def served(archive: Path, policy: str) -> Iterator[tuple[Server, httpx.Client]]:
    options = ("--runtime=inprocess", "--workers=1", f"--quality-policy={policy}")
    with serving(archive, *options) as server, httpx.Client(base_url=server.rest) as http:
        yield server, http


def test_flag_answers_and_says_what_is_wrong(guarded: Path) -> None:
    with served(guarded, "flag") as (server, http):
        good, bright = http.post(V1, content=v1_body([GOOD, BRIGHT])).json()["predictions"]
        assert good["quality"]["reasons"] == []
        assert bright["quality"]["reasons"] == ["not_radiograph"]
        assert bright["quality"]["scores"]["not_radiograph"] > 0.7
        assert bright["label"]
        outputs = http.post(V2, json=v2_document([BRIGHT])).json()["outputs"]
        assert [output["name"] for output in outputs] == ["probabilities", "label", "quality"]
        assert json.loads(outputs[2]["data"][0]) == bright["quality"]
        image = triton_grpc.InferInput("image", [1], "BYTES")
        image.set_data_from_numpy(np.array([BRIGHT], dtype=np.object_))
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            answer = client.infer("cxr", [image])
        assert json.loads(answer.as_numpy("quality")[0]) == bright["quality"]
        declared = {o["name"]: o["datatype"] for o in http.get("/v2/models/cxr").json()["outputs"]}
        assert declared["quality"] == "BYTES"
        metrics = httpx.get(server.metrics).text
        assert 'cxr_images_flagged_total{reason="not_radiograph"} 3.0' in metrics


def test_refuse_answers_422_with_the_reasons(guarded: Path) -> None:
    with served(guarded, "refuse") as (server, http):
        answer = http.post(V1, content=v1_body([BRIGHT]))
        assert answer.status_code == 422
        assert "does not look like a radiograph" in answer.json()["error"]
        mixed = http.post(V1, content=v1_body([GOOD, BRIGHT]))
        assert mixed.status_code == 200
        good, bright = mixed.json()["predictions"]
        assert good["quality"]["reasons"] == []
        assert bright["reason"] == "not_radiograph"
        assert http.post(V2, json=v2_document([BRIGHT])).status_code == 422
        with grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(grpc_request([BRIGHT]))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "does not look like a radiograph" in refused.value.details()
        metrics = httpx.get(server.metrics).text
        assert 'cxr_images_total{outcome="not_radiograph"} 4.0' in metrics


def test_off_asks_no_guards(guarded: Path) -> None:
    with served(guarded, "off") as (_, http):
        (bright,) = http.post(V1, content=v1_body([BRIGHT])).json()["predictions"]
        assert "quality" not in bright
        outputs = http.post(V2, json=v2_document([BRIGHT])).json()["outputs"]
        assert [output["name"] for output in outputs] == ["probabilities", "label"]


def test_refusing_needs_a_model_with_guards(tmp_path: Path) -> None:
    pack(make_bundle(tmp_path / "bundle"), tmp_path / "cxr.mar")
    options = ("--runtime=inprocess", "--quality-policy=refuse")
    with serving(tmp_path / "cxr.mar", *options, wait=False) as server:
        assert server.wait_exit() == 1
        assert "This model has no guards" in server.log
