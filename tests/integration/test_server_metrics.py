"""The counters on the metrics port are exactly what was asked."""

from collections.abc import Callable
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cxr.config import load_config
from support.bundles import encoded_image
from support.protocols import V1, V2, grpc_request, v1_body, v2_document
from support.servers import Server

GOOD = encoded_image(80)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def scrape(server: Server) -> Callable[[], Samples]:
    def read() -> Samples:
        text = httpx.get(server.metrics).text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith(("_created", "_bucket", "_sum"))
        }

    return read


def key(metric: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return metric, frozenset(labels.items())


def test_counters(server: Server, scrape: Callable[[], Samples]) -> None:
    before = scrape()
    with httpx.Client(base_url=server.rest) as http:
        for _ in range(3):
            http.post(V1, content=v1_body([GOOD, GOOD]))
        http.post(V1, content=b"no image", headers={"Content-Type": "image/png"})
        http.post(V2, json=v2_document([GOOD, b"", b"GIF89a"]))
        http.post(V2, json={})
        http.get("/v2/health/ready")
        http.get("/v2/models/unknown")
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(grpc_request([GOOD]))
        stub.ModelReady(service_pb2.ModelReadyRequest(name="cxr"))
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(grpc_request([]))
    after = scrape()

    changed = {
        name: value - before.get(name, 0)
        for name, value in after.items()
        if value != before.get(name, 0)
    }
    requests = {
        ("v1", "predict", "200"): 3,
        ("v1", "predict", "400"): 1,
        ("v2", "infer", "200"): 1,
        ("v2", "infer", "400"): 1,
        ("v2", "ready", "200"): 1,
        ("v2", "metadata", "404"): 1,
        ("grpc", "infer", "OK"): 1,
        ("grpc", "infer", "INVALID_ARGUMENT"): 1,
        ("grpc", "ready", "OK"): 1,
    }
    durations: dict[tuple[str, str], int] = {}
    for (protocol, method, _), count in requests.items():
        durations[protocol, method] = durations.get((protocol, method), 0) + count
    assert changed == {
        **{
            key("cxr_requests_total", protocol=protocol, method=method, code=code): count
            for (protocol, method, code), count in requests.items()
        },
        **{
            key("cxr_request_duration_seconds_count", protocol=protocol, method=method): count
            for (protocol, method), count in durations.items()
        },
        key("cxr_images_total", outcome="answered"): 8,
        key("cxr_images_total", outcome="not_an_image"): 1,
        key("cxr_images_total", outcome="empty"): 1,
        key("cxr_images_total", outcome="unsupported_format"): 1,
    }


def test_state(server: Server, bundle: Path, scrape: Callable[[], Samples]) -> None:
    samples = scrape()
    config = load_config(bundle)
    graph = config.graph.sha256
    assert samples[key("cxr_ready")] == 1
    assert samples[key("cxr_workers_ready")] == 2
    assert samples[key("cxr_requests_in_flight")] == 0
    assert samples[key("cxr_model_info", name="cxr", version="1.0", graph_sha256=graph)] == 1
