"""charts/cxr-loadtest in a real cluster: Jobs that judge, distributed or not, and their results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from cxr_loadtests.results import load_result
from support.charts import LOADTEST_CHART
from support.cluster import Gateway, Namespace, run, setting, wait_for
from support.figures import report
from support.loadtests import LENIENT, PROFILE
from support.volumes import folder_of, local_volume, on_the_node

pytestmark = pytest.mark.timeout(400)

RELEASE = "load"
BUCKET = "cxr-e2e-loadtests"
VOLUME = "cxr-e2e-loadtest"
FILES = {"result.json", "verdict.json", "junit.xml", "report.html"}
STRICT = {"objectives": [{"name": "no service can", "p95_seconds": 0.0001}]}


@pytest.fixture(scope="module")
def loadtest_image() -> str:
    return setting("CXR_E2E_LOADTEST_IMAGE", "image of the load test in the cluster")


@pytest.fixture(scope="module")
def tested(installed: Namespace) -> Iterator[Namespace]:
    """The installation; afterwards without load tests."""
    yield installed
    run("helm", "-n", installed.name, "uninstall", RELEASE, "--ignore-not-found")


@pytest.fixture(scope="module")
def options(gateway: Gateway, loadtest_image: str) -> dict[str, Any]:
    """Values of every run: through the gateway, as clients come."""
    repository, _, tag = loadtest_image.rpartition(":")
    namespace, _, name = setting("CXR_E2E_GATEWAY", "namespace/name of the gateway").partition("/")
    return {
        "image": {"repository": repository, "tag": tag},
        # The gateway's service has its name.
        "target": {
            "host": f"http://{name}.{namespace}",
            "grpc": f"{name}.{namespace}:80",
            "hostHeader": gateway.host,
            "authority": gateway.grpc_host,
        },
        "run": {
            "shape": "open",
            "rate": 5,
            "seconds": 12,
            "profile": yaml.safe_dump(PROFILE),
            "objectives": yaml.safe_dump(LENIENT),
        },
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}},
    }


def ended(cluster: Namespace, folder: Path, values: dict[str, Any]) -> tuple[str, str]:
    """Make a run and wait for its end; the name of its Job, and how that ended."""
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    upgrade = ("upgrade", "--install", RELEASE, str(LOADTEST_CHART), "-f", str(file))
    run("helm", "-n", cluster.name, *upgrade)
    status = json.loads(run("helm", "-n", cluster.name, "status", RELEASE, "-o", "json"))
    job = f"{RELEASE}-{status['version']}"
    wait_for(lambda: outcome(cluster, job), f"end of {job}", 300)
    return job, outcome(cluster, job)


def outcome(cluster: Namespace, job: str) -> str:
    """How a Job has ended: `Complete` or `Failed`; empty before."""
    conditions = cluster.get("job", job)["status"].get("conditions", [])
    final = {item["type"] for item in conditions if item["status"] == "True"}
    return "".join(final & {"Complete", "Failed"})


def test_two_workers_judge_as_one_and_leave_their_results_in_s3(
    tested: Namespace, options: dict[str, Any], tmp_path: Path
) -> None:
    store = boto3.client("s3", endpoint_url=setting("CXR_E2E_S3_URL", "S3 server, from here"))
    if BUCKET not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
        store.create_bucket(Bucket=BUCKET)
    inside = {
        "workers": 2,
        "results": {
            "s3": {
                "uri": f"s3://{BUCKET}/runs",
                "endpoint": f"http://{setting('CXR_E2E_S3_ENDPOINT', 'S3 in the cluster')}",
                "credentialsSecret": "cxr-storage",
            }
        },
    }
    job, how = ended(tested, tmp_path, options | inside)
    log = tested.kubectl("logs", f"job/{job}")
    assert how == "Complete", log
    wait_for(
        lambda: tested.get("job", f"{job}-workers")["status"].get("succeeded") == 2,
        "end of both workers",
    )
    found = store.list_objects_v2(Bucket=BUCKET, Prefix=f"runs/{job}/")["Contents"]
    assert {item["Key"].rpartition("/")[2] for item in found} == FILES
    store.download_file(BUCKET, f"runs/{job}/result.json", str(tmp_path / "result.json"))
    result = load_result(tmp_path)
    assert result.verdict is not None
    assert result.verdict.passed, log
    assert (result.generator.workers, result.generator.lost) == (2, 0)
    assert {item.protocol for item in result.bins} >= {"v1", "grpc"}
    asked = sum(code.count for code in result.codes)
    assert asked > 20
    report("load test in the cluster", f"2 workers, {asked} requests, none failed")


def test_a_broken_objective_fails_the_job_and_is_in_the_volume(
    tested: Namespace, options: dict[str, Any], tmp_path: Path, loadtest_image: str
) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": VOLUME},
        "spec": {
            "storageClassName": VOLUME,
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    strict = options["run"] | {"seconds": 3, "objectives": yaml.safe_dump(STRICT)}
    with local_volume(VOLUME, loadtest_image):
        tested.kubectl("apply", "-f", "-", stdin=json.dumps(claim))
        job, how = ended(tested, tmp_path, options | {"run": strict, "results": {"claim": VOLUME}})
        assert how == "Failed", tested.kubectl("logs", f"job/{job}")
        folder = f"{folder_of(VOLUME)}/{job}"
        assert set(on_the_node(loadtest_image, "ls", folder).split()) == FILES
        verdict = json.loads(on_the_node(loadtest_image, "cat", f"{folder}/verdict.json"))
        run("helm", "-n", tested.name, "uninstall", RELEASE)
        tested.kubectl("delete", "pvc", VOLUME)
    broken = [check["name"] for check in verdict["checks"] if not check["passed"]]
    assert broken == ["no service can: p95"]
