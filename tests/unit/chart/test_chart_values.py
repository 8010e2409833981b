"""What the chart accepts and refuses, and its reference."""

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.charts import CHART, Chart

EXAMPLES = sorted(CHART.glob("values/*.yaml"))
LINT_VALUES = sorted(CHART.glob("ci/*-values.yaml"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
# Every cluster has it; `helm template` by itself does not know it.
A_CLUSTER = ("--api-versions", "apiregistration.k8s.io/v1")
GATEWAY = (
    "--set=routing.type=gateway,routing.host=cxr.example.org,routing.gateway.parentRefs[0].name=gw"
)

Values = Callable[[dict[str, Any]], tuple[str, str]]


def name(path: Path) -> str:
    return path.stem


def test_every_promised_example_is_there() -> None:
    assert {path.stem for path in EXAMPLES} == {
        "cpu-small",
        "gpu",
        "canary",
        "keda-scale-to-zero",
        "pvc",
        "production",
        "portal",
    }


@pytest.mark.parametrize("path", [*EXAMPLES, *LINT_VALUES], ids=name)
def test_examples_render_and_lint_clean(chart: Chart, path: Path) -> None:
    objects = chart.objects("-f", str(path), with_storage=False)
    assert {kind for kind, _ in objects} >= {"InferenceService", "ServingRuntime", "Pod"}
    done = chart.run("lint", "--strict", str(CHART), "-f", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def leaves(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix


def lookup(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def test_the_lint_values_exercise_every_option() -> None:
    given = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in LINT_VALUES]
    untouched = [
        path
        for path in leaves(DEFAULTS)
        if all(lookup(values, path) in (None, lookup(DEFAULTS, path)) for values in given)
    ]
    assert untouched == []


def objects_of(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if "properties" in schema:
        yield path, schema
        for key, item in schema["properties"].items():
            yield from objects_of(item, f"{path}.{key}" if path else key)


def test_the_schema_knows_every_value_and_describes_it() -> None:
    known = dict(objects_of(SCHEMA))
    assert known[""]["properties"].keys() > DEFAULTS.keys()
    for path, schema in known.items():
        assert schema["additionalProperties"] is False, path
        for key, item in schema["properties"].items():
            assert item.get("description", "").endswith("."), f"{path}.{key}"
        if path:
            assert schema["properties"].keys() == lookup(DEFAULTS, path).keys(), path


def test_the_reference_is_current() -> None:
    module = runpy.run_path(str(CHART / "ci" / "values_page.py"))
    assert module["PAGE"].read_text(encoding="utf-8") == module["page"](), (
        "run .venv/bin/python charts/cxr-serve/ci/values_page.py"
    )


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("replicass=2", "replicass"),
        ("scaling.maxReplica=2", "maxReplica"),
        ("server.requestTimeouts=2", "requestTimeouts"),
        ("networkPolicy.gatewayPeers[0].namespaceSelctor.x=y", "namespaceSelctor"),
        ("routing.gateway.parentRefs[0].name=a,routing.gateway.parentRefs[0].nam=b", "nam"),
    ],
)
def test_a_misspelt_key_is_refused_by_its_name(chart: Chart, setting: str, key: str) -> None:
    message = chart.refusal("--set", setting)
    assert key in message
    assert "not allowed" in message


@pytest.mark.parametrize(
    "setting",
    [
        "model.storageUri=models",
        "model.signature.policy=strict",
        "model.guards.policy=maybe",
        "canary.weight=101",
        "scaling.type=knative",
        "image.pullPolicy=Sometimes",
        "image.digest=sha256:12",
        "server.requestTimeout=0",
        "server.workers=0",
        "runtime=triton",
        "scaling.replicas=0",
        "tracing.samplingRatio=1.5",
        "tracing.endpoint=collector:4318",
        "resources.limits.cpu=null",  # KServe would set one by itself
    ],
)
def test_values_that_cannot_be_meant_are_refused(chart: Chart, setting: str) -> None:
    assert setting.split("=", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1] in chart.refusal(
        "--set", setting
    )


def test_global_is_left_to_parent_charts(chart: Chart) -> None:
    assert chart.text("--set", "global.imageRegistry=registry.example.org")


@pytest.mark.parametrize("key", sorted(SCHEMA["properties"].keys() - DEFAULTS.keys() - {"global"}))
def test_settings_that_would_be_ignored_are_refused_with_advice(chart: Chart, key: str) -> None:
    advice = SCHEMA["properties"][key]["description"].removeprefix("Refused: ")
    assert f"{key}: {advice}" in chart.refusal("--set", f"{key}=10")


@pytest.mark.parametrize(
    ("annotation", "way_out"),
    [
        ("autoscaling.knative.dev/target", "scaling"),
        ("serving.kserve.io/autoscalerClass", "scaling.type"),
        ("serving.kserve.io/deploymentMode", "Standard"),
    ],
)
def test_annotations_that_would_be_ignored_are_refused(
    chart: Chart, values: Values, annotation: str, way_out: str
) -> None:
    message = chart.refusal(*values({"annotations": {annotation: "x"}}))
    assert annotation in message
    assert way_out in message


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ("scaling.type=keda", "scaling.keda.serverAddress"),
        ("scaling.type=hpa,scaling.minReplicas=5", "scaling.maxReplicas"),
        (
            "scaling.type=keda,scaling.keda.serverAddress=http://p,scaling.keda.scaleToZero=true",
            "scaling.keda.extraTriggers",
        ),
        (
            "scaling.type=keda,scaling.keda.serverAddress=http://p,scaling.keda.metric=queue,"
            "scaling.keda.query=sum(x)",
            "scaling.keda.metric",
        ),
        ("routing.type=gateway", "routing.host"),
        ("routing.type=gateway,routing.host=a.org", "routing.gateway.parentRefs"),
        ("routing.type=ingress,routing.host=a.org", "networkPolicy.gatewayPeers"),
        ("routing.host=a.org,routing.grpcHost=a.org", "routing.grpcHost"),
        ("canary.enabled=true,canary.storageUri=s3://b", "routing.type: gateway"),
        ("server.env[0].name=CXR_WORKERS", "CXR_WORKERS"),
        ("model.credentialsSecret=s,serviceAccount.create=false", "model.credentialsSecret"),
        ("model.signature.policy=enforce", "model.signature.publicKey"),
        ("tracing.enabled=true", "tracing.endpoint"),
        ("rollout.maxSurge=0", "rollout.maxUnavailable: 1"),
        ("rollout.maxSurge=0%,rollout.maxUnavailable=0%", "rollout.maxUnavailable: 1"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(chart: Chart, settings: str, advice: str) -> None:
    assert advice in chart.refusal("--set", settings)


def test_a_canary_that_is_the_same_is_refused(chart: Chart) -> None:
    assert "canary.storageUri" in chart.refusal(GATEWAY, "--set", "canary.enabled=true")


def test_the_archive_must_be_named(chart: Chart) -> None:
    assert "model.storageUri: say where" in chart.refusal(with_storage=False)


@pytest.mark.parametrize(
    ("settings", "missing", "advice"),
    [
        ("labels.a=b", "serving.kserve.io/v1beta1/InferenceService", "KServe"),
        ("labels.a=b", "serving.kserve.io/v1alpha1/ServingRuntime", "KServe"),
        (
            "scaling.type=keda,scaling.keda.serverAddress=http://p",
            "keda.sh/v1alpha1/ScaledObject",
            "scaling.type: hpa",
        ),
        (GATEWAY[6:], "gateway.networking.k8s.io/v1/HTTPRoute", "routing.type: ingress"),
        (
            f"{GATEWAY[6:]},routing.grpcHost=g.org",
            "gateway.networking.k8s.io/v1/GRPCRoute",
            "routing.grpcHost",
        ),
        (
            "monitoring.podMonitor.enabled=true",
            "monitoring.coreos.com/v1/PodMonitor",
            "monitoring.podMonitor.enabled: false",
        ),
    ],
)
def test_what_the_cluster_lacks_is_named(
    chart: Chart, settings: str, missing: str, advice: str
) -> None:
    needed = [
        "serving.kserve.io/v1beta1/InferenceService",
        "serving.kserve.io/v1alpha1/ServingRuntime",
        "keda.sh/v1alpha1/ScaledObject",
        "gateway.networking.k8s.io/v1/HTTPRoute",
        "gateway.networking.k8s.io/v1/GRPCRoute",
        "monitoring.coreos.com/v1/PodMonitor",
    ]
    assert chart.text("--set", settings), "without a cluster nothing is asked"
    there = [f"--api-versions={api}" for api in needed]
    assert chart.text("--set", settings, *A_CLUSTER, *there)
    there.remove(f"--api-versions={missing}")
    message = chart.refusal("--set", settings, *A_CLUSTER, *there)
    assert missing in message
    assert advice in message
