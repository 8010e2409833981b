"""What the chart makes of its values, as its user would notice it."""

import ast
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cxr_server.cli import serve
from cxr_server.settings import GRPC_PORT, METRICS_PORT, REST_PORT, Settings
from support.charts import CHART, Chart, Objects

NAME = "cxr-cxr-serve"
CANARY = f"{NAME}-canary"
ROUTED = ("-f", str(CHART / "values" / "cpu-small.yaml"))
KEDA = ("--set", "scaling.type=keda,scaling.keda.serverAddress=http://prometheus:9090")
LINT = ("-f", str(CHART / "ci" / "lint-values.yaml"))

Values = Callable[[dict[str, Any]], tuple[str, str]]


def runtime(objects: Objects) -> dict[str, Any]:
    (container,) = objects["ServingRuntime", NAME]["spec"]["containers"]
    return container


def predictor(objects: Objects, name: str = NAME) -> dict[str, Any]:
    spec: dict[str, Any] = objects["InferenceService", name]["spec"]["predictor"]
    return spec


def environment(objects: Objects, name: str = NAME) -> dict[str, str]:
    return {item["name"]: item.get("value") for item in predictor(objects, name)["model"]["env"]}


def pod_specs(objects: Objects) -> list[dict[str, Any]]:
    """Pods that the chart makes by itself."""
    found = [item["spec"] for (kind, _), item in objects.items() if kind == "Pod"]
    for (kind, _), item in objects.items():
        if kind == "DaemonSet":
            found.append(item["spec"]["template"]["spec"])
    return found


def test_the_ports_are_the_servers(chart: Chart) -> None:
    ports = runtime(chart.objects())["ports"]
    assert [(port["name"], port["containerPort"]) for port in ports] == [
        ("http", REST_PORT),
        ("grpc", GRPC_PORT),
        ("metrics", METRICS_PORT),
    ]


def test_the_defaults_that_the_chart_must_know_are_the_servers(chart: Chart) -> None:
    settings = environment(chart.objects())
    assert float(settings["CXR_REQUEST_TIMEOUT"]) == Settings().request_timeout
    assert float(settings["CXR_STARTUP_TIMEOUT"]) == Settings().startup_timeout
    assert settings["CXR_RUNTIME"] == Settings().runtime
    assert settings["CXR_QUALITY_POLICY"] == Settings().quality_policy


def test_every_setting_reaches_the_server_by_a_name_that_it_knows(chart: Chart) -> None:
    known = {f"CXR_{option.name.upper()}" for option in serve.params if option.name}
    settings = environment(chart.objects(*LINT), "chest-service")
    ours = {name: value for name, value in settings.items() if name.startswith("CXR_")}
    assert ours.keys() <= known
    assert ours == {
        "CXR_RUNTIME": "inprocess",
        "CXR_QUALITY_POLICY": "refuse",
        "CXR_REQUEST_TIMEOUT": "20.5",
        "CXR_STARTUP_TIMEOUT": "90",
        "CXR_DRAIN_DELAY": "7",
        "CXR_GRACE_PERIOD": "20.5",
        "CXR_WORKERS": "3",
        "CXR_MAX_BATCH": "8",
        "CXR_MAX_QUEUE": "200",
        "CXR_MAX_IMAGE_BYTES": "50000000",  # not 5e+07
        "CXR_MAX_IMAGE_PIXELS": "100000000",
        "CXR_LOG_FORMAT": "text",
        "CXR_ACCESS_LOG": "false",
        "CXR_TRACING": "true",
        "CXR_VERBOSE": "true",
        "CXR_SIGNATURE_POLICY": "enforce",
        "CXR_VERIFY_KEY": "/etc/cxr/verify/key.pem",
    }
    assert settings["TZ"] == "UTC"


def test_the_public_key_is_mounted_where_the_server_looks(chart: Chart) -> None:
    objects = chart.objects(*LINT)
    predictor = objects["InferenceService", "chest-service"]["spec"]["predictor"]
    (volume,) = predictor["volumes"]
    (mount,) = predictor["model"]["volumeMounts"]
    key = objects["ConfigMap", volume["configMap"]["name"]]
    assert mount["name"] == volume["name"]
    assert f"{mount['mountPath']}/{next(iter(key['data']))}" == "/etc/cxr/verify/key.pem"
    assert "BEGIN PUBLIC KEY" in key["data"]["key.pem"]


