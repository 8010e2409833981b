"""The portal's spans and the model's are one trace."""

from pathlib import Path

import pytest

from integration.portal.test_portal_api import GOOD, PREDICTIONS, ask
from integration.test_server_tracing import Collector, attributes, collector
from support.portals import portal
from support.servers import serving

__all__ = ["collector"]  # the fixture

TRACE = 16 * "ab"
CLIENT = 8 * "cd"


def test_one_trace_from_the_client_to_the_model(
    guarded_archive: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    options = ("--runtime=inprocess", "--workers=1", "--tracing")
    with (
        serving(guarded_archive, *options) as model,
        portal(f"--server={model.grpc}", "--tracing") as running,
    ):
        headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
        with running.http(params={"patient": "SECRET"}) as http:
            assert ask(http, GOOD, headers=headers).status_code == 200
            assert http.get("/v1/SECRET").status_code == 404
        assert running.stop() == 0
        assert model.terminate() == 0
    spans = {span.name: span for span in collector.spans() if span.trace_id.hex() == TRACE}
    ours = spans[f"POST {PREDICTIONS}"]
    models = spans["inference.GRPCInferenceService/ModelInfer"]
    assert ours.parent_span_id.hex() == CLIENT
    assert models.parent_span_id == ours.span_id
    assert attributes(ours)["http.response.status_code"] == 200
    assert b"SECRET" not in b"".join(collector.bodies)


def test_tracing_needs_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    with (
        pytest.raises(AssertionError, match="needs OTEL_EXPORTER_OTLP_ENDPOINT"),
        portal("--tracing"),
    ):
        pass
