"""`cxr predict` against a running server."""

import json
import subprocess
from pathlib import Path

import pytest

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_server.settings import RuntimeName
from support.bundles import LABELS, encoded_image
from support.servers import CXR, Server, free_port

# What answers behind the server makes no difference here.
one_runtime = pytest.mark.parametrize("server", [RuntimeName.INPROCESS], indirect=True)


def predict(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [CXR, "predict", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(params=["rest", "grpc"])
def service(server: Server, request: pytest.FixtureRequest) -> list[str]:
    """Options that name the service, for either protocol."""
    return ["--protocol", request.param, "--url", server.endpoints[request.param]]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    images = {
        "dark.png": encoded_image(30),
        "notes.txt": b"not an image",
        "bright.jpg": encoded_image(240, kind="JPEG"),
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    return [tmp_path / name for name in images]


@one_runtime
def test_json(service: list[str], files: list[Path], bundle: Path) -> None:
    good = [files[0], files[2]]
    done = predict(*service, "--json", *good)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    expected = Engine(bundle).predict([file.read_bytes() for file in good])
    for file, answer, prediction in zip(good, answers, expected, strict=True):
        assert isinstance(prediction, Prediction)
        assert answer["image"] == str(file)
        assert answer["label"] == prediction.label
        assert answer["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-6)
        assert answer["model_version"] == "1.0"


@one_runtime
def test_table(service: list[str], files: list[Path]) -> None:
    done = predict(*service, files[0], files[2])
    assert done.returncode == 0, done.stderr
    head, _, dark, bright = done.stdout.splitlines()
    assert head.split() == ["image", "label", "probabilities"]
    assert dark.startswith("dark.png ")
    assert bright.startswith("bright.jpg ")
    assert all(label in dark for label in LABELS)


@one_runtime
def test_refused_image(service: list[str], files: list[Path]) -> None:
    """The others are answered all the same."""
    done = predict(*service, "--json", *files)
    assert done.returncode == 1
    dark, notes, bright = (json.loads(line) for line in done.stdout.splitlines())
    assert dark["label"]
    assert bright["label"]
    assert notes == {
        "image": str(files[1]),
        "error": "The data is not an image; send one JPEG, PNG, TIFF or DICOM file.",
    }
    table = predict(*service, *files)
    assert table.returncode == 1
    assert "refused" in table.stdout
    assert "Traceback" not in table.stderr


@one_runtime
def test_unknown_model(service: list[str], files: list[Path]) -> None:
    done = predict(*service, "--model", "another", files[0])
    assert done.returncode == 1
    assert "There is no such model here" in done.stdout


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_nobody_there(protocol: str, files: list[Path]) -> None:
    scheme = "http://" if protocol == "rest" else ""
    url = f"{scheme}127.0.0.1:{free_port()}"
    done = predict("--protocol", protocol, "--url", url, files[0])
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: Cannot reach {url}")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-file.png"],
        ["--protocol", "smoke-signals", __file__],
        ["--url", "ftp://127.0.0.1", __file__],
        ["--timeout", "0", __file__],
    ],
    ids=["no image", "no such file", "protocol", "url", "timeout"],
)
def test_usage(arguments: list[str]) -> None:
    done = predict(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: cxr predict" in done.stderr
    assert "Traceback" not in done.stderr
