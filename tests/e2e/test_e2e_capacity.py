"""The simulation against the cluster: the same load and scaler, replicas and p95 side by side.

The model waits for some 0.1 s in place of working, as if it ran on an accelerator: so a machine
with few cores can hold four honest replicas. Service, metrics, KEDA, HPA and gateway are the real
ones. The load rises and falls as that of a working day does. (After a sudden jump, p95 depends on
when the next scrape and the next decision come: docs/reliability.md.)
"""

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import boto3
import numpy as np
import pytest
import yaml

from cxr_loadtests.capacity import Case, measured_service
from cxr_loadtests.results import Result, load_result, pooled
from cxr_loadtests.simulation import simulate
from support.archives import before_each_batch, edited_archive
from support.bundles import encoded_image
from support.cluster import Gateway, Namespace, setting, wait_for
from support.figures import report
from support.loadtests import loadtest

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]

BUCKET = "cxr-e2e-capacity"
WAIT = "import random, time\ntime.sleep(0.1 * random.lognormvariate(0, 0.1))"
# Seconds and requests a second; one replica answers 9.5.
POINTS = [(0.0, 2.0), (20.0, 2.0), (320.0, 24.0), (360.0, 24.0), (380.0, 2.0), (400.0, 2.0)]
# A phase has one rate, so the curve is one of small steps.
STEP_SECONDS = 5.0
# Before the curve.
IDLE_SECONDS = 65.0
MEASUREMENTS = 2
SIMULATIONS = 20
SCALING: dict[str, Any] = {
    "metric": "inFlight",
    "target": 0.6,
    "min": 1,
    "max": 4,
    "window": 60,
    "scrape": 5,
    "interval": 5,
    "down_stabilization": 30,
}


def rate_at(now: float) -> float:
    return float(np.interp(now, *zip(*POINTS, strict=True)))


PROFILE: dict[str, Any] = {
    "timeout_seconds": 60,
    "images": [{"format": "jpeg", "height": 128, "count": 2}],
    "scenarios": {"rest-raw": 1},
    "think_time": {"median_seconds": 0},
    "shapes": {
        "steps": {
            "description": "one replica",
            "phases": [
                {
                    "name": str(users),
                    "users": users,
                    "seconds": 20,
                    "settle": 2,
                    "step": True,
                    "think": False,
                }
                for users in (1, 2, 3)
            ],
        },
        "busy": {
            "description": "while replicas start",
            "phases": [{"name": "busy", "rate": 8.0, "seconds": 90}],
        },
        "day": {
            "description": "a rise and a fall",
            "phases": [
                {
                    "name": f"{start:g} s",
                    "rate": rate_at(start + STEP_SECONDS / 2),
                    "seconds": STEP_SECONDS,
                }
                for start in np.arange(0.0, POINTS[-1][0], STEP_SECONDS)
            ],
        },
    },
}
LENIENT = {"objectives": [{"name": "any", "error_ratio": 1.0}]}


