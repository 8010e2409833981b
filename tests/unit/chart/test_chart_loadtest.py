"""The chart of a load test: what it renders, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Command, Group

from cxr_loadtests.cli import loadtest
from cxr_loadtests.profile import Profile
from support.charts import LOADTEST_CHART, Chart

HOST = "--set=target.host=http://traefik.traefik"
DEFAULTS = yaml.safe_load((LOADTEST_CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((LOADTEST_CHART / "values.schema.json").read_text(encoding="utf-8"))


def render(chart: Chart, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    done = chart.run("template", "load", str(LOADTEST_CHART), "-n", "imaging", *arguments)
    assert done.returncode == 0, done.stderr
    found = [item for item in yaml.safe_load_all(done.stdout) if item]
    return {(item["kind"], item["metadata"]["name"]): item for item in found}


def refusal(chart: Chart, *arguments: str) -> str:
    done = chart.run("template", "load", str(LOADTEST_CHART), *arguments)
    assert done.returncode != 0, done.stdout
    return done.stderr


def arguments_of(job: dict[str, Any]) -> list[str]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words: list[str] = container["args"]
    return words


def test_a_run_in_one_pod(chart: Chart) -> None:
    objects = render(chart, HOST)
    assert set(objects) == {("Job", "load-1"), ("NetworkPolicy", "load")}
    job = objects["Job", "load-1"]
    assert arguments_of(job) == [
        "loadtest",
        "run",
        "--host=http://traefik.traefik",
        "--model=cxr",
        "--shape=smoke",
        "--out=/results/load-1",
    ]
    assert job["spec"]["backoffLimit"] == 0
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["image"] == "cxr-loadtest:0.1.0"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert {volume["name"]: "emptyDir" in volume for volume in pod["volumes"]} == {
        "results": True,
        "tmp": True,
    }


def test_a_distributed_run_with_everything(chart: Chart) -> None:
    example = str(LOADTEST_CHART / "values" / "distributed.yaml")
    objects = render(
        chart, "-f", example, "--set=run.profile=a: 1,results.claim=kept,run.rate=12.5"
    )
    assert {kind for kind, _ in objects} == {"ConfigMap", "Job", "NetworkPolicy", "Service"}
    run, workers = objects["Job", "load-1"], objects["Job", "load-1-workers"]
    words = arguments_of(run)
    assert "--workers=4" in words
    assert '--selector=namespace="imaging"' in words
    assert "--upload=s3://loadtests/cxr/load-1" in words
    assert "--profile=/etc/loadtest/profile.yaml" in words
    assert "--rate=12.5" in words
    assert arguments_of(workers) == ["loadtest", "worker", "--master=load-1", "--port=5557"]
    assert workers["spec"]["parallelism"] == workers["spec"]["completions"] == 4
    # A worker's exit code where there is no master.
    (rule,) = workers["spec"]["podFailurePolicy"]["rules"]
    codes = {"containerName": "worker", "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    (worker,) = workers["spec"]["template"]["spec"]["containers"]
    assert worker["name"] == "worker"
    service = objects["Service", "load-1"]["spec"]
    labels = run["spec"]["template"]["metadata"]["labels"]
    own = {"batch.kubernetes.io/job-name": "load-1"}
    assert service["selector"].items() <= (labels | own).items()
    (container,) = run["spec"]["template"]["spec"]["containers"]
    assert {"name": "AWS_ENDPOINT_URL", "value": "http://minio.storage:9000"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "cxr-loadtest"}}]
    volumes = {volume["name"]: volume for volume in run["spec"]["template"]["spec"]["volumes"]}
    assert volumes["results"]["persistentVolumeClaim"] == {"claimName": "kept"}
    (rule,) = objects["NetworkPolicy", "load"]["spec"]["ingress"]
    allowed = rule["from"][0]["podSelector"]["matchLabels"]
    assert allowed.items() <= workers["spec"]["template"]["metadata"]["labels"].items()


def test_every_argument_is_one_of_the_command(chart: Chart) -> None:
    example = str(LOADTEST_CHART / "values" / "distributed.yaml")
    sets = "--set=run.profile=x,run.objectives=x,run.users=3,run.rate=1,run.seconds=9"
    objects = render(chart, "-f", example, sets, "--set=run.scenarios={grpc,dicom}")
    assert isinstance(loadtest, Group)
    for job, name in (("load-1", "run"), ("load-1-workers", "worker")):
        command: Command = loadtest.commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        words = arguments_of(objects["Job", job])[2:]
        assert {word.partition("=")[0] for word in words} <= options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "target.host"),
        (("--set=target.host=ftp://x",), "host"),
        ((HOST, "--set=targets.host=x"), "targets"),
        ((HOST, "--set=run.scenarios={telepathy}"), "scenarios"),
        ((HOST, "--set=workers=-1"), "workers"),
        ((HOST, "--set=run.rate=0"), "rate"),
        ((HOST, "--set=results.s3.uri=/tmp"), "uri"),
    ],
)
def test_bad_values_are_refused(chart: Chart, arguments: tuple[str, ...], words: str) -> None:
    assert words in refusal(chart, *arguments)


def test_the_chart_lints_clean(chart: Chart) -> None:
    for path in [None, *sorted(Path(LOADTEST_CHART).glob("values/*.yaml"))]:
        values = ["-f", str(path)] if path else [HOST]
        done = chart.run("lint", "--strict", str(LOADTEST_CHART), *values)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[WARNING]" not in done.stdout


def test_schema_and_defaults_have_the_same_names() -> None:
    def names(schema: dict[str, Any]) -> Any:
        if "properties" not in schema:
            return None
        assert schema["additionalProperties"] is False
        return {key: names(item) for key, item in schema["properties"].items() if key != "global"}

    def shape(schema: Any, values: Any) -> Any:
        if schema is None:
            return None
        assert schema.keys() == values.keys()
        return {key: shape(schema[key], values[key]) for key in schema}

    shape(names(SCHEMA), DEFAULTS)
    listed = SCHEMA["properties"]["run"]["properties"]["scenarios"]["items"]["enum"]
    known = Profile.model_json_schema()["properties"]["scenarios"]["propertyNames"]["enum"]
    assert listed == known
