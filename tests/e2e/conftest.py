"""The service on a real cluster. What the cluster offers comes from the environment."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
import urllib3

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_archive.packager import pack
from cxr_archive.signer import signer
from support.bundles import encoded_image, make_bundle
from support.charts import CHART
from support.cluster import Gateway, Namespace, run, setting, wait_for
from support.figures import report
from support.keys import KeyPair, make_keys
from support.prometheus import Prometheus

BUCKET = "cxr-e2e"
NAMESPACE = "cxr-e2e"
HOST = "cxr.e2e.example.org"
GRPC_HOST = "grpc.cxr.e2e.example.org"


@pytest.fixture(scope="session")
def image() -> bytes:
    return encoded_image(90, (512, 480), "JPEG")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), guarded=True)


@pytest.fixture(scope="session")
def expected(bundle: Path, image: bytes) -> Prediction:
    """The answer of the same model in this process."""
    answer = Engine(bundle).predict([image])[0]
    assert isinstance(answer, Prediction)
    return answer


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The archives of two versions, here."""
    folder = tmp_path_factory.mktemp("archives")
    packed = {version: folder / f"{version}.mar" for version in ("1.0", "2.0")}
    for version, archive in packed.items():
        pack(make_bundle(folder / version, version=version), archive)
    return packed


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, archives: dict[str, Path], keys: KeyPair
) -> str:
    """Archives in S3: folders `1.0`, `2.0`, `signed`, `altered`, `damaged`; the URI above them."""
    store = boto3.client("s3", endpoint_url=setting("CXR_E2E_S3_URL", "S3 server, from here"))
    if BUCKET not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
        store.create_bucket(Bucket=BUCKET)
    folder = tmp_path_factory.mktemp("models")
    for version in ("1.0", "2.0"):
        archive = folder / f"{version}.mar"
        pack(make_bundle(folder / version, version=version, guarded=True), archive)
        store.upload_file(str(archive), BUCKET, f"{version}/cxr.mar")
    packed = folder / "2.0.mar"
    signature = signer(keys.private)(packed)
    altered = folder / "altered.mar"
    pack(make_bundle(folder / "altered", version="2.0", description="Another one."), altered)
    for name, archive in (("signed", packed), ("altered", altered)):
        store.upload_file(str(archive), BUCKET, f"{name}/cxr.mar")
        store.upload_file(str(signature), BUCKET, f"{name}/cxr.mar.sig")
    damaged = bytearray(packed.read_bytes())
    damaged[damaged.index(b"intended_use") + 20] ^= 1
    store.put_object(Bucket=BUCKET, Key="damaged/cxr.mar", Body=bytes(damaged))
    return f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def gateway() -> Gateway:
    return Gateway(setting("CXR_E2E_GATEWAY_ADDRESS", "host:port of the gateway"), HOST, GRPC_HOST)


@pytest.fixture(scope="session")
def prometheus() -> Prometheus:
    return Prometheus(NAMESPACE)


@pytest.fixture(scope="session")
def values(models: str) -> list[str]:
    """What every installation sets on top of the example for small machines."""
    repository, _, tag = setting("CXR_E2E_IMAGE", "serving image in the cluster").rpartition(":")
    namespace, _, name = setting("CXR_E2E_GATEWAY", "namespace/name of the gateway").partition("/")
    parent = json.dumps([{"name": name, "namespace": namespace}])
    port = setting("CXR_E2E_S3_ENDPOINT", "host:port of S3, in the cluster").rpartition(":")[2]
    return [
        f"image.repository={repository}",
        f"image.tag={tag}",
        f"model.storageUri={models}/1.0",
        f"routing.host={HOST}",
        f"routing.grpcHost={GRPC_HOST}",
        f"networkPolicy.storagePorts={{443,{port}}}",
        "resources.requests.cpu=100m",
        "resources.requests.memory=512Mi",
        "--set-json",
        f"routing.gateway.parentRefs={parent}",
    ]


@pytest.fixture(scope="session")
def cluster(values: list[str]) -> Iterator[Namespace]:
    """A fresh namespace under the `restricted` pod security standard, with storage credentials."""
    run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    run("kubectl", "create", "namespace", NAMESPACE)
    run("kubectl", "label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    namespace = Namespace(NAMESPACE)
    credentials = boto3.Session().get_credentials()
    assert credentials is not None
    namespace.kubectl(
        "create",
        "secret",
        "generic",
        "cxr-storage",
        f"--from-literal=AWS_ACCESS_KEY_ID={credentials.access_key}",
        f"--from-literal=AWS_SECRET_ACCESS_KEY={credentials.secret_key}",
    )
    namespace.kubectl(
        "annotate",
        "secret",
        "cxr-storage",
        f"serving.kserve.io/s3-endpoint={setting('CXR_E2E_S3_ENDPOINT', 'S3 in the cluster')}",
        "serving.kserve.io/s3-usehttps=0",
        "serving.kserve.io/s3-region=us-east-1",
    )
    yield namespace
    run("kubectl", "delete", "namespace", NAMESPACE, "--wait=false")


@pytest.fixture(scope="session")
def flags(values: list[str]) -> list[str]:
    """The same, as arguments of helm."""
    arguments, kind = [], "--set"
    for value in values:
        if value.startswith("--"):
            kind = value
            continue
        arguments += [kind, value]
        kind = "--set"
    return arguments


@pytest.fixture(scope="session")
def installed(cluster: Namespace, flags: list[str], gateway: Gateway, image: bytes) -> Namespace:
    """The service, installed with the example for small machines, once it has answered."""
    # Prometheus needs a minute or two until it asks a new PodMonitor's pods; KEDA asks it later.
    watched = "monitoring.podMonitor.enabled=true,monitoring.podMonitor.interval=5s"
    cluster.helm(
        "install", "-f", str(CHART / "values" / "cpu-small.yaml"), "--set", watched, *flags
    )

    def answered() -> bool:
        try:
            return bool(gateway.predict(image))
        except (AssertionError, urllib3.exceptions.HTTPError):
            return False

    wait_for(answered, "first prediction", 300, every=0.1)
    answer = datetime.now(UTC)
    cluster.kubectl("wait", "--for=condition=Ready", f"isvc/{cluster.service}", "--timeout=60s")
    cluster.rolled_out()
    report("cold start", cold_start(cluster, answer))
    return cluster


def cold_start(cluster: Namespace, answer: datetime) -> str:
    """How long the pod took from being scheduled to its first answer, in its steps."""
    (pod,) = cluster.pods()
    times = {item["type"]: item["lastTransitionTime"] for item in pod["status"]["conditions"]}
    scheduled = datetime.fromisoformat(times["PodScheduled"])
    storage = pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["finishedAt"]
    # The server's own account, in its log.
    log = cluster.kubectl("logs", pod["metadata"]["name"], "-c", "kserve-container")
    steps = re.search(r"ready [\d.]+ s after the start of the process \((.*)\)", log)
    assert steps, log
    return (
        f"scheduled to first prediction {(answer - scheduled).total_seconds():.0f} s: storage "
        f"{(datetime.fromisoformat(storage) - scheduled).total_seconds():.0f} s, {steps[1]}"
    )