class Watch:
    """Replicas of the predictor, wanted and ready, with the time of each change."""

    def __init__(self, cluster: Namespace) -> None:
        columns = 'jsonpath={.spec.replicas} {.status.readyReplicas}{"\\n"}'
        self._process = subprocess.Popen(
            [
                *("kubectl", "-n", cluster.name, "get", "deploy", cluster.predictor),
                *("--watch", "-o", columns),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read)
        self.found: list[tuple[float, int, int]] = []

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            wanted, _, ready = line.strip().partition(" ")
            self.found.append((time.time(), int(wanted), int(ready or 0)))

    def __enter__(self) -> Self:
        self._thread.start()
        wait_for(lambda: self.found, "number of replicas")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()

    def first(self, place: int, count: int) -> float:
        """When so many were first wanted (1) or ready (2)."""
        return next(item[0] for item in self.found if item[place] >= count)

    def ready_at(self, moment: float) -> int:
        return [ready for at, _, ready in self.found if at <= moment][-1]


@pytest.fixture
def waiting(installed: Namespace, tmp_path: Path) -> Iterator[Path]:
    """The installation with a model that waits; its archive. Afterwards as before."""
    archive = edited_archive(tmp_path / "waits", lambda files: before_each_batch(files, WAIT))
    store = boto3.client("s3", endpoint_url=setting("CXR_E2E_S3_URL", "S3 server, from here"))
    if BUCKET not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
        store.create_bucket(Bucket=BUCKET)
    store.upload_file(str(archive), BUCKET, "waits/cxr.mar")
    before = json.loads(installed.helm("status", "-o", "json"))["version"]
    installed.upgrade(
        f"model.storageUri=s3://{BUCKET}/waits",
        "runtime=inprocess",
        "server.workers=1",
        "server.drainDelay=5",
        "monitoring.podMonitor.enabled=true",
        "monitoring.podMonitor.interval=5s",
    )
    installed.rolled_out()
    yield archive
    installed.helm("rollback", str(before))
    installed.rolled_out()


def test_the_simulation_predicts_what_the_cluster_does(
    installed: Namespace, gateway: Gateway, waiting: Path, tmp_path: Path
) -> None:
    drive = Drive(gateway, waiting, tmp_path)
    steps = drive.run("steps")
    service = measured_service(steps, 1)
    cold_start = cold_start_under_load(installed, drive)
    installed.upgrade(
        "scaling.type=keda",
        "scaling.minReplicas=1",
        "scaling.maxReplicas=4",
        f"scaling.scaleDownStabilizationSeconds={SCALING['down_stabilization']}",
        "scaling.keda.pollingInterval=5",
        "scaling.keda.fallbackReplicas=1",
        f"scaling.keda.serverAddress={setting('CXR_E2E_PROMETHEUS', 'in the cluster')}",
        # `--set` would make text of the number.
        flags=("--set-json", f"scaling.keda.inFlightPerReplica={SCALING['target']}"),
    )
    installed.rolled_out()
    replicas, latencies = [], []
    for _ in range(MEASUREMENTS):
        wait_for(lambda: len(installed.pods()) == 1, "one replica", 180)
        with Watch(installed) as watch:
            # Until nothing is in the metric's window.
            time.sleep(IDLE_SECONDS)
            result = drive.run("day")
        start, end = result.phases[0].start - IDLE_SECONDS, result.phases[-1].end
        counts = [watch.ready_at(at) for at in np.arange(start, end, 0.5)]
        figures = pooled(result.bins, end - start)
        assert not figures.failures
        replicas.append(float(np.mean(counts)))
        assert max(counts) == SCALING["max"]
        latencies.append(figures.percentile(0.95) or 0.0)
    case = Case.model_validate(
        {
            "seconds": end - start,
            # As it was: phases last a little longer than they should.
            "points": [
                (0.0, 0.0),
                (IDLE_SECONDS - 0.01, 0.0),
                *(
                    (at - start, phase.rate)
                    for phase in result.phases
                    for at in (phase.start, phase.end - 0.01)
                ),
            ],
            "scaling": SCALING | {"cold_start": cold_start},
        }
    )
    outcomes = [
        simulate(case.rate(), service, case.scaling, case.seconds, exact=True, seed=seed)
        for seed in range(SIMULATIONS)
    ]
    expected = float(np.mean([outcome.mean_ready for outcome in outcomes]))
    p95s = [outcome.percentile(0.95) for outcome in outcomes]
    report(
        "capacity",
        f"measured replicas {rounded(replicas)}, p95 {rounded(latencies)} s; simulated "
        f"{expected:.2f}, {np.mean(p95s):.3f} s ({min(p95s):.3f} to {max(p95s):.3f} s); cold start "
        f"{cold_start:.1f} s, {service.throughput:.1f}/s a replica",
    )
    record = os.environ.get("CXR_E2E_RECORD")
    if record:
        document = {
            "measured": {"replicas": replicas, "p95": latencies},
            "case": case.model_dump(mode="json"),
            "steps": steps.model_dump(mode="json"),
        }
        Path(record).write_text(json.dumps(document), encoding="utf-8")
    assert expected == pytest.approx(np.mean(replicas), rel=0.15)
    assert np.mean(p95s) == pytest.approx(np.mean(latencies), rel=0.15)


def rounded(figures: list[float]) -> str:
    return ", ".join(f"{figure:.3f}" for figure in figures)


class Drive:
    """`cxr loadtest run` with the profile above."""

    def __init__(self, gateway: Gateway, archive: Path, folder: Path) -> None:
        self._folder = folder
        (folder / "profile.yaml").write_text(yaml.safe_dump(PROFILE), encoding="utf-8")
        (folder / "objectives.yaml").write_text(yaml.safe_dump(LENIENT), encoding="utf-8")
        images = folder / "images"
        images.mkdir()
        (images / "a.png").write_bytes(encoded_image(90, (128, 120)))
        self._options = [
            f"--host=http://{gateway.address}",
            f"--host-header={gateway.host}",
            f"--archive={archive}",
            f"--profile={folder / 'profile.yaml'}",
            f"--objectives={folder / 'objectives.yaml'}",
            f"--images={images}",
        ]

    def run(self, shape: str) -> Result:
        out = Path(tempfile.mkdtemp(prefix=shape, dir=self._folder))
        done = loadtest("run", f"--shape={shape}", f"--out={out}", *self._options, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return load_result(out)


def cold_start_under_load(installed: Namespace, drive: Drive) -> float:
    """Seconds from the decision for one more replica to its readiness, on average of three."""
    with Watch(installed) as watch:
        load = threading.Thread(target=drive.run, args=("busy",))
        load.start()
        # Until the requests come.
        time.sleep(10)
        for count in (2, 3, 4):
            installed.upgrade(f"scaling.replicas={count}")
            wait_for(lambda count=count: watch.found[-1][2] == count, "one more replica", 180)
        load.join()
        took = [watch.first(2, count) - watch.first(1, count) for count in (2, 3, 4)]
    installed.upgrade("scaling.replicas=1")
    wait_for(lambda: len(installed.pods()) == 1, "one replica", 120)
    report("cold starts under load", ", ".join(f"{seconds:.1f} s" for seconds in took))
    return float(np.mean(took))
