"""What a platform team does with the service, on a real cluster and under load.

The scenarios share one installation and run in order; each leaves the service as it found it.
"""

import base64
import json
import math
import time
from datetime import datetime

import pytest
from conftest import report

from cxr.engine import Prediction
from support.cluster import Gateway, Load, Namespace, infer, run, setting, wait_for
from support.keys import KeyPair

pytestmark = pytest.mark.timeout(600)

# What a gateway needs at most to follow a changed route.
ROUTE_SECONDS = 5


def seconds_to_ready(cluster: Namespace) -> str:
    """How long the newest pod took, in its steps."""
    pod = max(cluster.pods(), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    times = {item["type"]: item["lastTransitionTime"] for item in pod["status"]["conditions"]}
    storage = pod["status"]["initContainerStatuses"][0]["state"]["terminated"]
    started = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]

    def between(start: str, end: str) -> float:
        parse = datetime.fromisoformat
        return (parse(end) - parse(start)).total_seconds()

    return (
        f"scheduled to ready {between(times['PodScheduled'], times['Ready']):.0f} s: storage "
        f"{between(times['PodScheduled'], storage['finishedAt']):.0f} s, then start to ready "
        f"{between(started, times['Ready']):.0f} s"
    )


def check(load: Load, scenario: str, figures: str) -> None:
    report(scenario, f"{load.requests} requests, {len(load.failures)} failures; {figures}")
    assert load.requests > 50
    assert not load.failures, "\n".join(load.failures[:10])


def test_install_and_predict_over_every_protocol(
    installed: Namespace, gateway: Gateway, image: bytes, expected: Prediction
) -> None:
    wait_for(lambda: gateway.rest("/v2/health/ready").status == 200, "route", 60)
    assert "Succeeded" in installed.helm("test", "--timeout", "180s")

    raw = gateway.predict(image)["predictions"][0]
    encoded = base64.b64encode(image).decode()
    v1 = gateway.rest(
        "/v1/models/cxr:predict",
        json.dumps({"instances": [{"b64": encoded}]}).encode(),
        content_type="application/json",
    ).json()["predictions"][0]
    v2 = gateway.rest(
        "/v2/models/cxr/infer",
        json.dumps(
            {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [encoded]}]}
        ).encode(),
        content_type="application/json",
    ).json()
    with gateway.channel() as channel:
        rpc = infer(channel, image)

    probabilities = list(expected.probabilities.values())
    assert list(raw["probabilities"].values()) == pytest.approx(probabilities, abs=1e-6)
    assert v1 == raw
    assert v2["outputs"][0]["data"] == pytest.approx(probabilities, abs=1e-6)
    assert list(rpc.outputs[0].contents.fp32_contents) == pytest.approx(probabilities, abs=1e-6)
    report("install", seconds_to_ready(installed))


def test_upgrade_and_rollback_lose_no_request(
    installed: Namespace, gateway: Gateway, models: str, image: bytes
) -> None:
    with Load(gateway, image) as load:
        start = time.monotonic()
        installed.upgrade(f"model.storageUri={models}/2.0")
        installed.rolled_out()
        upgraded = time.monotonic() - start
        wait_for(lambda: gateway.predict(image)["model_version"] == "2.0", "version 2.0", 60)
        installed.helm("rollback")
        installed.rolled_out()
        wait_for(lambda: gateway.predict(image)["model_version"] == "1.0", "version 1.0", 60)
    check(load, "upgrade and rollback", f"upgrade {upgraded:.0f} s, {dict(load.versions)}")


