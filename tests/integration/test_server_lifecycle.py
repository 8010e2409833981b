"""Start, failures and end of a server. Each test has a server of its own, which it may kill."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cxr_archive import packager
from cxr_server.settings import RuntimeName, available_cores
from support.archives import Edit, Files, before_each_batch, edited_archive
from support.bundles import encoded_image
from support.protocols import V1, V2, grpc_request, v1_body, v2_document
from support.servers import CXR, Server, alive, free_port, serving

# What is promised, in seconds.
NOT_READY_WITHIN = 5.0
EXIT_WITHIN = 30.0

IMAGE = encoded_image(70)
PNG = {"Content-Type": "image/png"}
either_runtime = pytest.mark.parametrize("runtime", RuntimeName)


@contextlib.contextmanager
def left_nothing(server: Server) -> Iterator[None]:
    """Afterwards, no process and no file of the server is left."""
    tree = server.tree()
    yield
    assert server.process.poll() is not None
    server.wait_for("no process left", lambda: not alive(tree), 5)
    assert list(server.folder.iterdir()) == []


def is_ready(rest: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{rest}/v2/health/ready", timeout=10).status_code == 200
    return False


@dataclass
class Load:
    """Clients that ask, one request after the other, until they are told to stop.

    Attributes:
        outcomes: what came back: HTTP and gRPC statuses, and failures of the transport.
    """

    server: Server
    images: Sequence[bytes] = (IMAGE,)
    outcomes: "Counter[str]" = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self, *, rest: int, grpc_clients: int) -> Iterator["Load"]:
        clients = [self._rest] * rest + [self._grpc] * grpc_clients
        threads = [threading.Thread(target=client) for client in clients]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def stop(self) -> None:
        self._stop.set()

    def wait_for_answers(self, count: int) -> None:
        """Until so many more requests were answered well."""
        wanted = self.answered + count
        self.server.wait_for("answers", lambda: self.answered >= wanted, 60)

    @property
    def answered(self) -> int:
        return self.outcomes["200"] + self.outcomes["OK"]

    @property
    def failures(self) -> dict[str, int]:
        return {key: count for key, count in self.outcomes.items() if key not in ("200", "OK")}

    def _rest(self) -> None:
        body = v1_body(self.images)
        with httpx.Client(base_url=self.server.rest, timeout=120) as client:
            while not self._stop.is_set():
                try:
                    outcome = str(client.post(V1, content=body).status_code)
                except httpx.TransportError as error:
                    outcome = type(error).__name__
                self.outcomes[outcome] += 1

    def _grpc(self) -> None:
        request = grpc_request(self.images)
        # Each client its own connection, as separate programs would have.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        with grpc.insecure_channel(self.server.grpc, options) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not self._stop.is_set():
                try:
                    stub.ModelInfer(request, timeout=120)
                    outcome = "OK"
                except grpc.RpcError as error:
                    outcome = error.code().name
                self.outcomes[outcome] += 1


class TestStart:
    @either_runtime
    def test_live_at_once_and_ready_with_the_model(
        self, tmp_path: Path, runtime: RuntimeName
    ) -> None:
        loading = tmp_path / "loading"
        loading.touch()

        def that_loads_slowly(files: Files) -> None:
            wait = f"""import pathlib, time
while pathlib.Path({str(loading)!r}).exists():
    time.sleep(0.05)
