"""The service as SageMaker hosts it: its port, its two paths, its kinds of content."""

import contextlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_archive import packager
from cxr_server import cli, main
from support.archives import Files, edited_archive
from support.bundles import encoded_image
from support.dicoms import dicom_bytes
from support.protocols import JSON, v1_body
from support.servers import free_port, serving

PIXELS = np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) % 4096


def answered(url: str) -> int:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code
    return 0


def test_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: the archive in a folder, all else by the environment."""
    loading = tmp_path / "loading"
    loading.touch()

    def that_loads_slowly(files: Files) -> None:
        wait = f"import pathlib, time\nwhile pathlib.Path({str(loading)!r}).exists():\n"
        files[packager.HANDLER] = f"{wait}    time.sleep(0.05)\n".encode() + files[packager.HANDLER]

    model = edited_archive(tmp_path, that_loads_slowly)
    port = free_port()
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", str(port))
    monkeypatch.setenv("CXR_GRPC_PORT", "0")
    monkeypatch.setenv("CXR_METRICS_PORT", "0")
    monkeypatch.setenv("CXR_RUNTIME", "inprocess")
    url = f"http://127.0.0.1:{port}"
    with serving(model.parent, "--workers=1", wait=False, free_ports=False) as server:
        server.wait_for("the port", lambda: answered(f"{url}/ping"), 30)
        assert answered(f"{url}/ping") == 503
        early = httpx.post(f"{url}/invocations", content=v1_body([encoded_image()]))
        assert early.status_code == 503
        assert early.headers["retry-after"] == "1"
        loading.unlink()
        server.wait_ready()
        assert httpx.get(f"{url}/ping").status_code == 200

        images = {
            "image/jpeg": encoded_image(80, kind="JPEG"),
            "image/png": encoded_image(200),
            "application/x-image": encoded_image(30),
            "application/dicom": dicom_bytes(PIXELS),
        }
        expected = Engine(tmp_path / "bundle").predict(list(images.values()))
        for (content_type, image), prediction in zip(images.items(), expected, strict=True):
            answer = httpx.post(
                f"{url}/invocations", content=image, headers={"Content-Type": content_type}
            )
            assert answer.status_code == 200, answer.text
            assert isinstance(prediction, Prediction)
            (got,) = answer.json()["predictions"]
            assert got["label"] == prediction.label
            assert got["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)
        answer = httpx.post(
            f"{url}/invocations",
            content=v1_body(list(images.values())),
            headers={"Content-Type": JSON},
        )
        assert [got["label"] for got in answer.json()["predictions"]] == [
            prediction.label for prediction in expected if isinstance(prediction, Prediction)
        ]
        for content, content_type, status in (
            (b"no image", "image/png", 400),
            (b"GIF89a" + bytes(100), "application/x-image", 415),
            (b"a,b", "text/csv", 415),
        ):
            headers = {"Content-Type": content_type}
            answer = httpx.post(f"{url}/invocations", content=content, headers=headers)
            assert answer.status_code == status
            assert set(answer.json()) == {"error"}
        text = httpx.get(server.metrics).text
        assert 'cxr_requests_total{code="415",method="predict",protocol="sagemaker"} 2.0' in text


def test_serve_alone_means_sagemakers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Path] = []
    monkeypatch.setattr(cli, "_SAGEMAKER_MODEL", tmp_path)
    monkeypatch.setattr(main, "serve", lambda model, *_: served.append(model))
    assert CliRunner().invoke(cli.serve, []).exit_code == 0
    assert served == [tmp_path]


def test_serve_alone_elsewhere_asks_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_SAGEMAKER_MODEL", tmp_path / "nothing")
    done = CliRunner().invoke(cli.serve, [])
    assert done.exit_code == 2
    assert "Name MODEL" in done.output
