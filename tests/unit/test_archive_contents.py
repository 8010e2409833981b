"""What travels in an archive is enough, and is the same code as here."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cxr.config import load_config
from cxr.engine import Engine
from cxr.preprocess import load_tensor
from cxr_archive.packager import pack
from support.bundles import encoded_image, make_bundle

# All that the archive's code may import beyond the standard library.
ALLOWED = ("numpy", "Pillow", "onnxruntime", "flatbuffers", "packaging", "protobuf")

WORKER = """
import json, sys
folder, image, tensor = sys.argv[1:]
for blocked in ("pydantic", "click", "torch"):
    try:
        __import__(blocked)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{blocked} can be imported; this worker is not isolated")
from types import SimpleNamespace
import numpy as np
import cxr.preprocess
from cxr_handler import CxrHandler
assert cxr.__file__.startswith(folder), cxr.__file__
handler = CxrHandler()
handler.initialize(SimpleNamespace(system_properties={"model_dir": folder}))
data = open(image, "rb").read()
np.save(tensor, cxr.preprocess.load_tensor(data, handler.engine.preprocessing))
context = SimpleNamespace(
    get_all_request_header=lambda index: {},
    set_response_content_type=lambda index, kind: None,
)
print(handler.handle([{"body": data}], context)[0])
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def extracted(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extracted")
    pack(bundle, folder / "cxr.mar")
    with zipfile.ZipFile(folder / "cxr.mar") as mar:
        mar.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages with the allowed distributions and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    for name in ALLOWED:
        for file in distribution(name).files or ():
            link = folder / file.parts[0]
            if ".." not in file.parts and not link.exists():
                link.symlink_to(Path(str(file.locate())).parents[len(file.parts) - 2])
    return folder


def run_worker(
    extracted: Path, site: Path, image: bytes, out: Path
) -> tuple[dict[str, object], npt.NDArray[np.float32]]:
    (out / "image").write_bytes(image)
    done = subprocess.run(
        # -S: no site-packages, so neither this repository nor the development environment.
        [sys.executable, "-S", "-c", WORKER, extracted, out / "image", out / "tensor.npy"],
        env={"PYTHONPATH": os.pathsep.join(map(str, (extracted, site)))},
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer, np.load(out / "tensor.npy")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_archive_alone_gives_the_same_tensor_and_answer(
    bundle: Path, extracted: Path, site: Path, tmp_path: Path, kind: str
) -> None:
    image = encoded_image(brightness=150, size=(301, 217), kind=kind)
    answer, tensor = run_worker(extracted, site, image, tmp_path)
    expected = load_tensor(image, load_config(bundle).preprocessing)
    assert tensor.dtype == expected.dtype
    np.testing.assert_array_equal(tensor, expected)
    prediction = Engine(bundle).predict([image])[0]
    assert answer.pop("seconds")
    assert (answer.pop("batch"), answer.pop("provider")) == (1, "CPUExecutionProvider")
    assert answer == {
        "label": prediction.label,
        "probabilities": prediction.probabilities,
        "positive": list(prediction.positive),
        "decisions": prediction.decisions,
    }