"""
            files[packager.HANDLER] = wait.encode() + files[packager.HANDLER]

        archive = edited_archive(tmp_path, that_loads_slowly)
        ports = free_port(), free_port(), free_port()
        names = ("--rest-port", "--grpc-port", "--metrics-port")
        options = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
        options += [f"--runtime={runtime}", "--workers=1", "--host=0.0.0.0"]
        rest, grpc_url = f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
        with serving(archive, *options, wait=False, free_ports=False) as server:
            server.wait_for("live", lambda: answers(f"{rest}/v2/health/live"), 30)

            assert httpx.get(f"{rest}/v2/health/ready").status_code == 503
            assert httpx.get(f"{rest}/v2/models/cxr/ready").status_code == 503
            for path, body in (
                (V1, v1_body([IMAGE])),
                (V2, json.dumps(v2_document([IMAGE])).encode()),
            ):
                answer = httpx.post(rest + path, content=body)
                assert answer.status_code == 503
                assert answer.headers["retry-after"] == "1"
                assert answer.json() == {"error": "The model is not ready; try again later."}
            answer = httpx.get(f"{rest}/v1/models/cxr")
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            with grpc.insecure_channel(grpc_url) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                assert stub.ServerLive(service_pb2.ServerLiveRequest(), wait_for_ready=True).live
                assert not stub.ServerReady(service_pb2.ServerReadyRequest()).ready
                assert not stub.ModelReady(service_pb2.ModelReadyRequest(name="cxr")).ready
                with pytest.raises(grpc.RpcError) as failure:
                    stub.ModelInfer(grpc_request([IMAGE]))
            assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "cxr_ready 0.0" in httpx.get(f"http://127.0.0.1:{ports[2]}/metrics").text
            assert server.stdout == "", "readiness was announced too early"

            loading.unlink()
            server.wait_ready()
            assert server.endpoints == {
                "event": "ready",
                "rest": f"http://0.0.0.0:{ports[0]}",
                "grpc": f"0.0.0.0:{ports[1]}",
                "metrics": f"http://0.0.0.0:{ports[2]}/metrics",
            }
            # The runtime's sockets are not among those that others can reach.
            assert listening(server) == {(server.pid, port) for port in ports}
            assert is_ready(rest)
            assert httpx.post(rest + V1, content=IMAGE, headers=PNG).status_code == 200
            (worker,) = server.workers()
            assert worker.environ()["CXR_WORKER_THREADS"] == str(available_cores())
            with left_nothing(server):
                server.process.send_signal(signal.SIGINT)
                assert server.wait_exit() == 0

    @either_runtime
    def test_sigterm_while_loading(self, archive: Path, runtime: RuntimeName) -> None:
        with serving(archive, f"--runtime={runtime}", wait=False) as server:
            server.wait_for("the runtime", server.left, 60)
            with left_nothing(server):
                assert server.terminate() == 0
            assert server.stdout == ""

    @pytest.mark.parametrize("option", ["--rest-port", "--grpc-port", "--metrics-port"])
    def test_port_taken(self, archive: Path, option: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with serving(archive, f"{option}={port}", wait=False) as server:
                assert server.wait_exit() == 1
                error = server.log.splitlines()[-1]
                assert re.fullmatch(rf"Error: Cannot listen on 127\.0\.0\.1:{port}.*\.", error)
                assert "Traceback" not in server.log
                assert list(server.folder.iterdir()) == []

    def test_damaged_archive(self, archive: Path, tmp_path: Path) -> None:
        """Refused before anything listens or runs."""
        data = bytearray(archive.read_bytes())
        data[len(data) // 2] ^= 0xFF
        damaged = tmp_path / "damaged.mar"
        damaged.write_bytes(data)
        for path, words in (
            (damaged, "damaged"),
            (tmp_path, "damaged"),
            (Path(__file__), "not a readable model archive"),
        ):
            done = subprocess.run(
                [CXR, "serve", str(path)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 1
            assert done.stdout == ""
            (line,) = done.stderr.splitlines()
            assert line.startswith("Error: ")
            assert words in line


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def with_another_input(files: Files) -> None:
    """A graph whose input has another name than the configuration says."""
    config = json.loads(files["cxr-model.json"])
    config["graph"]["input"]["name"] = "another"
    files["cxr-model.json"] = json.dumps(config).encode()


def with_missing_module(files: Files) -> None:
    """A handler that fails before its first line of its own runs."""
    files[packager.HANDLER] = b"import no_such_module\n" + files[packager.HANDLER]


class TestModelThatCannotBeLoaded:
    @either_runtime
    @pytest.mark.parametrize(
        ("edit", "reason"),
        [
            (with_another_input, "the configuration names another"),
            (with_missing_module, "No module named 'no_such_module'"),
        ],
        ids=["graph", "handler"],
    )
    def test_ends_with_the_reason(
        self, tmp_path: Path, edit: Edit, reason: str, runtime: RuntimeName
    ) -> None:
        start = time.monotonic()
        options = (f"--runtime={runtime}", "--workers=1")
        with serving(edited_archive(tmp_path, edit), *options, wait=False) as server:
            assert server.wait_exit(EXIT_WITHIN - (time.monotonic() - start)) == 1
            assert server.stdout == "", "it was never ready"
            assert reason in server.log
            assert "A worker could not load the model" in server.log.splitlines()[-1]
            server.wait_for("no process left", lambda: not server.left(), 5)
            assert list(server.folder.iterdir()) == []


@pytest.fixture(scope="class", params=RuntimeName)
def own(archive: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server for one class of tests."""
    with serving(archive, f"--runtime={request.param}", "--workers=2") as running:
        yield running


