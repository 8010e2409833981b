"""The gateway's API in front of a real model server."""

import base64
import io
import json
import re
import select
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from cxr.answer import Options, Prediction
from cxr.engine import Engine
from integration.portal.conftest import MAX_IMAGE_BYTES, MAX_IMAGES
from support.bundles import LABELS, encoded_image
from support.dicoms import PATIENT, dicom_bytes
from support.metrics import PORTAL, assert_documented, documented, shown
from support.portals import Portal, files, portal
from support.servers import CXR, Server, free_port, serving

GOOD = encoded_image(140)
BRIGHT = encoded_image(225)  # the small model's guards take it for no radiograph
PREDICTIONS = "/v1/predictions"


def ask(http: httpx.Client, *images: bytes, **options: Any) -> httpx.Response:
    return http.post(PREDICTIONS, files=files(*images), **options)


def assert_problem(answer: httpx.Response, status: int, kind: str, words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:cxr:problem:{kind}"
    assert problem["status"] == status
    assert words in problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


class TestPredictions:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "DICOM"])
    def test_each_format(self, http: httpx.Client, guarded_bundle: Path, kind: str) -> None:
        pixels = np.random.default_rng(1).integers(90, 190, (64, 64)).astype(np.uint8)
        image = dicom_bytes(pixels) if kind == "DICOM" else encoded_image(140, kind=kind)
        (expected,) = Engine(guarded_bundle).predict([image])
        assert isinstance(expected, Prediction)
        assert expected.quality is not None
        answer = ask(http, image)
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert document["request_id"] == answer.headers["x-request-id"]
        assert document["model"] == "cxr"
        (got,) = document["images"]
        assert got["outcome"] == "answered"
        assert got["label"] == expected.label
        assert got["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert list(got["probabilities"]) == list(LABELS)
        assert got["decisions"] == expected.decisions
        assert got["quality"]["scores"] == pytest.approx(expected.quality.scores, abs=1e-6)
        assert got["model_version"] == "1.0"
        assert got["heatmap"] is None

    def test_uncertain_is_said(self, http: httpx.Client) -> None:
        (got,) = ask(http, GOOD).json()["images"]
        assert got["decisions"]["Pneumonia"] == "uncertain"

    def test_faults_are_said_in_words(self, http: httpx.Client) -> None:
        (got,) = ask(http, BRIGHT).json()["images"]
        assert got["quality"]["reasons"] == [
            {"reason": "not_radiograph", "text": "it does not look like a radiograph"}
        ]

    def test_a_bad_image_takes_its_own_place(self, http: httpx.Client) -> None:
        first, second, third = ask(http, GOOD, b"not an image", BRIGHT).json()["images"]
        assert (first["index"], first["outcome"]) == (0, "answered")
        assert (third["index"], third["outcome"]) == (2, "answered")
        assert second["index"] == 1
        assert second["outcome"] == "refused"
        assert second["reason"] == "not_an_image"
        assert second["detail"] == (
            "The data is not an image; send one JPEG, PNG, TIFF or DICOM file."
        )

    @pytest.mark.parametrize(
        ("images", "status", "reason", "words"),
        [
            ([b""], 400, "empty", "The image is empty"),
            ([b"\x89PNG\r\n\x1a\n broken"], 400, "damaged", ""),
            ([b"not an image"], 400, "not_an_image", "is not an image"),
            ([b"GIF89a" + bytes(64)], 415, "unsupported_format", ""),
            ([bytes(MAX_IMAGE_BYTES + 1)], 413, "too_many_bytes", "the limit"),
            ([b"", b"not an image"], 400, "empty", "None of the 2 images can be used"),
        ],
    )
    def test_no_usable_image_is_a_problem_with_the_reason(
        self, http: httpx.Client, images: list[bytes], status: int, reason: str, words: str
    ) -> None:
        problem = assert_problem(ask(http, *images), status, "image-refused", words)
        assert problem["images"][0]["reason"] == reason
        assert len(problem["images"]) == len(images)

    @pytest.mark.parametrize("asked", ["true", "COVID-19"])
    def test_heat_map(self, http: httpx.Client, guarded_bundle: Path, asked: str) -> None:
        options = Options(explain=True if asked == "true" else asked)
        (expected,) = Engine(guarded_bundle).predict([GOOD], [options])
        assert isinstance(expected, Prediction)
        assert expected.explanation is not None
        (got,) = ask(http, GOOD, params={"explain": asked}).json()["images"]
        heatmap = got["heatmap"]
        assert heatmap["label"] == expected.explanation.label
        values = np.array(heatmap["values"]).reshape(heatmap["rows"], heatmap["columns"])
        assert values == pytest.approx(expected.explanation.heatmap, abs=1e-4)
        drawn = Image.open(io.BytesIO(base64.b64decode(heatmap["png"])))
        assert (drawn.format, drawn.mode, drawn.size) == ("PNG", "RGBA", values.shape[::-1])
        pixels = np.asarray(drawn).astype(float)
        assert pixels[..., 3] / 255 == pytest.approx(np.abs(values), abs=0.01)
        red, blue = pixels[..., 0], pixels[..., 2]
        assert np.array_equal(red > blue, values > 0), "orange for the class, blue against it"

    def test_an_unknown_class_cannot_be_explained(self, http: httpx.Client) -> None:
        answer = ask(http, GOOD, params={"explain": "Cholera"})
        assert_problem(answer, 422, "not-explainable", "the classes are COVID-19, No finding")

    def test_malformed_requests(self, http: httpx.Client) -> None:
        answer = http.post(PREDICTIONS, content=GOOD, headers={"Content-Type": "image/png"})
        assert_problem(answer, 415, "not-multipart", "multipart/form-data")
        answer = http.post(PREDICTIONS, files=[("photo", ("a.png", GOOD))])
        assert_problem(answer, 400, "no-files", "'images'")
        answer = http.post(PREDICTIONS, data={"images": "text"}, files=files(GOOD))
        assert_problem(answer, 400, "no-files", "must be a file")
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = http.post(PREDICTIONS, content=b"--b\r\nnothing of a form", headers=headers)
        assert_problem(answer, 400, "malformed-form", "multipart form")
        answer = http.post(
            PREDICTIONS, content=b"", headers={"Content-Type": "multipart/form-data"}
        )
        assert_problem(answer, 400, "malformed-form", "multipart form")
        answer = ask(http, *[GOOD] * (MAX_IMAGES + 1))
        assert_problem(answer, 413, "too-many-files", f"at most {MAX_IMAGES} are accepted")
        answer = ask(http, *[bytes(MAX_IMAGE_BYTES)] * 3)
        assert_problem(answer, 413, "too-large", "the limit")
        answer = ask(http, GOOD, headers={"Idempotency-Key": "no spaces"})
        assert_problem(answer, 422, "invalid-parameters", "idempotency-key")

    def test_a_body_that_does_not_say_its_size_is_limited_too(self, http: httpx.Client) -> None:
        def body() -> Any:
            yield b'--b\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
            for _ in range(8):
                yield bytes(MAX_IMAGE_BYTES // 2)

        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        answer = http.post(PREDICTIONS, content=body(), headers=headers)
        assert_problem(answer, 413, "too-large", "the limit")


class TestIdempotency:
    def test_the_second_request_gets_the_first_ones_answer(
        self, http: httpx.Client, model: Server
    ) -> None:
        headers = {"Idempotency-Key": "case-1"}
        first = ask(http, GOOD, headers=headers)
        before = answered_by(model)
        second = ask(http, GOOD, headers=headers)
        assert second.json() == first.json()
        assert second.headers["idempotent-replayed"] == "true"
        assert answered_by(model) == before, "nothing was scored twice"

    def test_a_key_belongs_to_its_request(self, http: httpx.Client) -> None:
        headers = {"Idempotency-Key": "case-2"}
        assert ask(http, GOOD, headers=headers).status_code == 200
        answer = ask(http, BRIGHT, headers=headers)
        assert_problem(answer, 422, "idempotency-key-reused", "another request")

    def test_a_failed_request_can_be_sent_again(self, http: httpx.Client) -> None:
        headers = {"Idempotency-Key": "case-3"}
        assert ask(http, b"", headers=headers).status_code == 400
        assert ask(http, GOOD, headers=headers).status_code == 200


def answered_by(model: Server) -> float:
    """Images that the model server has answered."""
    found = re.search(
        r'^cxr_images_total\{outcome="answered"\} (\S+)$', httpx.get(model.metrics).text, re.M
    )
    return float(found[1]) if found else 0.0


class TestModels:
    def test_list_and_card(self, http: httpx.Client) -> None:
        (listed,) = http.get("/v1/models").json()["models"]
        assert (listed["name"], listed["version"], listed["ready"]) == ("cxr", "1.0", True)
        assert listed["labels"] == list(LABELS)
        assert listed["explains"]
        assert listed["guarded"]
        card = http.get("/v1/models/cxr").json()["card"]
        assert card == listed["card"]
        assert card["intended_use"] == "Tests of the serving path."
        assert card["limitations"] == ["Knows nothing of radiographs."]
        assert [entry["label"] for entry in card["classes"]] == list(LABELS)
        assert card["classes"][0]["threshold"] == 0.5
        assert card["accuracy"]["value"] == 1.0

    def test_another_name(self, http: httpx.Client) -> None:
        assert_problem(http.get("/v1/models/other"), 404, "not-found", "no such model")


def access_lines(gateway: Portal, request_id: str) -> list[dict[str, Any]]:
    """The access log's lines of a request; it is written once the answer has left."""
    lines = [json.loads(line) for line in gateway.log.splitlines() if f'"{request_id}"' in line]
    return [line for line in lines if line["logger"] == "cxr_portal.access"]


class TestRequests:
    def test_the_clients_id_goes_all_the_way(
        self, http: httpx.Client, gateway: Portal, model: Server
    ) -> None:
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        headers = {"x-request-id": "mine-1", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
        answer = ask(http, GOOD, headers=headers)
        assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine-1"
        model.wait_for("the gateway's line", lambda: access_lines(gateway, "mine-1"), 5)
        (line,) = access_lines(gateway, "mine-1")
        assert (line["route"], line["code"], line["trace_id"]) == (PREDICTIONS, "200", trace)
        model.wait_for(
            "the model's line", lambda: f"request_id=mine-1 trace_id={trace}" in model.log, 5
        )

    def test_every_answer_has_an_id_and_the_security_headers(self, http: httpx.Client) -> None:
        for path in ("/v1/models", "/v1/nothing", "/health/live", "/health/ready"):
            answer = http.get(path)
            assert len(answer.headers["x-request-id"]) == 36
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"

    def test_unknown_paths_and_methods_are_problems(self, http: httpx.Client) -> None:
        assert_problem(http.get("/v1/nothing"), 404, "not-found", "nothing here")
        assert_problem(http.put(PREDICTIONS), 405, "method-not-allowed", "not allowed")

    def test_another_name_of_this_host_is_refused(self, http: httpx.Client) -> None:
        """So no page elsewhere can reach a gateway that asks nobody who they are."""
        answer = http.get("/v1/models", headers={"Host": "evil.example"})
        assert_problem(answer, 421, "wrong-host", "no such host")
        answer = http.get("/v1/models", headers={"Host": "["})
        assert_problem(answer, 421, "wrong-host", "no such host")

    def test_other_pages_may_not_send(self, http: httpx.Client) -> None:
        answer = ask(http, GOOD, headers={"Origin": "https://evil.example"})
        assert_problem(answer, 403, "wrong-origin", "may not")
        malformed = ask(http, GOOD, headers={"Origin": "http://["})
        assert_problem(malformed, 403, "wrong-origin", "may not")
        assert "access-control-allow-origin" not in answer.headers

    def test_only_what_the_operator_allows_may_call_from_elsewhere(self, model: Server) -> None:
        friend = "https://viewer.example"
        options = (f"--server={model.grpc}", f"--cors-origin={friend}")
        with portal(*options) as running, running.http() as http:
            wish = {"Origin": friend, "Access-Control-Request-Method": "POST"}
            asked = http.options(PREDICTIONS, headers=wish)
            assert asked.headers["access-control-allow-origin"] == friend
            answer = ask(http, GOOD, headers={"Origin": friend})
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == friend
            assert ask(http, GOOD, headers={"Origin": "https://e.example"}).status_code == 403

    def test_logs_and_metrics_hold_nothing_of_a_patient(
        self, http: httpx.Client, gateway: Portal
    ) -> None:
        pixels = np.full((64, 64), 140, np.uint8)
        upload = [("images", ("SECRET^NAME.dcm", dicom_bytes(pixels)))]
        assert http.post(PREDICTIONS, files=upload).status_code == 200
        bad = [("images", ("SECRET^NAME.dcm", dicom_bytes(pixels, Modality="MR")))]
        refused = http.post(f"{PREDICTIONS}?explain=SECRET", files=bad)
        http.get("/v1/jobs/SECRET")
        assert refused.status_code == 422
        everything = gateway.log + gateway.metrics + refused.text
        for word in ("SECRET", *PATIENT.values()):
            assert word == "F" or word not in everything
        (audited,) = (
            json.loads(line)
            for line in gateway.log.splitlines()
            if refused.headers["x-request-id"] in line and '"cxr_portal.audit"' in line
        )
        assert audited["action"] == "predict"
        assert audited["principal"] == "local"

    def test_metrics_are_those_of_the_catalogue(self, http: httpx.Client, gateway: Portal) -> None:
        ask(http, GOOD)
        ask(http, b"")
        metrics = shown(gateway.metrics)
        assert {name for name in documented() if name.startswith(PORTAL)} <= metrics.keys()
        assert_documented(metrics)
        assert 'cxr_portal_images_total{outcome="empty",way="request"}' in gateway.metrics
        assert f'route="{PREDICTIONS}"' in gateway.metrics

    def test_failures_are_counted_from_the_first_one_on(self, gateway: Portal) -> None:
        """Prometheus sees an increase only where there was a number before."""
        for method, route in (("POST", PREDICTIONS), ("GET", "/v1/jobs/{job_id}")):
            for code in (500, 502, 503, 504):
                labels = f'code="{code}",method="{method}",route="{route}"'
                assert f"cxr_portal_requests_total{{{labels}}} " in gateway.metrics


class TestModelAway:
    def test_down_and_back(self, guarded_archive: Path) -> None:
        port = free_port()
        with portal(f"--server=127.0.0.1:{port}") as running, running.http() as http:
            assert http.get("/health/ready").status_code == 200, "the page can still be served"
            problem = ask(http, GOOD)
            assert_problem(problem, 503, "model-unavailable", "cannot be reached")
            assert int(problem.headers["retry-after"]) >= 1
            for _ in range(5):
                ask(http, GOOD)
            calls = re.findall(r"^cxr_portal_model_calls_total.*", running.metrics, re.M)
            assert ask(http, GOOD).status_code == 503
            again = re.findall(r"^cxr_portal_model_calls_total.*", running.metrics, re.M)
            assert calls == again, "it is left alone"
            assert "cxr_portal_breaker_open 1.0" in running.metrics
            options = ("--runtime=inprocess", "--workers=1", f"--grpc-port={port}")
            with serving(
                guarded_archive, *options, "--rest-port=0", "--metrics-port=0", free_ports=False
            ):
                deadline = time.monotonic() + 30
                while ask(http, GOOD).status_code != 200:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            assert "cxr_portal_breaker_open 0.0" in running.metrics

    def test_slower_than_the_deadline(self, model: Server) -> None:
        with portal(f"--server={model.grpc}", "--timeout=3") as running, running.http() as http:
            assert ask(http, GOOD).status_code == 200
            for worker in model.workers():
                worker.suspend()
            try:
                answer = ask(http, GOOD)
            finally:
                for worker in model.workers():
                    worker.resume()
            assert_problem(answer, 504, "model-timeout", "did not answer in time")

    def test_a_client_that_leaves_takes_its_call_with_it(self, model: Server) -> None:
        with portal(f"--server={model.grpc}") as running, running.http() as http:
            for worker in model.workers():
                worker.suspend()
            try:
                with pytest.raises(httpx.ReadTimeout):
                    ask(http, GOOD, timeout=1)
                deadline = time.monotonic() + 30
                while 'model_calls_total{code="CANCELLED"} 1.0' not in running.metrics:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            finally:
                for worker in model.workers():
                    worker.resume()
            assert "cxr_portal_images_in_flight 0.0" in running.metrics


def upload(to: Portal, path: str, size: int) -> socket.socket:
    """Begin a form of that many bytes, and leave it there."""
    host, port = to.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 1000}\r\n"
    form = "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    part = 'Content-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(f"{head}{form}{part}".encode() + bytes(size))
    return connection


class TestUploads:
    @pytest.mark.parametrize("path", [PREDICTIONS, "/v1/jobs"])
    def test_a_client_that_leaves_is_no_failure_of_the_gateway(
        self, model: Server, path: str
    ) -> None:
        with portal(f"--server={model.grpc}") as running:
            upload(running, path, 1000).close()
            counted = f'cxr_portal_requests_total{{code="gone",method="POST",route="{path}"}} 1.0'
            deadline = time.monotonic() + 20
            while counted not in running.metrics:
                assert time.monotonic() < deadline, running.metrics
                time.sleep(0.1)
            assert counted.replace("gone", "500") not in running.metrics
            assert "Traceback" not in running.log

    def test_all_together_have_a_limit(self, model: Server) -> None:
        """Else a few large jobs at once would end the gateway for its memory, and all others."""
        size = 50_000
        options = (f"--server={model.grpc}", f"--max-image-bytes={size}")
        with portal(*options) as running, running.http() as http:
            # One image more than two of the largest jobs; whichever is read last is refused.
            begun = [upload(running, "/v1/jobs", images * size) for images in (7, 7, 3)]
            refused, _, _ = select.select(begun, [], [], 20)
            assert [one.recv(100)[:13] for one in refused] == [b"HTTP/1.1 503 "]
            for connection in begun:
                connection.close()
            deadline = time.monotonic() + 20
            while (answer := ask(http, GOOD)).status_code == 503:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert answer.status_code == 200

    def test_one_that_does_not_arrive_ends(self, model: Server) -> None:
        with portal(f"--server={model.grpc}", "--timeout=1") as running:
            connection = upload(running, "/v1/jobs", 1000)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"Nothing of the request came for 1 s." in answer


class TestCommand:
    def test_one_command_starts_model_and_gateway(self, guarded_archive: Path) -> None:
        with portal(str(guarded_archive)) as running:
            with running.http() as http:
                assert ask(http, GOOD).status_code == 200
            assert running.stop() == 0
            assert "stopped" in running.log

    def test_a_model_that_cannot_be_served_ends_it(self, tmp_path: Path) -> None:
        (tmp_path / "bad.mar").write_bytes(b"nothing")
        done = subprocess.run(
            [CXR, "portal", tmp_path / "bad.mar", f"--database=sqlite:///{tmp_path}/p.db"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "The model server did not start" in done.stderr

    @pytest.mark.parametrize(
        ("options", "code", "words"),
        [
            (["--database=nonsense"], 1, "The database's URL is not valid"),
            (["--database=sqlite:////no/such/folder/p.db"], 1, "The database cannot be used"),
            (
                ["--database=postgresql://user:SECRET@127.0.0.1:9/none"],
                1,
                "The database cannot be used",
            ),
            (["--oidc-issuer=https://id.example"], 2, "go together"),
            (["--oidc-issuer=http://id.example", "--oidc-audience=a"], 2, "https://"),
        ],
    )
    def test_what_cannot_work_is_said_in_a_sentence(
        self, options: list[str], code: int, words: str
    ) -> None:
        done = subprocess.run(
            [CXR, "portal", "--port=0", "--metrics-port=0", *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert "SECRET" not in done.stderr
        assert "Traceback" not in done.stderr
