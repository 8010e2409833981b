"""The counters on the metrics port are exactly what was asked."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cxr.answer import Prediction
from cxr.config import load_config
from cxr.engine import Engine
from cxr_server.settings import RuntimeName, Settings
from support.bundles import encoded_image
from support.metrics import CATALOGUE, PORTAL, assert_documented, documented, shown
from support.protocols import V1, V2, grpc_request, v1_body, v2_document
from support.servers import START_TIMEOUT, Server

GOOD = encoded_image(80)
OWN_REQUESTS = "ts_inference_requests_total"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def scrape(server: Server) -> Callable[[], Samples]:
    def read() -> Samples:
        text = httpx.get(server.metrics).text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.endswith(("_bucket", "_sum"))
        }

    return read


def key(metric: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return metric, frozenset(labels.items())


def test_a_scrape_of_one_name_is_up_to_date_soon(server: Server) -> None:
    """An answer is counted when all metrics are asked for, or within a second or so."""
    name = "cxr_prediction_confidence_count"

    def count() -> float:
        text = httpx.get(server.metrics, params={"name[]": name}).text
        (family,) = text_string_to_metric_families(text)
        return next(sample.value for sample in family.samples if sample.name == name)

    httpx.get(server.metrics)  # what other tests have asked is counted now
    before = count()
    assert httpx.post(server.rest + V1, content=v1_body([GOOD])).status_code == 200
    server.wait_for("the answer's count", lambda: count() == before + 1, 30)


def test_counters(server: Server, bundle: Path, scrape: Callable[[], Samples]) -> None:
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
        if name[0].startswith("cxr_")
        and not name[0].startswith(("cxr_memory_", "cxr_drift_"))
        and value != before.get(name, 0)
    }
    # Which class it is depends on the model; all are the same image.
    (predicted,) = [name for name in changed if name[0] == "cxr_predictions_total"]
    assert dict(predicted[1])["label"] in load_config(bundle).labels
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
        predicted: 8,
        **{
            key("cxr_stage_duration_seconds_count", stage=stage): 8
            for stage in ("queue", "decode", "preprocess", "inference", "postprocess")
        },
        key("cxr_prediction_confidence_count"): 8,
        key("cxr_batch_images_count"): 8,
        key("cxr_received_bytes_total"): 8 * len(GOOD) + len(b"no image") + len(b"GIF89a"),
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
    assert samples[key("cxr_images_queued")] == 0
    phases = ("process", "verify", "runtime", "load", "warm_up")
    started = [samples[key("cxr_startup_phase_seconds", phase=phase)] for phase in phases]
    assert all(seconds > 0 for seconds in started)
    assert sum(started) < START_TIMEOUT
    # It runs once in each runtime.
    (served,) = [dict(labels) for name, labels in samples if name == "cxr_model_info"]
    assert served.pop("runtime") in set(RuntimeName)
    assert served.pop("provider") == "CPUExecutionProvider"
    assert served == {"name": "cxr", "version": "1.0", "graph_sha256": graph}
    assert samples[key("cxr_queue_capacity_images")] == Settings().max_queue
    assert samples[key("cxr_worker_restarts_total")] == 0
    assert 0 < samples[key("process_start_time_seconds")] < time.time()
    # Every class is there before its first answer, so that this shows as an increase.
    assert {key("cxr_predictions_total", label=label) for label in config.labels} <= set(samples)


def test_the_catalogue_is_what_a_scrape_shows(server: Server) -> None:
    metrics = shown(httpx.get(server.metrics).text)
    own = {name for name in documented() if not name.startswith(PORTAL)}
    # Those of the container depend on where this runs.
    assert own - metrics.keys() <= {"cxr_memory_working_set_bytes", "cxr_memory_limit_bytes"}
    of_torchserve = {name for name in metrics if not name.startswith(("cxr_", "process_"))}
    text = CATALOGUE.read_text(encoding="utf-8")
    assert {name for name in of_torchserve if f"`{name}`" not in text} == set()
    assert_documented({name: metrics[name] for name in metrics.keys() - of_torchserve})


def test_one_scrape_shows_torchserve_too(server: Server, scrape: Callable[[], Samples]) -> None:
    httpx.post(server.rest + V1, content=GOOD, headers={"Content-Type": "image/png"})
    samples = scrape()
    (runtime,) = [dict(labels)["runtime"] for name, labels in samples if name == "cxr_model_info"]
    answered = [value for (name, _), value in samples.items() if name == OWN_REQUESTS]
    if runtime == RuntimeName.TORCHSERVE:
        assert len(answered) == 1
        assert answered[0] >= samples[key("cxr_images_total", outcome="answered")] > 0
    else:
        assert answered == []


def test_answers_are_compared_with_those_of_training(
    server: Server, bundle: Path, scrape: Callable[[], Samples]
) -> None:
    before = scrape()
    httpx.post(server.rest + V1, content=v1_body([GOOD] * 4))
    after = scrape()
    config = load_config(bundle)
    assert config.reference is not None
    (prediction,) = Engine(bundle).predict([GOOD])
    assert isinstance(prediction, Prediction)
    for label, probability in prediction.probabilities.items():
        edges = config.reference[f"probability of {label}"].edges
        expected = sum(edge < probability for edge in edges)
        for number in range(len(edges) + 1):
            labels = {"version": "1.0", "summary": f"probability of {label}", "bin": str(number)}
            counted = key("cxr_drift_images_total", **labels)
            assert after[counted] - before[counted] == (4 if number == expected else 0)
            assert after[key("cxr_drift_reference_ratio", **labels)] == 0.25


def test_images_that_wait_for_a_worker_are_counted(
    server: Server, scrape: Callable[[], Samples]
) -> None:
    """The queue is what an autoscaler may follow: it grows under load and empties after it."""
    batch = v1_body([GOOD] * 8)
    seen = 0.0
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.rest, timeout=60) as http:
        answers = [pool.submit(http.post, V1, content=batch) for _ in range(40)]
        while not all(answer.done() for answer in answers):
            seen = max(seen, scrape()[key("cxr_images_queued")])
    assert all(answer.result().status_code == 200 for answer in answers)
    assert seen > 0
    assert scrape()[key("cxr_images_queued")] == 0