class TestWorkerKilled:
    def wait_for_both(self, own: Server, killed: Sequence[int]) -> None:
        """Until two workers are ready that are not the killed ones."""

        def replaced() -> bool:
            metrics = httpx.get(own.metrics).text
            pids = own.worker_pids()
            return (
                "cxr_workers_ready 2.0" in metrics
                and len(pids) == 2
                and not set(pids) & set(killed)
            )

        own.wait_for("two workers", replaced, 60)

    def test_one_of_two(self, own: Server) -> None:
        """Nobody notices: its request is given to another worker."""
        first, _ = own.worker_pids()
        with Load(own).running(rest=3, grpc_clients=2) as load:
            load.wait_for_answers(20)
            os.kill(first, signal.SIGKILL)
            load.wait_for_answers(20)
            assert is_ready(own.rest)
            self.wait_for_both(own, [first])
            load.wait_for_answers(20)
        assert load.failures == {}

    def test_all(self, own: Server) -> None:
        """Requests wait or are told to come back, and it gets ready again by itself."""
        killed = own.worker_pids()
        with Load(own).running(rest=3, grpc_clients=2) as load:
            load.wait_for_answers(20)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            self.wait_for_both(own, killed)
            own.wait_for("ready again", lambda: is_ready(own.rest), 30)
            load.wait_for_answers(20)
        assert set(load.failures) <= {"503", "UNAVAILABLE"}
        assert own.process.poll() is None
        own.wait_for(
            "each of the three killed workers in the metrics",
            lambda: "cxr_worker_restarts_total 3.0" in httpx.get(own.metrics).text,
            5,
        )

    def test_ends_as_ever(self, own: Server) -> None:
        with left_nothing(own):
            assert own.terminate() == 0


def with_traps(files: Files) -> None:
    """A handler that does not survive some images, as a bug in a decoder would have it."""
    before_each_batch(
        files,
        """import os, time
if b"die" in bodies:
    os._exit(1)
if b"raise" in bodies:
    raise KeyError("patient-4711")
if b"wait" in bodies:
    time.sleep(4)""",
    )


@pytest.fixture(scope="class", params=RuntimeName)
def trapped(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Server]:
    path = edited_archive(tmp_path_factory.mktemp("traps"), with_traps)
    options = ("--workers=2", "--request-timeout=3")
    with serving(path, f"--runtime={request.param}", *options) as running:
        yield running


class TestHandlerThatFails:
    def ask(self, server: Server, images: Sequence[bytes]) -> tuple[tuple[int, str], str]:
        """REST status and sentence, and gRPC status of the same request."""
        answer = httpx.post(server.rest + V1, content=v1_body(images), timeout=60)
        with grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as failure:
                stub.ModelInfer(grpc_request(images), timeout=60)
        assert failure.value.details() == answer.json()["error"]
        return (answer.status_code, answer.json()["error"]), failure.value.code().name

    def test_exception(self, trapped: Server) -> None:
        """No status that says: send it again."""
        rest, code = self.ask(trapped, [b"raise"])
        assert rest == (500, "The model failed twice on this image.")
        assert code == "INTERNAL"
        assert "patient-4711" not in trapped.log

    def test_too_slow(self, trapped: Server) -> None:
        rest, code = self.ask(trapped, [b"wait"])
        assert rest == (504, "There was no answer within 3 s; try again later.")
        assert code == "DEADLINE_EXCEEDED"

    def test_death(self, trapped: Server) -> None:
        """Two workers may die of one image, but no third; the service recovers."""
        answer = httpx.post(trapped.rest + V1, content=b"die", headers=PNG, timeout=60)
        assert answer.status_code == 500
        assert answer.json() == {"error": "The model failed twice on this image."}

        def answered() -> bool:
            answer = httpx.post(trapped.rest + V1, content=IMAGE, headers=PNG, timeout=60)
            assert answer.status_code in (200, 503, 504)
            return answer.status_code == 200

        trapped.wait_for("recovery", answered, 60)


def with_kills(files: Files) -> None:
    """Workers that are killed while they have an image: two, or every one."""
    before_each_batch(
        files,
        """import os, signal
from pathlib import Path
if b"deadly" in bodies:
    os.kill(os.getpid(), signal.SIGKILL)
mark = Path(f"killed-{len(list(Path().glob('killed-*')))}")
if b"unlucky" in bodies[0] and mark.name != "killed-2":
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)""",
    )


