"""The chart's portal, as its user would notice it."""

import ast
from collections.abc import Callable
from typing import Any

import click
import pytest

from cxr_portal.cli import run
from cxr_portal.settings import METRICS_PORT, PORT, Settings
from cxr_server.settings import GRPC_PORT
from support.charts import CHART, Chart, Objects

SERVICE = "cxr-cxr-serve"
NAME = f"{SERVICE}-portal"
ON = ("--set", "portal.enabled=true")
ROUTED = ("-f", str(CHART / "values" / "cpu-small.yaml"), *ON, "--set", "portal.host=p.example.org")
EXAMPLE = ("-f", str(CHART / "values" / "portal.yaml"))
LINT = ("-f", str(CHART / "ci" / "lint-values.yaml"))
INGRESS = ("-f", str(CHART / "ci" / "ingress-values.yaml"))
SELECTOR = {
    "app.kubernetes.io/name": "cxr-serve",
    "app.kubernetes.io/instance": "cxr",
    "app.kubernetes.io/component": "portal",
}

Values = Callable[[dict[str, Any]], tuple[str, str]]


def pod(objects: Objects, name: str = NAME) -> dict[str, Any]:
    spec: dict[str, Any] = objects["Deployment", name]["spec"]["template"]["spec"]
    return spec


def container(objects: Objects, name: str = NAME) -> dict[str, Any]:
    (only,) = pod(objects, name)["containers"]
    found: dict[str, Any] = only
    return found


def environment(objects: Objects, name: str = NAME) -> dict[str, Any]:
    return {item["name"]: item.get("value") for item in container(objects, name)["env"]}


def test_without_being_asked_for_there_is_none(chart: Chart) -> None:
    assert "portal" not in chart.text()
    (requests, _) = chart.objects()["NetworkPolicy", SERVICE]["spec"]["ingress"]
    assert GRPC_PORT in [port["port"] for port in requests["ports"]]


def test_it_brings_only_objects_of_its_own(chart: Chart) -> None:
    before, after = chart.objects(), chart.objects(*ON)
    assert {key for key in after if key not in before} == {
        ("Deployment", NAME),
        ("Service", NAME),
        ("Service", f"{NAME}-model"),
        ("ServiceAccount", NAME),
        ("PersistentVolumeClaim", NAME),
        ("PodDisruptionBudget", NAME),
        ("NetworkPolicy", NAME),
        ("Pod", f"{NAME}-test"),
    }
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {("NetworkPolicy", SERVICE)}


def test_the_ports_are_the_portals(chart: Chart) -> None:
    objects = chart.objects(*ON)
    assert [(port["name"], port["containerPort"]) for port in container(objects)["ports"]] == [
        ("http", PORT),
        ("metrics", METRICS_PORT),
    ]
    service = objects["Service", NAME]["spec"]
    assert service["selector"] == SELECTOR
    assert objects["Deployment", NAME]["spec"]["selector"]["matchLabels"] == SELECTOR
    assert service["ports"] == [
        {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}
    ]


def test_every_setting_reaches_the_portal_by_a_name_that_it_knows(chart: Chart) -> None:
    known = {f"CXR_PORTAL_{option.name.upper()}" for option in run.params if option.name}
    settings = environment(chart.objects(*LINT), "chest-service-portal")
    ours = {name: value for name, value in settings.items() if name.startswith("CXR_")}
    assert ours.keys() <= known
    assert ours == {
        "CXR_PORTAL_DATABASE": None,  # from a Secret
        "CXR_PORTAL_RATE_STORAGE": None,  # likewise
        "CXR_PORTAL_SERVER": f"dns:///chest-service-portal-model.imaging:{GRPC_PORT}",
        "CXR_PORTAL_MODEL": "chest",
        "CXR_PORTAL_TIMEOUT": "20.5",
        "CXR_PORTAL_DRAIN_DELAY": "7",
        "CXR_PORTAL_MAX_IMAGE_BYTES": "50000000",  # not 5e+07
        "CXR_PORTAL_ALLOWED_HOSTS": "portal.example.org chest-service-portal "
        "chest-service-portal.imaging chest-service-portal.imaging.svc localhost 127.0.0.1 "
        "portal.internal.example.org",
        "CXR_PORTAL_CORS_ORIGINS": "https://viewer.example.org http://127.0.0.1:3000",
        "CXR_PORTAL_AUTH": "none",
        "CXR_PORTAL_OIDC_ISSUER": "https://login.example.org/realms/imaging",
        "CXR_PORTAL_OIDC_AUDIENCE": "portal",
        "CXR_PORTAL_OIDC_JWKS": "https://keys.example.org:8443/jwks",
        "CXR_PORTAL_IMAGES_PER_MINUTE": "60",
        "CXR_PORTAL_MAX_IMAGES": "8",
        "CXR_PORTAL_MAX_JOB_IMAGES": "500",
        "CXR_PORTAL_MAX_ACTIVE_JOBS": "2",
        "CXR_PORTAL_MAX_IN_FLIGHT": "32",
        "CXR_PORTAL_JOB_WORKERS": "0",
        "CXR_PORTAL_RETENTION_HOURS": "1.5",
        "CXR_PORTAL_LOG_FORMAT": "text",
        "CXR_PORTAL_TRACING": "true",
    }
    assert settings["OTEL_SERVICE_NAME"] == "chest-service-portal"
    assert settings["OTEL_TRACES_SAMPLER_ARG"] == "0.5"
    assert settings["PGSSLMODE"] == "verify-full"