def test_a_deleted_and_an_evicted_pod_lose_no_request(
    installed: Namespace, gateway: Gateway, image: bytes
) -> None:
    installed.upgrade("scaling.replicas=2")
    wait_for(lambda: len(installed.ready_pods()) == 2, "second replica")
    with Load(gateway, image) as load:
        installed.kubectl("delete", "pod", installed.ready_pods()[0], "--wait=false")
        wait_for(lambda: len(installed.ready_pods()) == 2, "replacement of the deleted pod")
        first, second = installed.ready_pods()
        assert "error" not in evict(installed, first).lower()
        refusal = evict(installed, second)
        wait_for(lambda: len(installed.ready_pods()) == 2, "replacement of the evicted pod")
    assert "disruption budget" in refusal
    check(load, "pod deleted, pod evicted", "the second eviction was refused by the budget")
    installed.upgrade("scaling.replicas=1")
    wait_for(lambda: len(installed.pods()) == 1, "scale down to one")


def evict(cluster: Namespace, pod: str) -> str:
    """What a node drain asks for; the API server's answer."""
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": cluster.name},
    }
    path = f"/api/v1/namespaces/{cluster.name}/pods/{pod}/eviction"
    return cluster.kubectl(
        "create", "--raw", path, "-f", "-", stdin=json.dumps(eviction), check=False
    )


def test_canary_gets_its_share_and_is_promoted_without_loss(
    installed: Namespace, gateway: Gateway, models: str, image: bytes
) -> None:
    canary = "cxr-cxr-serve-canary-predictor"
    share, count = 0.1, 400

    def tracked() -> str:
        answer = gateway.rest(
            "/v1/models/cxr:predict", image, content_type="image/jpeg", x_cxr_track="canary"
        )
        return str(answer.json()["model_version"]) if answer.status == 200 else ""

    with Load(gateway, image) as load:
        installed.upgrade("canary.enabled=true", f"canary.storageUri={models}/2.0")
        wait_for(lambda: installed.ready_pods(canary), "canary")
        wait_for(lambda: tracked() == "2.0", "route to the canary", 60)
        installed.upgrade("canary.weight=10")
        wait_for(lambda: load.versions["2.0"], "share of the canary", 60)
        versions = [gateway.predict(image)["model_version"] for _ in range(count)]
        by_header = {tracked() for _ in range(20)}
        installed.upgrade(f"model.storageUri={models}/2.0")
        installed.rolled_out()
        installed.upgrade("canary.weight=0")
        time.sleep(ROUTE_SECONDS)
        installed.upgrade("canary.enabled=false")
        wait_for(lambda: not installed.pods(canary), "end of the canary")
        installed.upgrade(f"model.storageUri={models}/1.0")
        installed.rolled_out()
    observed = versions.count("2.0") / count
    assert by_header == {"2.0"}
    assert abs(observed - share) < 4 * math.sqrt(share * (1 - share) / count)
    check(load, "canary and promotion", f"observed share {observed:.3f} of {share}")


def test_keda_follows_the_load_and_an_update_keeps_the_replicas(
    installed: Namespace, gateway: Gateway, image: bytes
) -> None:
    address = setting("CXR_E2E_PROMETHEUS", "URL of Prometheus, in the cluster")
    installed.upgrade(
        "scaling.type=keda",
        "scaling.minReplicas=1",
        "scaling.maxReplicas=2",
        "scaling.scaleDownStabilizationSeconds=10",
        "scaling.keda.inFlightPerReplica=2",
        "scaling.keda.pollingInterval=5",
        f"scaling.keda.serverAddress={address}",
        "monitoring.podMonitor.enabled=true",
        "monitoring.podMonitor.interval=5s",
    )
    installed.rolled_out()
    with Load(gateway, image, rest_users=8) as load:
        up = wait_for(lambda: len(installed.ready_pods()) == 2, "second replica under load", 180)
        installed.upgrade("server.maxBatch=32")
        installed.rolled_out()
        assert len(installed.ready_pods()) == 2
    down = wait_for(lambda: len(installed.pods()) == 1, "scale down after the load", 180)
    check(load, "KEDA", f"1 to 2 replicas in {up:.0f} s, back in {down:.0f} s")
    installed.upgrade("scaling.type=none")
    installed.rolled_out()