def test_probes_ask_the_health_endpoints(chart: Chart) -> None:
    container = runtime(chart.objects())
    ready = {"path": "/v2/health/ready", "port": REST_PORT}
    assert container["startupProbe"]["httpGet"] == ready
    assert container["readinessProbe"]["httpGet"] == ready
    assert container["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": REST_PORT}


@pytest.mark.parametrize("startup", [1, 180, 900])
def test_the_startup_probe_outlives_the_servers_own_timeout(chart: Chart, startup: float) -> None:
    objects = chart.objects("--set", f"server.startupTimeout={startup}")
    probe = runtime(objects)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > startup


@pytest.mark.parametrize(("drain", "request_"), [(10, 60), (0, 1), (20, 600)])
def test_the_longest_request_may_end(chart: Chart, drain: float, request_: float) -> None:
    objects = chart.objects(
        *ROUTED, "--set", f"server.drainDelay={drain},server.requestTimeout={request_}"
    )
    grace = predictor(objects)["terminationGracePeriodSeconds"]
    # TorchServe gets ten seconds to stop after that.
    assert grace >= math.ceil(drain) + math.ceil(request_) + 10
    assert float(environment(objects)["CXR_GRACE_PERIOD"]) >= request_
    for rule in objects["HTTPRoute", NAME]["spec"]["rules"]:
        assert int(rule["timeouts"]["request"].removesuffix("s")) > request_


def autoscaler_class(objects: Objects, name: str = NAME) -> str:
    annotations = objects["InferenceService", name]["metadata"]["annotations"]
    found: str = annotations["serving.kserve.io/autoscalerClass"]
    return found


def test_it_is_a_standard_deployment_without_a_route_of_kserves(chart: Chart) -> None:
    service = chart.objects()["InferenceService", NAME]
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Standard"
    assert service["metadata"]["labels"]["networking.kserve.io/visibility"] == "cluster-local"
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == NAME
    assert model["storageUri"] == "s3://models/cxr/1.0"
    (model_format,) = chart.objects()["ServingRuntime", NAME]["spec"]["supportedModelFormats"]
    assert model_format["name"] == model["modelFormat"]["name"]
    assert not model_format["autoSelect"]


def test_nothing_versioned_restarts_the_pods(chart: Chart) -> None:
    labels = chart.objects()["InferenceService", NAME]["metadata"]["labels"]
    assert not labels.keys() & {"helm.sh/chart", "app.kubernetes.io/version"}


def test_pods_pass_the_restricted_standard(chart: Chart) -> None:
    objects = chart.objects("--set", "image.prepull=true")
    pods = pod_specs(objects)
    assert len(pods) == 2
    for pod in [predictor(objects), *pods]:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
    containers = [container for pod in pods for container in pod["containers"]]
    for container in [runtime(objects), *containers]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }


def test_only_tmp_can_be_written(chart: Chart) -> None:
    objects = chart.objects()
    assert runtime(objects)["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108
    assert objects["ServingRuntime", NAME]["spec"]["volumes"] == [
        {"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}}
    ]


@pytest.mark.parametrize(
    ("settings", "image"),
    [
        ("image.repository=a/b", "a/b:0.1.0"),
        ("image.repository=a/b,image.tag=v7", "a/b:v7"),
        (
            f"image.repository=a/b,image.tag=v7,image.digest=sha256:{64 * '0'}",
            f"@sha256:{64 * '0'}",
        ),
    ],
)
def test_one_image_everywhere(chart: Chart, settings: str, image: str) -> None:
    objects = chart.objects("--set", f"image.prepull=true,{settings}")
    containers = [container for pod in pod_specs(objects) for container in pod["containers"]]
    images = {
        item["image"] for item in [runtime(objects), predictor(objects)["model"], *containers]
    }
    assert len(images) == 1
    assert images.pop().endswith(image)


def test_credentials_go_through_the_service_account(chart: Chart) -> None:
    objects = chart.objects("--set", "model.credentialsSecret=storage")
    account = objects["ServiceAccount", NAME]
    assert account["secrets"] == [{"name": "storage"}]
    assert account["automountServiceAccountToken"] is False
    assert predictor(objects)["serviceAccountName"] == NAME


def test_without_autoscaler_the_replicas_are_fixed(chart: Chart) -> None:
    objects = chart.objects("--set", "scaling.replicas=3")
    # With "external" KServe 0.20 would ignore minReplicas.
    assert autoscaler_class(objects) == "none"
    assert predictor(objects)["minReplicas"] == 3
    assert not {"HorizontalPodAutoscaler", "ScaledObject"} & {kind for kind, _ in objects}


def test_hpa_scales_the_predictors_deployment(chart: Chart) -> None:
    objects = chart.objects("--set", "scaling.type=hpa,scaling.maxReplicas=6")
    spec = objects["HorizontalPodAutoscaler", NAME]["spec"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": f"{NAME}-predictor",
    }
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 6)
    assert autoscaler_class(objects) == "external"
    assert "minReplicas" not in predictor(objects)


def test_keda_scales_by_requests_in_flight(chart: Chart) -> None:
    objects = chart.objects(*KEDA, "--set-json", "scaling.keda.inFlightPerReplica=2.5")
    spec = objects["ScaledObject", NAME]["spec"]
    assert spec["scaleTargetRef"] == {"name": f"{NAME}-predictor"}
    assert "idleReplicaCount" not in spec
    assert spec["fallback"] == {"failureThreshold": 3, "replicas": 2}
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "prometheus"
    metadata = trigger["metadata"]
    assert metadata["serverAddress"] == "http://prometheus:9090"
    assert metadata["threshold"] == "2.5"
    assert metadata["ignoreNullValues"] == "false"
    assert 'namespace="imaging"' in metadata["query"]
    pods = re.search(r'pod=~"([^"]*)"', metadata["query"])
    assert pods is not None
    assert re.fullmatch(pods[1], f"{NAME}-predictor-5d8-x7")
    assert not re.fullmatch(pods[1], f"{CANARY}-predictor-5d8-x7")
    assert autoscaler_class(objects) == "external"
    assert "minReplicas" not in predictor(objects)


def test_keda_scales_by_waiting_images_or_by_a_query(chart: Chart) -> None:
    def trigger(*settings: str) -> dict[str, str]:
        objects = chart.objects(*KEDA, *settings)
        (only,) = objects["ScaledObject", NAME]["spec"]["triggers"]
        metadata: dict[str, str] = only["metadata"]
        return metadata

    queue = trigger("--set", "scaling.keda.metric=queue,scaling.keda.queuedPerReplica=3")
    assert "cxr_images_queued{" in queue["query"]
    assert queue["threshold"] == "3"
    own = trigger("--set", "scaling.keda.query=sum(x),scaling.keda.inFlightPerReplica=7")
    assert (own["query"], own["threshold"]) == ("sum(x)", "7")


@pytest.mark.parametrize("signal", ["inFlight", "queue"])
def test_keda_asks_for_a_metric_that_the_server_has(chart: Chart, signal: str) -> None:
    source = Path(__file__).parents[3] / "server" / "cxr_server" / "metrics.py"
    constants = {
        node.value
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
    }
    objects = chart.objects(*KEDA, "--set", f"scaling.keda.metric={signal}")
    (trigger,) = objects["ScaledObject", NAME]["spec"]["triggers"]
    metric = re.search(r"cxr_\w+", trigger["metadata"]["query"])
    assert metric is not None
    assert metric[0] in constants


def test_scale_to_zero(chart: Chart) -> None:
    path = CHART / "values" / "keda-scale-to-zero.yaml"
    spec = chart.objects("-f", str(path))["ScaledObject", NAME]["spec"]
    assert spec["idleReplicaCount"] == 0
    assert spec["minReplicaCount"] == 1
    assert [trigger["type"] for trigger in spec["triggers"]] == ["prometheus", "cron", "prometheus"]
    assert spec["triggers"][0]["metadata"]["ignoreNullValues"] == "true"


def test_routes_lead_to_kserves_service(chart: Chart) -> None:
    objects = chart.objects(*ROUTED)
    for kind, host, port in (
        ("HTTPRoute", "cxr.example.org", 80),
        ("GRPCRoute", "grpc.cxr.example.org", GRPC_PORT),
    ):
        spec = objects[kind, NAME]["spec"]
        assert spec["parentRefs"] == [{"name": "traefik", "namespace": "traefik"}]
        assert spec["hostnames"] == [host]
        (rule,) = spec["rules"]
        assert rule["backendRefs"] == [{"name": f"{NAME}-predictor", "port": port}]


def test_grpc_has_no_route_without_a_host_name(chart: Chart) -> None:
    objects = chart.objects(*ROUTED, "--set", "routing.grpcHost=")
    assert ("GRPCRoute", NAME) not in objects


def test_ingress_instead_of_the_gateway_api(chart: Chart) -> None:
    objects = chart.objects("-f", str(CHART / "values" / "pvc.yaml"))
    rest, grpc = objects["Ingress", NAME], objects["Ingress", f"{NAME}-grpc"]
    for ingress, host, port in (
        (rest, "cxr.example.org", 80),
        (grpc, "grpc.cxr.example.org", GRPC_PORT),
    ):
        (rule,) = ingress["spec"]["rules"]
        assert rule["host"] == host
        (path,) = rule["http"]["paths"]
        assert path["backend"]["service"] == {"name": f"{NAME}-predictor", "port": {"number": port}}
        # cert-manager asks for one certificate, with the names of whichever comes first.
        hosts = ["cxr.example.org", "grpc.cxr.example.org"]
        assert ingress["spec"]["tls"] == [{"hosts": hosts, "secretName": "cxr-tls"}]
    backend = "nginx.ingress.kubernetes.io/backend-protocol"
    assert grpc["metadata"]["annotations"][backend] == "GRPC"
    assert backend not in rest["metadata"]["annotations"]
    assert not {"HTTPRoute", "GRPCRoute"} & {kind for kind, _ in objects}


@pytest.mark.parametrize("weight", [0, 10, 100])
def test_the_canary_gets_its_share_and_its_header(chart: Chart, weight: int) -> None:
    path = CHART / "values" / "canary.yaml"
    objects = chart.objects(
        "-f", str(path), "--set", f"canary.weight={weight},canary.image.tag=v9", with_storage=False
    )
    for kind, port in (("HTTPRoute", 80), ("GRPCRoute", GRPC_PORT)):
        chosen, split = objects[kind, NAME]["spec"]["rules"]
        assert chosen["matches"] == [{"headers": [{"name": "x-cxr-track", "value": "canary"}]}]
        assert chosen["backendRefs"] == [{"name": f"{CANARY}-predictor", "port": port}]
        assert {item["name"]: item["weight"] for item in split["backendRefs"]} == {
            f"{NAME}-predictor": 100 - weight,
            f"{CANARY}-predictor": weight,
        }
    stable, canary = predictor(objects)["model"], predictor(objects, CANARY)["model"]
    assert (stable["storageUri"], stable["image"]) == ("s3://models/cxr/1.0", "cxr-serve:0.1.0")
    assert (canary["storageUri"], canary["image"]) == ("s3://models/cxr/2.0", "cxr-serve:v9")
    assert canary["runtime"] == NAME
    assert autoscaler_class(objects, CANARY) == "none"
    assert ("PodDisruptionBudget", CANARY) in objects
    assert ("Pod", f"{CANARY}-test") in objects


def test_the_canary_of_an_image_with_a_digest(chart: Chart) -> None:
    objects = chart.objects(
        *ROUTED, "--set", f"image.digest=sha256:{64 * '0'},canary.enabled=true,canary.image.tag=v9"
    )
    assert predictor(objects)["model"]["image"].endswith(f"@sha256:{64 * '0'}")
    assert predictor(objects, CANARY)["model"]["image"] == "cxr-serve:v9"


def gateway_peers(objects: Objects) -> list[dict[str, Any]]:
    first = objects["NetworkPolicy", NAME]["spec"]["ingress"][0]
    peers: list[dict[str, Any]] = first["from"]
    return peers


def test_only_gateway_prometheus_and_helm_test_get_in(chart: Chart) -> None:
    requests, metrics = chart.objects(*ROUTED)["NetworkPolicy", NAME]["spec"]["ingress"]
    gateway, test = requests["from"]
    assert gateway == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "traefik"}}
    }
    assert test["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert [port["port"] for port in requests["ports"]] == [REST_PORT, GRPC_PORT]
    assert metrics["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]
    assert [port["port"] for port in metrics["ports"]] == [METRICS_PORT]


def test_named_peers_replace_the_gateways_namespace(chart: Chart, values: Values) -> None:
    peer = {"podSelector": {"matchLabels": {"app": "envoy"}}}
    objects = chart.objects(*ROUTED, *values({"networkPolicy": {"gatewayPeers": [peer]}}))
    assert gateway_peers(objects)[0] == peer
    assert len(gateway_peers(objects)) == 2


def test_without_a_route_nobody_but_helm_test_may_ask(chart: Chart) -> None:
    (peer,) = gateway_peers(chart.objects())
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"


def test_only_dns_and_storage_are_let_out(chart: Chart) -> None:
    spec = chart.objects()["NetworkPolicy", NAME]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    dns, storage = spec["egress"]
    assert [(port["port"], port["protocol"]) for port in dns["ports"]] == [(53, "UDP"), (53, "TCP")]
    assert dns["to"]
    assert storage == {"ports": [{"port": 443, "protocol": "TCP"}]}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector.monitoring:4318", 4318),
        ("https://collector.example.org/otlp", 443),
        ("http://collector", 80),
    ],
)
def test_traces_are_let_out_to_the_collector(
    chart: Chart, values: Values, endpoint: str, port: int
) -> None:
    given = values({"tracing": {"enabled": True, "endpoint": endpoint, "samplingRatio": 0.25}})
    objects = chart.objects(*given)
    settings = environment(objects)
    assert settings["CXR_TRACING"] == "true"
    assert settings["OTEL_EXPORTER_OTLP_ENDPOINT"] == endpoint
    assert settings["OTEL_TRACES_SAMPLER"] == "parentbased_traceidratio"
    assert settings["OTEL_TRACES_SAMPLER_ARG"] == "0.25"
    assert settings["OTEL_SERVICE_NAME"] == NAME
    assert settings["OTEL_RESOURCE_ATTRIBUTES"] == "k8s.namespace.name=imaging"
    *_, way_out = objects["NetworkPolicy", NAME]["spec"]["egress"]
    assert way_out == {"ports": [{"port": port, "protocol": "TCP"}]}
    peer = {"ipBlock": {"cidr": "203.0.113.7/32"}}
    named = ("--set-json", f"networkPolicy.tracingPeers=[{json.dumps(peer)}]")
    *_, way_out = chart.objects(*given, *named)["NetworkPolicy", NAME]["spec"]["egress"]
    assert way_out == {"ports": [{"port": port, "protocol": "TCP"}], "to": [peer]}
    # The pods' own, where a Service has another one.
    named = ("--set", "networkPolicy.tracingPorts={14318}")
    *_, way_out = chart.objects(*given, *named)["NetworkPolicy", NAME]["spec"]["egress"]
    assert way_out == {"ports": [{"port": 14318, "protocol": "TCP"}]}


