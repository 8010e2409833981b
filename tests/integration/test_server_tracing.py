"""Spans arrive at a collector, in the client's trace, and hold nothing of the request."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tritonclient.grpc import service_pb2_grpc

from cxr.cli import main
from support.bundles import encoded_image
from support.dicoms import dicom_dataset, dicom_file
from support.protocols import V1, V2, grpc_request, v1_body, v2_document
from support.servers import Server, serving

GOOD = encoded_image(80)
PARENT = 8 * "cd"
# Of the requests, by their names below: the trace that the client sends.
TRACES = {name: f"{number:032x}" for number, name in enumerate(("v1", "bad", "grpc", "left"), 1)}
MARK = "SECRET"
STEPS = ["decode", "preprocess", "inference", "postprocess"]


@dataclass
class Collector:
    """Takes OTLP over HTTP."""

    url: str
    bodies: list[bytes]

    def spans(self) -> list[Any]:
        return [
            span
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def of(self, trace_id: str) -> tuple[Any, list[Any]]:
        """The span of that trace's request, and those of its images."""
        spans = [span for span in self.spans() if span.trace_id.hex() == trace_id]
        (root,) = (span for span in spans if span.kind == span.SPAN_KIND_SERVER)
        images = [span for span in spans if span.parent_span_id == root.span_id]
        steps = [span for image in images for span in self.below(image)]
        assert len(spans) == 1 + len(images) + len(steps)
        return root, images

    def below(self, parent: Any) -> list[Any]:
        """The spans right below another one, as they follow each other."""
        spans = [span for span in self.spans() if span.parent_span_id == parent.span_id]
        return sorted(spans, key=lambda span: span.start_time_unix_nano)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield Collector(f"http://127.0.0.1:{http.server_port}", bodies)
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def log(archive: Path, collector: Collector) -> str:
    """The log of a server that has answered what the tests below look for, and has ended."""
    options = ("--runtime=inprocess", "--workers=1", "--tracing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=chest,zone=a")
        # The last spans are sent at the end, not before.
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
        with serving(archive, *options) as server:
            ask(server)
            assert server.terminate() == 0
            return server.log


def ask(server: Server) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    radiograph = dicom_file(dicom_dataset(noise))

    def headers(name: str, sampled: str = "01") -> dict[str, str]:
        return {"traceparent": f"00-{TRACES[name]}-{PARENT}-{sampled}", "User-Agent": MARK}

    with httpx.Client(base_url=server.rest, params={"patient": MARK}) as http:
        body = v1_body([radiograph, b"no image " + MARK.encode(), GOOD])
        assert http.post(V1, content=body, headers=headers("v1")).status_code == 200
        bad = v2_document([b"GIF89a"]) | {"id": MARK}
        assert http.post(V2, json=bad, headers=headers("bad")).status_code == 415
        assert http.post(V1, content=body, headers=headers("left", "00")).status_code == 200
        own = {"Content-Type": "image/png", "x-request-id": "no-trace"}
        assert http.post(V1, content=GOOD, headers=own).status_code == 200
        for path in ("/v2/health/ready", "/v2/models/cxr", f"/{MARK}"):
            http.get(path)
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(grpc_request([GOOD]), metadata=tuple(headers("grpc").items())[:1])
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(grpc_request([]), metadata=(("x-request-id", "grpc-no-trace"),))


def attributes(span: Any) -> dict[str, Any]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes
    }


def logged_trace(log: str, request_id: str) -> str:
    (line,) = (line for line in log.splitlines() if f" request_id={request_id} " in line)
    return line.rpartition(" trace_id=")[2]