def ends(cluster: Namespace) -> str:
    """What the predictor's containers said when they ended."""
    return " ".join(
        state.get("terminated", {}).get("message", "")
        for pod in cluster.pods()
        for container in pod["status"].get("containerStatuses", [])
        for state in (container.get("lastState", {}), container.get("state", {}))
    )


@pytest.mark.parametrize(
    ("folder", "enforce", "reason"),
    [
        ("damaged", False, "not a readable model archive"),
        ("2.0", True, "is unsigned"),
        ("altered", True, "is altered"),
    ],
)
def test_a_bad_archive_never_takes_over_and_says_why(
    installed: Namespace,
    gateway: Gateway,
    models: str,
    keys: KeyPair,
    image: bytes,
    *,
    folder: str,
    enforce: bool,
    reason: str,
) -> None:
    old = set(installed.ready_pods())
    policy = ["model.signature.policy=enforce"] if enforce else []
    files = ["--set-file", f"model.signature.publicKey={keys.public}"] if enforce else []
    with Load(gateway, image) as load:
        start = time.monotonic()
        installed.upgrade(f"model.storageUri={models}/{folder}", *policy, flags=files)
        wait_for(lambda: reason in ends(installed), f"'{reason}' in the pod's status")
        told = time.monotonic() - start
        assert old <= set(installed.ready_pods())
        installed.helm("rollback")
        installed.rolled_out()
    assert gateway.predict(image)["model_version"] == "1.0"
    check(load, f"bad archive ({reason})", f"reason in the status after {told:.0f} s")


def test_a_signed_archive_is_served_under_enforce(
    installed: Namespace, gateway: Gateway, models: str, keys: KeyPair, image: bytes
) -> None:
    installed.upgrade(
        f"model.storageUri={models}/signed",
        "model.signature.policy=enforce",
        flags=["--set-file", f"model.signature.publicKey={keys.public}"],
    )
    installed.rolled_out()
    wait_for(lambda: gateway.predict(image)["model_version"] == "2.0", "signed version", 60)
    installed.helm("rollback")
    installed.rolled_out()


def test_network_policy_lets_only_the_gateway_and_prometheus_in(installed: Namespace) -> None:
    """A pod in another namespace reaches no port, and TorchServe's are closed from anywhere."""
    address = installed.pods()[0]["status"]["podIP"]
    script = (
        "import socket\n"
        "for port in (8080, 8081, 8082, 7070, 7071, 8443):\n"
        "    try:\n"
        f"        socket.create_connection(('{address}', port), 2)\n"
        "        print(port, 'open')\n"
        "    except OSError:\n"
        "        print(port, 'closed')\n"
    )
    printed = run(
        "kubectl",
        "run",
        "intruder",
        "-n",
        "default",
        "--rm",
        "--attach",
        "--restart=Never",
        "--quiet",
        f"--image={setting('CXR_E2E_IMAGE', 'serving image')}",
        "--command",
        "--",
        "python",
        "-c",
        script,
    )
    assert printed.count("closed") == 6, printed
    report("network policy", "six ports tried from another namespace, all closed")


def test_uninstall_leaves_nothing(installed: Namespace) -> None:
    installed.helm("uninstall", "--wait")
    kinds = (
        "isvc,servingruntime,deploy,service,hpa,pdb,networkpolicy,serviceaccount,configmap,"
        "httproute,grpcroute,scaledobject,podmonitor,pod"
    )
    wait_for(lambda: leftovers(installed, kinds) == [], "empty namespace")
    report("uninstall", "nothing left")


def leftovers(cluster: Namespace, kinds: str) -> list[str]:
    """Names of what is there beside what Kubernetes puts into every namespace."""
    names = cluster.kubectl("get", kinds, "-o", "name").split("\n")
    own = ("serviceaccount/default", "configmap/kube-root-ca.crt", "")
    return [name for name in names if name not in own]
