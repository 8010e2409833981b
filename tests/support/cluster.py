"""A real cluster, through kubectl and helm, and a load on the service that runs in it."""

import json
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import grpc
import urllib3
from tritonclient.grpc import service_pb2, service_pb2_grpc

from support.charts import CHART


def run(*command: str, stdin: str | None = None, check: bool = True, timeout: float = 300) -> str:
    """Run a command; what it printed. A failure shows what it said."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, timeout=timeout
    )
    if check:
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def wait_for(
    condition: Callable[[], object], what: str, timeout: float = 120, *, every: float = 0.5
) -> float:
    """Wait until a condition holds; the seconds that it took."""
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        if condition():
            return time.monotonic() - start
        time.sleep(every)
    raise AssertionError(f"after {timeout:g} s: no {what}")


class Namespace:
    """One namespace, with a release of the chart in it."""

    def __init__(self, name: str, release: str = "cxr") -> None:
        self.name = name
        self.release = release
        self.service = f"{release}-cxr-serve"
        self.predictor = f"{self.service}-predictor"

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        return run("kubectl", "-n", self.name, *arguments, stdin=stdin, check=check)

    def execute(self, *command: str) -> str:
        """Run a command in a pod of the predictor; what it printed."""
        # Of a Deployment, kubectl may choose a pod that is ending.
        pod = self.pods()[0]["metadata"]["name"]
        return self.kubectl("exec", pod, "-c", "kserve-container", "--", *command)

    def get(self, *what: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.kubectl("get", *what, "-o", "json"))
        return answer

    def pods(self, deployment: str | None = None) -> list[dict[str, Any]]:
        """The pods of a predictor, those that end left out."""
        label = f"app=isvc.{deployment or self.predictor}"
        items: list[dict[str, Any]] = self.get("pods", "-l", label)["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def ready_pods(self, deployment: str | None = None) -> list[str]:
        return [
            pod["metadata"]["name"]
            for pod in self.pods(deployment)
            if any(
                condition["type"] == "Ready" and condition["status"] == "True"
                for condition in pod["status"].get("conditions", [])
            )
        ]

    def helm(self, command: str, *arguments: str, values: Sequence[str] = ()) -> str:
        chart = [str(CHART)] if command in ("install", "upgrade") else []
        settings = [word for value in values for word in ("--set", value)]
        return run("helm", "-n", self.name, command, self.release, *chart, *arguments, *settings)

    def upgrade(self, *values: str, flags: Sequence[str] = ()) -> None:
        self.helm("upgrade", "--reset-then-reuse-values", *flags, values=values)

    def rolled_out(self, timeout: int = 280) -> None:
        """Wait until every replica is of the newest revision and ready."""
        # KServe turns the InferenceService into a Deployment a moment later.
        time.sleep(2)
        said = self.kubectl(
            "rollout", "status", f"deploy/{self.predictor}", f"--timeout={timeout}s", check=False
        )
        if "successfully rolled out" not in said:
            pods = self.kubectl("describe", "pods", "-l", f"app=isvc.{self.predictor}")
            raise AssertionError(f"{said}\n{pods}")

    def events(self, pod: str) -> str:
        """What the cluster says of a pod."""
        return self.kubectl("get", "events", "--field-selector", f"involvedObject.name={pod}")


class Gateway:
    """The way in: one address, a host name for REST and one for gRPC."""

    def __init__(self, address: str, host: str, grpc_host: str) -> None:
        self.address = address
        self.host = host
        self.grpc_host = grpc_host
        self._pool = urllib3.PoolManager(maxsize=32, retries=False, timeout=30)

    def rest(
        self, path: str, body: bytes | None = None, **headers: str
    ) -> urllib3.BaseHTTPResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._pool.request(
            "POST" if body is not None else "GET",
            f"http://{self.address}{path}",
            body=body,
            headers={"Host": self.host, **named},
        )

    def predict(self, image: bytes, **headers: str) -> dict[str, Any]:
        """The answer to one image over REST; a failure is an AssertionError."""
        response = self.rest(
            "/v1/models/cxr:predict", image, content_type="application/octet-stream", **headers
        )
        assert response.status == 200, f"{response.status} {response.data[:200]!r}"
        answer: dict[str, Any] = response.json()
        return answer

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(
            self.address, options=[("grpc.default_authority", self.grpc_host)]
        )


def infer(channel: grpc.Channel, image: bytes) -> Any:
    """The answer to one image over gRPC."""
    request = service_pb2.ModelInferRequest(model_name="cxr")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(image)
    return service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)


def probe(targets: Iterable[tuple[str, int]]) -> str:
    """A program that tries to connect to these, and prints a line for each."""
    return (
        "import socket\n"
        f"for target in {list(targets)}:\n"
        "    try:\n"
        "        socket.create_connection(target, 2)\n"
        "        print(target, 'open')\n"
        "    except OSError:\n"
        "        print(target, 'closed')\n"
    )


def intrude(program: str, image: str, namespace: str = "default") -> str:
    """Run a Python program in another namespace; what it printed."""
    outside = ("kubectl", "-n", namespace)
    # Its log is read afterwards: an attached client can come too late for so short a run.
    command = ("--command", "--", "python", "-c", program)
    run(*outside, "run", "intruder", "--restart=Never", f"--image={image}", *command)
    try:
        done = "jsonpath={.status.phase}=Succeeded"
        run(*outside, "wait", f"--for={done}", "--timeout=120s", "pod/intruder")
        return run(*outside, "logs", "intruder")
    finally:
        run(*outside, "delete", "pod", "intruder", "--now")


class Load:
    """Clients that send requests without pause until the block ends, over REST and gRPC.

    Attributes:
        failures: what went wrong, in words; nothing is repeated.
        versions: answers by model version.
    """

    def __init__(
        self, gateway: Gateway, image: bytes, *, rest_users: int = 2, grpc_users: int = 1
    ) -> None:
        self.failures: list[str] = []
        self.versions: Counter[str] = Counter()
        self._gateway = gateway
        self._image = image
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._rest) for _ in range(rest_users)]
        self._threads += [threading.Thread(target=self._grpc) for _ in range(grpc_users)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def requests(self) -> int:
        return sum(self.versions.values()) + len(self.failures)

    def _rest(self) -> None:
        while not self._ended.wait(0.02):
            self._count(lambda: self._gateway.predict(self._image)["model_version"])

    def _grpc(self) -> None:
        with self._gateway.channel() as channel:
            while not self._ended.wait(0.02):
                self._count(lambda: infer(channel, self._image).model_version)

    def _count(self, ask: Callable[[], str]) -> None:
        try:
            self.versions[ask()] += 1
        except (AssertionError, urllib3.exceptions.HTTPError, grpc.RpcError) as error:
            self.failures.append(f"{time.strftime('%X')} {type(error).__name__}: {error}"[:300])


def setting(name: str, what: str) -> str:
    """A setting of the surroundings that these tests need."""
    value = os.environ.get(name)
    assert value, f"set {name}: {what}; CONTRIBUTING.md says how to run the end-to-end tests"
    return value