def test_without_tracing_nothing_of_it_is_set(chart: Chart) -> None:
    assert not [name for name in environment(chart.objects()) if name.startswith("OTEL_")]


def test_a_volume_needs_no_way_out(chart: Chart) -> None:
    objects = chart.objects("--set", "model.storageUri=pvc://claim/cxr")
    (dns,) = objects["NetworkPolicy", NAME]["spec"]["egress"]
    assert dns["ports"][0]["port"] == 53


def test_the_policies_hold_for_every_predictor(chart: Chart) -> None:
    (selector,) = chart.objects()["NetworkPolicy", NAME]["spec"]["podSelector"]["matchExpressions"]
    assert selector == {
        "key": "serving.kserve.io/inferenceservice",
        "operator": "In",
        "values": [NAME, CANARY],
    }


def test_gpu(chart: Chart) -> None:
    objects = chart.objects("-f", str(CHART / "values" / "gpu.yaml"))
    resources = predictor(objects)["model"]["resources"]
    assert resources["limits"] == {"cpu": "4", "memory": "6Gi", "nvidia.com/gpu": "1"}
    assert resources["requests"] == {"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": "1"}
    assert predictor(objects)["deploymentStrategy"]["rollingUpdate"] == {
        "maxSurge": 0,
        "maxUnavailable": 1,
    }
    assert "shared-memory" in {mount["name"] for mount in runtime(objects)["volumeMounts"]}
    assert predictor(objects)["tolerations"][0]["key"] == "nvidia.com/gpu"
    # Where the predictor can run, the image is pulled before.
    prepull = objects["DaemonSet", f"{NAME}-prepull"]["spec"]["template"]["spec"]
    for key in ("tolerations", "nodeSelector"):
        assert prepull[key] == predictor(objects)[key]