@pytest.fixture(scope="class")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three workers: two are killed at once, at most, so that one is always there."""
    path = edited_archive(tmp_path_factory.mktemp("kills"), with_kills)
    with serving(path, "--runtime=inprocess", "--workers=3") as running:
        yield running


class TestWorkerKilledWithAnImage:
    """By whom, nobody can tell: by an operator, or by the kernel for the memory that it takes."""

    def restarts(self, server: Server, count: int) -> None:
        server.wait_for(
            "restarts in the metrics",
            lambda: f"cxr_worker_restarts_total {count}.0" in httpx.get(server.metrics).text,
            60,
        )

    def test_twice_for_no_fault_of_the_image(self, killed: Server) -> None:
        """Two workers are killed, and it is answered by the next one that starts."""
        # What follows the end of a PNG file changes nothing.
        answer = httpx.post(killed.rest + V1, content=IMAGE + b"unlucky", headers=PNG, timeout=60)
        assert answer.status_code == 200
        self.restarts(killed, 2)

    def test_always(self, killed: Server) -> None:
        """Three are killed over it, and no fourth."""
        answer = httpx.post(killed.rest + V1, content=b"deadly", headers=PNG, timeout=60)
        assert answer.status_code == 500
        assert answer.json() == {"error": "Three workers were killed while they had this image."}
        self.restarts(killed, 5)
        answer = httpx.post(killed.rest + V1, content=IMAGE, headers=PNG, timeout=60)
        assert answer.status_code == 200


@either_runtime
def test_a_worker_whose_model_fails_for_good_is_replaced(
    tmp_path: Path, runtime: RuntimeName
) -> None:
    """As on a GPU that is lost: any image would get 500 from it for ever."""

    def with_a_loss(files: Files) -> None:
        mark = tmp_path / "lost"
        code = f"""from pathlib import Path
