"""Every answer has an id, and the log says which request got what, and nothing of its content."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cxr_server.settings import RuntimeName
from support.archives import Files, edited_archive
from support.bundles import encoded_image
from support.dicoms import dicom_dataset, dicom_file
from support.protocols import V1, V2, grpc_request, v1_body, v2_document
from support.servers import Server, serving

GOOD = encoded_image(80)
TRACE = 16 * "ab"
TRACEPARENT = f"00-{TRACE}-{8 * 'cd'}-01"
ID = "x-request-id"
RAW = {"Content-Type": "image/png"}
# It must stay out of the log, wherever it stands; the patient of the DICOM file is called so, too.
MARK = "SECRET"
STOLEN = {MARK, "19500101", "NAME"}


@pytest.fixture(scope="module")
def writer(archive: Path) -> Iterator[Server]:
    """A server that logs as JSON, and all that it can."""
    options = ("--runtime=inprocess", "--workers=1", "--log-format=json", "--verbose")
    with serving(archive, *options) as running:
        yield running


@pytest.fixture
def stub(server: Server) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.splitlines()]


def accesses(server: Server, request_id: str) -> list[dict[str, Any]]:
    return [line for line in lines(server) if line.get("request_id") == request_id]


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/models/other", 404),
        ("GET", "/no/such/path", 404),
        ("PUT", V1, 405),
        ("POST", V1, 400),
    ],
)
def test_rest_answers_with_the_clients_id_or_a_fresh_one(
    server: Server, verb: str, path: str, status: int
) -> None:
    with httpx.Client(base_url=server.rest) as http:
        own = http.request(verb, path, headers={ID: "order-7"})
        fresh = [http.request(verb, path, headers={ID: "no id"}).headers[ID] for _ in range(2)]
    assert (own.status_code, own.headers.get_list(ID)) == (status, ["order-7"])
    assert "no id" not in fresh
    assert fresh[0] != fresh[1]


def test_the_id_of_v2_is_another_one(server: Server) -> None:
    document = v2_document([GOOD]) | {"id": "of the body"}
    answer = httpx.post(server.rest + V2, json=document, headers={ID: "of-the-header"})
    assert (answer.json()["id"], answer.headers[ID]) == ("of the body", "of-the-header")


def test_grpc_answers_with_the_clients_id_or_a_fresh_one(
    stub: service_pb2_grpc.GRPCInferenceServiceStub,
) -> None:
    def answered(call: Any) -> str:
        return str(dict(call.initial_metadata())[ID])

    own = ((ID, "order-7"),)
    answer, call = stub.ModelInfer.with_call(grpc_request([GOOD]), metadata=own)
    assert answer.id != "order-7"
    assert answered(call) == "order-7"
    _, call = stub.ServerLive.with_call(service_pb2.ServerLiveRequest())
    assert len(answered(call)) == 36
    with pytest.raises(grpc.RpcError) as failure:
        stub.ModelInfer(grpc_request([]), metadata=own)
    assert answered(failure.value) == "order-7"


def test_the_text_names_the_request(server: Server) -> None:
    headers = {ID: "in-text", "traceparent": TRACEPARENT} | RAW
    assert httpx.post(server.rest + V1, content=GOOD, headers=headers).status_code == 200
    (line,) = (line for line in server.log.splitlines() if "in-text" in line)
    assert " INFO cxr_server.access: v1 predict 200 " in line
    assert line.endswith(f" ms request_id=in-text trace_id={TRACE}")


def test_each_request_for_an_answer_is_a_line_of_json(writer: Server) -> None:
    before = datetime.now(UTC)
    with httpx.Client(base_url=writer.rest, headers={ID: "in-json"}) as http:
        http.post(V1, content=GOOD, headers=RAW | {"traceparent": TRACEPARENT})
        http.post(V2, json=v2_document([b"no image"]))
        http.post("/v2/models/other/infer", json={})
        http.post(V1.replace(":predict", ":explain"), content=v1_body([GOOD]))
        http.post("/invocations", content=GOOD, headers=RAW)
        # None of these is one.
        http.get("/v2/health/ready")
        http.get("/ping")
        http.get("/v2/models/cxr")
        http.post("/no/such/path")
    httpx.get(writer.metrics)
    with grpc.insecure_channel(writer.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = ((ID, "in-json"), ("traceparent", TRACEPARENT))
        stub.ModelInfer(grpc_request([GOOD]), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(grpc_request([]), metadata=((ID, "in-json"),))
        stub.ServerReady(service_pb2.ServerReadyRequest(), metadata=metadata)
    written = accesses(writer, "in-json")
    assert [(line["protocol"], line["method"], line["code"]) for line in written] == [
        ("v1", "predict", "200"),
        ("v2", "infer", "400"),
        ("v2", "infer", "404"),
        ("v1", "explain", "200"),
        ("sagemaker", "predict", "200"),
        ("grpc", "infer", "OK"),
        ("grpc", "infer", "INVALID_ARGUMENT"),
    ]
    traces = [line.get("trace_id") for line in written]
    assert traces == [TRACE, None, None, None, None, TRACE, None]
    for line in written:
        assert (line["level"], line["logger"]) == ("INFO", "cxr_server.access")
        assert before <= datetime.fromisoformat(line["time"]) <= datetime.now(UTC)
        assert 0 < line["duration_seconds"] < 60
        assert line["message"].startswith(f"{line['protocol']} {line['method']} {line['code']} ")


def test_all_that_it_writes_is_json(writer: Server) -> None:
    for line in lines(writer):
        assert line.keys() >= {"time", "level", "logger", "message"}
    assert [json.loads(line)["event"] for line in writer.stdout.splitlines()] == ["ready"]


def test_nothing_of_a_patient_is_logged_as_text(server: Server) -> None:
    check_that_nothing_is_logged(server)


def test_nothing_of_a_patient_is_logged_as_json(writer: Server) -> None:
    check_that_nothing_is_logged(writer)


def check_that_nothing_is_logged(server: Server) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    radiograph = dicom_file(dicom_dataset(noise))
    hand = dicom_file(dicom_dataset(noise, BodyPartExamined="HAND"))
    assert all(mark.encode() in radiograph for mark in STOLEN)
    query = {"patient": MARK, "class": MARK}
    headers = {
        "Content-Type": "application/dicom",
        "Content-Disposition": f'attachment; filename="{MARK}.dcm"',
        ID: f"{MARK} of 19500101",
        "traceparent": f"{TRACEPARENT}-{MARK}",
        "User-Agent": MARK,
    }
    with httpx.Client(base_url=server.rest, params=query, headers=headers) as http:
        assert http.post(V1, content=radiograph).status_code == 200
        assert http.post(V1, content=hand).status_code == 422
        assert http.post(V1, content=b"no image " + MARK.encode()).status_code == 400
        assert http.post(f"/v1/models/{MARK}:predict", content=radiograph).status_code == 404
        assert http.get(f"/{MARK}").status_code == 404
        named = v2_document([radiograph]) | {"id": MARK}
        assert http.post(V2, json=named, headers={"Content-Type": "application/json"}).is_success
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = grpc_request([radiograph])
        call.id = MARK
        stub.ModelInfer(call, metadata=(("patient", MARK), (ID, f"{MARK} ")))
    assert "predict 200" in server.log
    assert "infer OK" in server.log
    assert not [mark for mark in STOLEN if mark in server.log]


def test_without_the_access_log(archive: Path) -> None:
    options = ("--runtime=inprocess", "--workers=1", "--no-access-log")
    with serving(archive, *options) as server:
        assert httpx.post(server.rest + V1, content=GOOD, headers=RAW).status_code == 200
        assert "predict" not in server.log


def test_the_reason_of_the_end_is_json_too(tmp_path: Path) -> None:
    damaged = tmp_path / "cxr.mar"
    damaged.write_bytes(b"no archive")
    with serving(damaged, "--runtime=inprocess", "--log-format=json", wait=False) as server:
        assert server.wait_exit() == 1
        last = lines(server)[-1]
    assert last["level"] == "CRITICAL"
    assert "cxr.mar" in last["message"]


@pytest.mark.parametrize("runtime", RuntimeName)
def test_a_gpu_that_cannot_be_used_is_told(tmp_path: Path, runtime: RuntimeName) -> None:
    """As on a node whose driver is missing: ONNX Runtime goes on with the CPU, and says nothing."""

    def without_driver(files: Files) -> None:
        engine = files["cxr/engine.py"].decode()
        used = "used = self._session.get_providers()\n"
        assert engine.count(used) == 1
        given = f"{used}        given = [(CUDA, {{}}), *given]\n"
        files["cxr/engine.py"] = engine.replace(used, given).encode()

    archive = edited_archive(tmp_path, without_driver)
    with serving(archive, f"--runtime={runtime}", "--workers=1") as server:
        assert ", on CPUExecutionProvider" in server.log
        # TorchServe does not show what its workers say.
        assert ("CUDAExecutionProvider cannot be used here" in server.log) == (
            runtime == RuntimeName.INPROCESS
        )