def test_a_mig_slice_has_its_own_name(chart: Chart) -> None:
    objects = chart.objects("--set", r"gpu.enabled=true,gpu.resource=nvidia.com/mig-1g\.10gb")
    limits = predictor(objects)["model"]["resources"]["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == "1"
    assert "nvidia.com/gpu" not in limits


def test_autoscalers_and_budgets_keep_away_from_kserves_names(chart: Chart) -> None:
    objects = chart.objects(*KEDA)
    assert ("PodDisruptionBudget", NAME) in objects
    assert not [name for kind, name in objects if name.endswith("-predictor")]


def test_spread_looks_at_its_own_pods(chart: Chart) -> None:
    (spread,) = predictor(chart.objects())["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": NAME}


def test_long_names_stay_within_kubernetes_limits(chart: Chart) -> None:
    objects = chart.objects(
        *ROUTED,
        "--set",
        f"fullnameOverride={50 * 'a'},canary.enabled=true",
        "--set",
        "canary.storageUri=s3://b",
    )
    for kind, name in objects:
        longest = f"{name}-predictor-0123456789" if kind == "InferenceService" else name
        assert len(longest) <= 63, (kind, name)


def test_the_test_pods_script_is_python(chart: Chart) -> None:
    (pod,) = (spec for spec in pod_specs(chart.objects()) if "hold" not in spec["containers"][0])
    (container,) = pod["containers"]
    script, host, rest, grpc = container["args"]
    assert ast.parse(script)
    assert (host, rest, grpc) == (f"{NAME}-predictor.imaging", "80", str(GRPC_PORT))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ["port-forward", "/v1/models"]),
        (ROUTED, ["http://cxr.example.org/v1/models", "grpc.cxr.example.org"]),
        (("-f", str(CHART / "values" / "pvc.yaml")), ["https://cxr.example.org/v1/models"]),
        (
            ("-f", str(CHART / "values" / "canary.yaml")),
            ["x-cxr-track: canary", "0 % of the requests go to the canary"],
        ),
        (("-f", str(CHART / "values" / "keda-scale-to-zero.yaml")), ["503"]),
    ],
)
def test_notes_tell_the_first_request(
    chart: Chart, arguments: tuple[str, ...], said: list[str]
) -> None:
    notes = chart.notes(*arguments)
    for text in [*said, f"isvc/{NAME}", "helm -n imaging test cxr"]:
        assert text in notes


def test_the_sample_without_helm_is_the_charts_container(chart: Chart) -> None:
    path = CHART.parents[1] / "k8s" / "samples" / "inferenceservice.yaml"
    sample, service = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    objects = chart.objects()
    assert sample["spec"] == objects["ServingRuntime", NAME]["spec"]
    ours = predictor(objects)
    for key in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert service["spec"]["predictor"][key] == ours[key]
    assert service["spec"]["predictor"]["model"]["resources"] == ours["model"]["resources"]
    # With the server's own drain delay and grace period, which the sample leaves as they are.
    needed = Settings().drain_delay + Settings().grace_period + 10
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] >= needed


def test_the_image_announces_the_servers_ports() -> None:
    dockerfile = (CHART.parents[1] / "server" / "Dockerfile").read_text(encoding="utf-8")
    assert f"EXPOSE {REST_PORT} {GRPC_PORT} {METRICS_PORT}\n" in dockerfile