@pytest.mark.parametrize("arguments", [ON, EXAMPLE, LINT, INGRESS])
def test_the_portal_takes_these_settings(
    chart: Chart, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """As it would when it starts, the check of each by itself and of all together."""
    objects = chart.objects(*arguments)
    (name,) = (name for kind, name in objects if kind == "Deployment")
    for key, value in environment(objects, name).items():
        monkeypatch.setenv(key, value or "postgresql://user:secret@host/name")
    context: click.Context = run.make_context("run", ["--host", "0.0.0.0"])  # noqa: S104
    assert "localhost" in context.params["allowed_hosts"]
    if arguments is ON:
        defaults = Settings()
        assert context.params["max_images"] == defaults.max_images
        assert context.params["retention_hours"] * 3600 == defaults.retention.total_seconds()
        assert context.params["auth"] == defaults.auth


def test_no_secret_stands_in_the_values(chart: Chart) -> None:
    objects = chart.objects(*EXAMPLE, "--set", "portal.rateStorage.secret=limits")
    secrets = {
        item["name"]: item["valueFrom"]["secretKeyRef"]
        for item in container(objects)["env"]
        if "valueFrom" in item
    }
    assert secrets == {
        "CXR_PORTAL_DATABASE": {"name": "cxr-portal-database", "key": "url"},
        "CXR_PORTAL_RATE_STORAGE": {"name": "limits", "key": "url"},
    }
    assert "Secret" not in {kind for kind, _ in objects}


def test_it_finds_every_replica_of_the_first_predictor(chart: Chart) -> None:
    objects = chart.objects(*ON)
    service = objects["Service", f"{NAME}-model"]["spec"]
    assert service["clusterIP"] == "None"
    assert service["selector"] == {"serving.kserve.io/inferenceservice": SERVICE}
    assert service["ports"][0]["port"] == service["ports"][0]["targetPort"] == GRPC_PORT


def test_probes_ask_the_health_endpoints_by_a_name_that_is_allowed(chart: Chart) -> None:
    objects = chart.objects(*ROUTED)
    probes = container(objects)
    for probe, path in (
        ("startupProbe", "/health/ready"),
        ("readinessProbe", "/health/ready"),
        ("livenessProbe", "/health/live"),
    ):
        get = probes[probe]["httpGet"]
        assert (get["path"], get["port"]) == (path, "http")
        (host,) = get["httpHeaders"]
        assert host["name"] == "Host"
        assert host["value"] in environment(objects)["CXR_PORTAL_ALLOWED_HOSTS"].split()


@pytest.mark.parametrize(("drain", "request_"), [(10, 60), (2.5, 0.5), (0, 600)])
def test_it_may_end_in_order(chart: Chart, drain: float, request_: float) -> None:
    objects = chart.objects(
        *ON, "--set-json", f"server.drainDelay={drain},server.requestTimeout={request_}"
    )
    given = environment(objects)
    assert float(given["CXR_PORTAL_DRAIN_DELAY"]) == drain
    settings = Settings(timeout=float(given["CXR_PORTAL_TIMEOUT"]))
    assert settings.grace > request_
    # Five seconds for traces, and some for jobs.
    assert pod(objects)["terminationGracePeriodSeconds"] >= drain + settings.grace + 8


@pytest.mark.parametrize("arguments", [ON, EXAMPLE])
def test_pods_pass_the_restricted_standard(chart: Chart, arguments: tuple[str, ...]) -> None:
    objects = chart.objects(*arguments)
    for spec in (pod(objects), objects["Pod", f"{NAME}-test"]["spec"]):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        # A Service named cxr-portal would set CXR_PORTAL_PORT.
        assert spec["enableServiceLinks"] is False
        (only,) = spec["containers"]
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert only["resources"]["limits"]["memory"]
    assert pod(objects)["serviceAccountName"] == NAME


def test_sqlite_is_on_a_volume_that_one_process_has(chart: Chart) -> None:
    objects = chart.objects(*ON)
    deployment = objects["Deployment", NAME]["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}
    folder = {mount["name"]: mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    assert set(folder) == {"tmp", "database"}
    url = environment(objects)["CXR_PORTAL_DATABASE"]
    assert url.startswith(f"sqlite:///{folder['database']}/")
    volumes = {volume["name"]: volume for volume in pod(objects)["volumes"]}
    assert volumes["database"]["persistentVolumeClaim"] == {"claimName": NAME}
    assert volumes["tmp"]["emptyDir"] == {"sizeLimit": "2Gi"}
    assert pod(objects)["securityContext"]["fsGroup"] == 65532
    claim = objects["PersistentVolumeClaim", NAME]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "5Gi"}},
    }
    # A rollback to a release without the portal keeps its keys.
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_a_claim_of_ones_own(chart: Chart) -> None:
    objects = chart.objects(*INGRESS)
    assert "PersistentVolumeClaim" not in {kind for kind, _ in objects}
    (claim,) = (
        volume["persistentVolumeClaim"]
        for volume in pod(objects)["volumes"]
        if "persistentVolumeClaim" in volume
    )
    assert claim == {"claimName": "portal"}
    named = chart.objects(
        *ON, "--set", "portal.database.volume.storageClassName=fast,portal.database.volume.size=9Gi"
    )["PersistentVolumeClaim", NAME]["spec"]
    assert named["storageClassName"] == "fast"
    assert named["resources"] == {"requests": {"storage": "9Gi"}}