if b"lose" in bodies[0] and not Path({str(mark)!r}).exists():
    Path({str(mark)!r}).touch()
    self.engine._session = None"""
        before_each_batch(files, code)

    with serving(
        edited_archive(tmp_path, with_a_loss), f"--runtime={runtime}", "--workers=2"
    ) as running:
        # What follows the end of a PNG file changes nothing.
        images = [IMAGE + b"lose", *[IMAGE] * 20]
        codes = [
            httpx.post(running.rest + V1, content=image, headers=PNG, timeout=60).status_code
            for image in images
        ]
        assert codes == [200] * 21
        running.wait_for(
            "a new worker",
            lambda: (
                {"cxr_worker_restarts_total 1.0", "cxr_workers_ready 2.0"}
                <= set(httpx.get(running.metrics).text.splitlines())
            ),
            60,
        )
        assert "worker: the handler failed: AttributeError at cxr_handler.py:" in running.log


class TestTorchServeLost:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
    def test_ends_with_the_reason(self, archive: Path, number: signal.Signals) -> None:
        with serving(archive, "--workers=1") as server, left_nothing(server):
            rest = server.rest
            with Load(server).running(rest=2, grpc_clients=1) as load:
                load.wait_for_answers(10)
                lost = time.monotonic()
                server.java().send_signal(number)
                server.wait_for("not ready", lambda: not is_ready(rest), NOT_READY_WITHIN)
                load.stop()
                assert server.wait_exit(EXIT_WITHIN - (time.monotonic() - lost)) == 1
            reason = {
                signal.SIGKILL: "TorchServe ended by itself",
                signal.SIGSTOP: "TorchServe has not answered for",
            }[number]
            assert reason in server.log
            assert server.log.splitlines()[-1].startswith("Error: ")
            # Each client had an answer, or found nobody listening any more; a connection that was
            # kept open may close while the next request is on its way.
            gone = {"ConnectError", "RemoteProtocolError", "UNAVAILABLE"}
            assert set(load.failures) <= {"503", *gone}


class TestSigterm:
    @either_runtime
    def test_under_load(self, archive: Path, runtime: RuntimeName) -> None:
        """Not ready at once; every request that was sent is answered; exit code 0."""
        options = (f"--runtime={runtime}", "--workers=2", "--drain-delay=2")
        with serving(archive, *options) as server, left_nothing(server):
            rest = server.rest
            with Load(server).running(rest=4, grpc_clients=4) as load:
                load.wait_for_answers(40)
                server.process.send_signal(signal.SIGTERM)
                server.wait_for("not ready", lambda: not is_ready(rest), NOT_READY_WITHIN)
                # Clients that keep their connection are told to look for another server.
                assert httpx.get(f"{rest}/v2/health/live").headers["connection"] == "close"
                load.wait_for_answers(8)
                load.stop()
            assert load.failures == {}
            assert server.wait_exit() == 0

    @either_runtime
    def test_requests_longer_than_the_drain_delay(
        self, archive: Path, runtime: RuntimeName
    ) -> None:
        """Those in flight are answered although nobody else is let in any more."""
        buffer = BytesIO()
        Image.new("L", (5000, 5000), 90).save(buffer, "PNG")
        with (
            serving(archive, f"--runtime={runtime}", "--workers=1", "--drain-delay=0") as server,
            left_nothing(server),
        ):
            rest = server.rest
            load = Load(server, [buffer.getvalue()] * 6)
            with load.running(rest=2, grpc_clients=2):
                server.wait_for("requests", lambda: in_flight(server) == 4, 30)
                load.stop()
                server.process.send_signal(signal.SIGTERM)
                server.wait_for("closed", lambda: refuses(rest), 10)
                assert server.process.poll() is None
            assert load.outcomes == {"200": 2, "OK": 2}
            assert server.wait_exit() == 0


def in_flight(server: Server) -> float:
    match = re.search(
        r"^cxr_requests_in_flight (.*)$", httpx.get(server.metrics).text, re.MULTILINE
    )
    assert match
    return float(match[1])


def refuses(url: str) -> bool:
    try:
        httpx.get(url)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass
    return False


def listening(server: Server) -> set[tuple[int, int]]:
    """Processes and their ports that are open beyond loopback."""
    return {
        (process.pid, connection.laddr.port)
        for process in (psutil.Process(server.pid), *server.tree())
        for connection in process.connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.ip not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")
    }


class TestInside:
    """What can be seen of the shared servers' processes."""

    def test_nothing_listens_beyond_loopback_by_default(self, server: Server) -> None:
        assert listening(server) == set()

    @pytest.mark.parametrize("server", [RuntimeName.TORCHSERVE], indirect=True)
    def test_management_needs_a_token(self, server: Server) -> None:
        """TorchServe's gRPC ports cannot be turned off."""
        ports = [
            connection.laddr.port
            for connection in server.java().connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert ports
        calls = [
            f"/org.pytorch.serve.grpc.management.ManagementAPIsService/{method}"
            for method in ("ListModels", "DescribeModel", "RegisterModel", "UnregisterModel")
        ]
        calls.append("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
        refused = Counter(call(port, method) for port in ports for method in calls)
        # A port knows the methods of its own API only.
        assert set(refused) == {"PERMISSION_DENIED", "UNIMPLEMENTED"}
        assert refused["PERMISSION_DENIED"] == len(calls)

    def test_files_are_private(self, server: Server) -> None:
        """Sockets and tokens of TorchServe are in there."""
        (folder,) = server.folder.glob("cxr-*")
        assert folder.stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize("server", [RuntimeName.INPROCESS], indirect=True)
    def test_workers_have_cores_of_their_own(self, server: Server) -> None:
        """Where there are enough for all, as in the container that this may run in."""
        cores = [worker.cpu_affinity() for worker in server.workers()]
        everything = sorted(os.sched_getaffinity(0))
        if available_cores() == len(everything) >= 2:
            assert not set(cores[0]) & set(cores[1])
        else:
            assert cores == [everything, everything]

    def test_threads_are_limited(self, server: Server) -> None:
        expected = str(max(1, available_cores() // 2))
        workers = server.workers()
        assert len(workers) == 2
        for worker in workers:
            environment = worker.environ()
            assert environment["CXR_WORKER_THREADS"] == expected
            assert environment["OMP_NUM_THREADS"] == expected


def test_grpc_clients_connect_anew_and_lose_no_call(archive: Path) -> None:
    """So that clients which spread their calls find new replicas."""
    states = []
    with (
        serving(archive, "--runtime=inprocess", "--workers=1", "--connection-age=1") as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        channel.subscribe(states.append)
        ask = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert ask(grpc_request([IMAGE]), timeout=20).model_name == "cxr"
    assert states.count(grpc.ChannelConnectivity.READY) >= 3


def call(port: int, method: str) -> str:
    """The status of a gRPC call without a token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            # Field 1, the model's name, is the same in each of these requests.
            channel.unary_unary(method)(b"\x0a\x03cxr", timeout=20)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"