def test_a_request_goes_on_with_the_clients_trace(log: str, collector: Collector) -> None:
    root, images = collector.of(TRACES["v1"])
    assert root.name == "POST /v1/models/{name}:predict"
    assert root.parent_span_id.hex() == PARENT
    assert attributes(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/models/{name}:predict",
        "http.response.status_code": 200,
    }
    assert root.status.code == root.status.STATUS_CODE_UNSET
    assert [image.name for image in images] == 3 * ["predict image"]
    outcomes = sorted(attributes(image).get("cxr.rejection", "") for image in images)
    assert outcomes == ["", "", "not_an_image"]
    for image in images:
        assert root.start_time_unix_nano <= image.start_time_unix_nano
        assert image.end_time_unix_nano <= root.end_time_unix_nano
    assert f"trace_id={TRACES['v1']}" in log


def test_the_steps_of_an_image_lie_within_it(log: str, collector: Collector) -> None:
    _, images = collector.of(TRACES["v1"])
    for image in images:
        steps = collector.below(image)
        if "cxr.rejection" in attributes(image):
            assert steps == []
            continue
        assert [step.name for step in steps] == STEPS
        assert attributes(steps[2]) == {"cxr.batch": 1}
        assert image.start_time_unix_nano <= steps[0].start_time_unix_nano
        assert steps[-1].end_time_unix_nano <= image.end_time_unix_nano
        for step, following in pairwise(steps):
            assert step.end_time_unix_nano == following.start_time_unix_nano


def test_a_refused_request_is_no_failure_of_the_service(log: str, collector: Collector) -> None:
    root, (image,) = collector.of(TRACES["bad"])
    assert attributes(root)["http.response.status_code"] == 415
    assert root.status.code == root.status.STATUS_CODE_UNSET
    assert attributes(image) == {"cxr.rejection": "unsupported_format"}


def test_a_call_of_grpc(log: str, collector: Collector) -> None:
    root, images = collector.of(TRACES["grpc"])
    assert root.name == "inference.GRPCInferenceService/ModelInfer"
    assert root.parent_span_id.hex() == PARENT
    assert attributes(root)["rpc.response.status_code"] == "OK"
    assert len(images) == 1
    refused, images = collector.of(logged_trace(log, "grpc-no-trace"))
    assert attributes(refused)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert images == []
    assert " ERROR " not in log


def test_a_request_without_a_trace_begins_one(log: str, collector: Collector) -> None:
    root, images = collector.of(logged_trace(log, "no-trace"))
    assert root.parent_span_id == b""
    assert len(images) == 1


def test_nothing_else_has_spans(log: str, collector: Collector) -> None:
    roots = [span for span in collector.spans() if span.kind == span.SPAN_KIND_SERVER]
    assert len(roots) == 5
    assert f"trace_id={TRACES['left']}" in log, "its caller has decided against spans, not lines"


def test_the_environment_names_the_service(log: str, collector: Collector) -> None:
    message = ExportTraceServiceRequest.FromString(collector.bodies[0])
    named = attributes(message.resource_spans[0].resource)
    assert (named["service.name"], named["zone"]) == ("chest", "a")
    assert (named["cxr.model.name"], named["cxr.model.version"]) == ("cxr", "1.0")


def test_nothing_of_the_request_is_in_the_spans(log: str, collector: Collector) -> None:
    assert not [body for body in collector.bodies if MARK.encode() in body]


def test_a_collector_that_is_not_there_harms_nobody(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with serving(archive, "--runtime=inprocess", "--workers=1", "--tracing") as server:
        answer = httpx.post(server.rest + V1, content=GOOD, headers={"Content-Type": "image/png"})
        assert answer.status_code == 200
        assert server.terminate() == 0


def test_an_endpoint_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    done = CliRunner().invoke(main, ["serve", str(tmp_path), "--tracing"])
    assert done.exit_code == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in done.output


def test_without_opentelemetry_it_says_what_to_install(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opentelemetry.py").write_text("")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with serving(archive, "--runtime=inprocess", "--tracing", wait=False) as server:
        assert server.wait_exit() == 1
        assert "install cxr-serve[tracing]" in server.log.splitlines()[-1]