def test_an_authority_for_the_databases_certificate(chart: Chart) -> None:
    objects = chart.objects(*EXAMPLE, "--set", "portal.database.caSecret=authority")
    (mount,) = (
        mount
        for mount in container(objects)["volumeMounts"]
        if environment(objects)["PGSSLROOTCERT"] == f"{mount['mountPath']}/ca.crt"
    )
    assert mount["readOnly"]
    volumes = {volume["name"]: volume for volume in pod(objects)["volumes"]}
    assert volumes[mount["name"]]["secret"] == {
        "secretName": "authority",
        "items": [{"key": "ca.crt", "path": "ca.crt"}],
    }
    assert "PGSSLROOTCERT" not in environment(
        chart.objects(*ON, "--set", "portal.database.caSecret=authority")
    )


def test_on_postgresql_there_are_many(chart: Chart) -> None:
    objects = chart.objects(*EXAMPLE)
    deployment = objects["Deployment", NAME]["spec"]
    # Else an upgrade would reset what the autoscaler has chosen.
    assert "replicas" not in deployment
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "PersistentVolumeClaim" not in {kind for kind, _ in objects}
    assert "fsGroup" not in pod(objects)["securityContext"]
    assert "PGSSLROOTCERT" not in environment(objects)
    spec = objects["HorizontalPodAutoscaler", NAME]["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 6)
    (spread,) = pod(objects)["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == SELECTOR
    fixed = chart.objects(*ON, "--set", "portal.database.secret=s,portal.replicas=3")
    assert fixed["Deployment", NAME]["spec"]["replicas"] == 3
    assert ("HorizontalPodAutoscaler", NAME) not in fixed


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ("portal.replicas=2", "portal.database.secret"),
        ("portal.scaling.enabled=true", "portal.database.secret"),
        (
            "portal.database.secret=s,portal.scaling.enabled=true,portal.scaling.minReplicas=9",
            "portal.scaling.maxReplicas",
        ),
        (
            "portal.database.secret=s,portal.scaling.enabled=true,portal.resources.requests=null",
            "portal.resources.requests.cpu",
        ),
        (
            "routing.type=gateway,routing.host=a.org,routing.gateway.parentRefs[0].name=g",
            "portal.host",
        ),
        ("routing.host=a.org,portal.host=a.org", "must differ"),
        ("routing.grpcHost=a.org,portal.host=a.org", "must differ"),
        ("portal.auth.oidc.issuer=https://a.org", "go together"),
        ("portal.auth.oidc.audience=a", "go together"),
        ("portal.auth.oidc.jwksUrl=https://a.org", "portal.auth.oidc.issuer"),
        ("portal.env[0].name=CXR_PORTAL_PORT", "CXR_PORTAL_PORT"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(chart: Chart, settings: str, advice: str) -> None:
    assert advice in chart.refusal(*ON, "--set", settings)
    # What is not deployed need not be whole.
    if settings.startswith("portal."):
        assert chart.text("--set", settings)


@pytest.mark.parametrize(
    "setting",
    [
        "portal.host=*.example.org",
        "portal.replicas=0",
        "portal.auth.policy=maybe",
        "portal.auth.oidc.issuer=http://login.example.org",
        "portal.corsOrigins={https://a.org/path}",
        "portal.limits.maxImages=65",
        "portal.limits.jobWorkers=-1",
        "portal.retentionHours=0",
        "portal.database.port=0",
        "portal.tmpSize=much",
    ],
)
def test_values_that_cannot_be_meant_are_refused(chart: Chart, setting: str) -> None:
    assert setting.split("=", maxsplit=1)[0].rsplit(".", maxsplit=1)[-1] in chart.refusal(
        *ON, "--set", setting
    )


def test_a_route_on_its_own_host(chart: Chart) -> None:
    spec = chart.objects(*ROUTED)["HTTPRoute", NAME]["spec"]
    assert spec["parentRefs"] == [{"name": "traefik", "namespace": "traefik"}]
    assert spec["hostnames"] == ["p.example.org"]
    (rule,) = spec["rules"]
    assert rule["backendRefs"] == [{"name": NAME, "port": 80}]
    # The events of a job have no end of their own.
    assert rule["timeouts"] == {"request": "0s"}
    assert "p.example.org" in environment(chart.objects(*ROUTED))["CXR_PORTAL_ALLOWED_HOSTS"]


def test_ingress_instead_of_the_gateway_api(chart: Chart) -> None:
    objects = chart.objects(*INGRESS)
    ingress = objects["Ingress", NAME]
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] == "portal.example.org"
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": NAME, "port": {"name": "http"}}
    assert ingress["spec"]["ingressClassName"] == "nginx"
    hosts = ["rest.example.org", "grpc.example.org", "portal.example.org"]
    tls = [{"hosts": hosts, "secretName": "tls"}]
    assert ingress["spec"]["tls"] == objects["Ingress", SERVICE]["spec"]["tls"] == tls
    assert ingress["metadata"]["annotations"] == {"a": "d"}
    assert objects["Ingress", SERVICE]["metadata"]["annotations"] == {"a": "b"}
    assert "HTTPRoute" not in {kind for kind, _ in objects}
    assert pod(objects)["serviceAccountName"] == "default"


def test_gateway_prometheus_and_helm_test_get_in(chart: Chart) -> None:
    policy = chart.objects(*ROUTED)["NetworkPolicy", NAME]["spec"]
    assert policy["podSelector"] == {"matchLabels": SELECTOR}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    requests, metrics = policy["ingress"]
    gateway, test = requests["from"]
    assert gateway == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "traefik"}}
    }
    assert test["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert requests["ports"] == [{"port": PORT, "protocol": "TCP"}]
    assert metrics["ports"] == [{"port": METRICS_PORT, "protocol": "TCP"}]


def test_only_dns_and_the_predictor_are_let_out(chart: Chart) -> None:
    objects = chart.objects(*ON)
    dns, model = objects["NetworkPolicy", NAME]["spec"]["egress"]
    assert dns["ports"][0]["port"] == 53
    predictor = {"podSelector": {"matchLabels": {"serving.kserve.io/inferenceservice": SERVICE}}}
    assert model == {"to": [predictor], "ports": [{"port": GRPC_PORT, "protocol": "TCP"}]}
    # And the predictor lets it in, to gRPC only.
    way_in = objects["NetworkPolicy", SERVICE]["spec"]["ingress"][1]
    assert way_in == {
        "from": [{"podSelector": {"matchLabels": SELECTOR}}],
        "ports": [{"port": GRPC_PORT, "protocol": "TCP"}],
    }


def test_what_it_needs_is_let_out(chart: Chart, values: Values) -> None:
    _, _, database, limits, issuer, traces = chart.objects(*LINT)[
        "NetworkPolicy", "chest-service-portal"
    ]["spec"]["egress"]
    assert database["ports"] == [{"port": 6432, "protocol": "TCP"}]
    assert database["to"] == [{"ipBlock": {"cidr": "203.0.113.8/32"}}]
    assert limits["ports"] == [{"port": 6380, "protocol": "TCP"}]
    assert limits["to"] == [{"ipBlock": {"cidr": "203.0.113.10/32"}}]
    assert [port["port"] for port in issuer["ports"]] == [8443]
    assert issuer["to"] == [{"ipBlock": {"cidr": "203.0.113.9/32"}}]
    assert traces["to"] == [{"ipBlock": {"cidr": "203.0.113.7/32"}}]
    # Without ports, those of the issuer's URL and of its keys'.
    urls = chart.objects(*LINT, "--set-json", "networkPolicy.oidcPorts=[]")
    *_, issuer, _ = urls["NetworkPolicy", "chest-service-portal"]["spec"]["egress"]
    assert [port["port"] for port in issuer["ports"]] == [443, 8443]
    given = values({"portal": {"database": {"secret": "s"}}})
    (*_, database) = chart.objects(*ON, *given)["NetworkPolicy", NAME]["spec"]["egress"]
    assert database == {"ports": [{"port": 5432, "protocol": "TCP"}]}


def test_prometheus_tells_it_from_the_predictor(chart: Chart) -> None:
    monitor = chart.objects(*ON, "--set", "monitoring.podMonitor.enabled=true")
    spec = monitor["PodMonitor", NAME]["spec"]
    assert spec["selector"] == {"matchLabels": SELECTOR}
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    assert endpoint["relabelings"] == [{"targetLabel": "service", "replacement": NAME}]


@pytest.mark.parametrize(
    ("settings", "image"),
    [
        ("portal.image.repository=a/b", "a/b:0.1.0"),
        ("portal.image.repository=a/b,portal.image.tag=v7", "a/b:v7"),
        (f"portal.image.digest=sha256:{64 * '0'}", f"cxr-portal@sha256:{64 * '0'}"),
    ],
)
def test_one_image_everywhere(chart: Chart, settings: str, image: str) -> None:
    objects = chart.objects(*ON, "--set", f"image.pullPolicy=Never,{settings}")
    (test,) = objects["Pod", f"{NAME}-test"]["spec"]["containers"]
    for found in (test, container(objects)):
        assert found["image"] == image
        assert found["imagePullPolicy"] == "Never"


def test_the_test_pods_script_is_python(chart: Chart) -> None:
    (container,) = chart.objects(*ON)["Pod", f"{NAME}-test"]["spec"]["containers"]
    script, base, policy = container["args"]
    assert ast.parse(script)
    assert (base, policy) == (f"http://{NAME}.imaging", "required")


def test_long_names_stay_within_kubernetes_limits(chart: Chart) -> None:
    objects = chart.objects(*ROUTED, "--set", f"fullnameOverride={50 * 'a'}")
    for kind, name in objects:
        longest = f"{name}-0123456789" if kind == "Deployment" else name
        assert len(longest) <= 63, (kind, name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (ON, ["port-forward svc/", f"claim {NAME}, which stays when the release goes"]),
        (ROUTED, ["The portal is at p.example.org"]),
    ],
)
def test_notes_tell_the_first_key(
    chart: Chart, arguments: tuple[str, ...], said: list[str]
) -> None:
    notes = chart.notes(*arguments)
    for text in [*said, f"exec deploy/{NAME} -- cxr portal keys create"]:
        assert text in notes
    assert "portal" not in chart.notes()


def test_the_image_announces_the_portals_ports() -> None:
    dockerfile = (CHART.parents[1] / "portal" / "Dockerfile").read_text(encoding="utf-8")
    assert f"EXPOSE {PORT} {METRICS_PORT}\n" in dockerfile
    assert "USER 65532:65532" in dockerfile
