"""A worker process of the in-process runtime: runs an archive's own handler.

usage: python -P worker.py DESCRIPTOR SHARED CORE,..., in the folder of an unpacked archive

It stands in for TorchServe's worker, with as much of its contract as a handler of ours needs. The
archive comes first on the path: its own copy of `cxr` runs, which it was tested with, whatever is
installed here. So this file imports only the standard library.

Messages, in both directions: the length of a JSON object in four bytes, that object, and then as
many bytes as its `sizes` say. The first one says that the model is loaded, or why not; then each
message has images, answered by one message: a batch, or, where it is not `together`, images that go
through the handler one after the other. Of these, the shared memory tells on one side which one the
worker is at, and on the other which ones nobody waits for any more. The end of the stream ends the
worker.
"""

import importlib.util
import inspect
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<I")
# Images in one message, at most, that are not a batch; and the memory for what is known of them:
# the place of the one that the worker is at, then for each place whether to pass over it.
MOST = 4
SHARED_BYTES = 1 + MOST
_MANIFEST = Path("MAR-INF/MANIFEST.json")


class Context:
    """What TorchServe tells a handler about its model and a batch, as far as it is used.

    Attributes:
        system_properties: `model_dir`, the unpacked archive.
        headers: of each request of the batch.
    """

    def __init__(self, model_dir: Path) -> None:
        self.system_properties = {"model_dir": str(model_dir)}
        self.headers: Sequence[Mapping[str, str]] = ()

    def get_all_request_header(self, idx: int) -> Mapping[str, str]:
        """The headers of one request."""
        return self.headers[idx]

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Nothing to do: the answer itself says whether an image was refused."""

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Nothing to do: an answer is JSON."""


def main(descriptor: int, memory: int, cores: Sequence[int]) -> None:
    """Load the model, and answer until the other end is closed.

    Args:
        descriptor: the connection's.
        memory: descriptor of the shared memory.
        cores: that this process is pinned to, with all its threads; empty leaves it as it is.
    """
    if cores:
        os.sched_setaffinity(0, cores)
    model_dir = Path.cwd()
    connection = socket.socket(fileno=descriptor)
    context = Context(model_dir)
    try:
        handler = _handler(model_dir)
        handler.initialize(context)
    except Exception as error:
        _send(connection, {"error": f"{type(error).__name__}: {error}", "sizes": []}, ())
        raise
    _send(connection, _providers(handler) | {"sizes": []}, ())
    shared = mmap.mmap(memory, SHARED_BYTES)
    while (message := _receive(connection)) is not None:
        head, images = message
        parts: list[bytes] = []
        if head["together"]:
            batches = [(head["headers"], images)]
        else:
            batches = [([one], [body]) for one, body in zip(head["headers"], images, strict=True)]
        for place, (headers, bodies) in enumerate(batches):
            if len(batches) > 1:
                shared[0] = place
                if shared[1 + place]:
                    parts.append(b"")
                    continue
            try:
                context.headers = headers
                texts = handler.handle([{"body": body} for body in bodies], context)
                parts += [text.encode() for text in texts]
            except Exception:  # the handler has told of it
                parts += [b""] * len(bodies)
        _send(connection, {"sizes": [len(part) for part in parts]}, parts)


def _handler(model_dir: Path) -> Any:
    """The archive's handler: the only class of the module that the manifest names."""
    manifest = json.loads((model_dir / _MANIFEST).read_bytes())
    path = model_dir / manifest["model"]["handler"]
    sys.path.insert(0, str(model_dir))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # noqa: S101 - a file of Python
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    (handler,) = (
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    )
    return handler()


def _providers(handler: Any) -> dict[str, Any]:
    """What runs the model, as far as an archive tells, and what was offered and cannot."""
    engine = getattr(handler, "engine", None)
    return {
        "provider": getattr(engine, "provider", ""),
        "unusable": list(getattr(engine, "unusable", ())),
    }


def _send(connection: socket.socket, head: Mapping[str, Any], parts: Sequence[bytes]) -> None:
    data = json.dumps(head).encode()
    connection.sendall(b"".join((LENGTH.pack(len(data)), data, *parts)))


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next message; None once the other end is closed."""
    prefix = _exactly(connection, LENGTH.size)
    if prefix is None:
        return None
    data = _exactly(connection, LENGTH.unpack(prefix)[0])
    if data is None:
        return None
    head = json.loads(data)
    parts = []
    for size in head["sizes"]:
        part = _exactly(connection, size)
        if part is None:
            return None
        parts.append(part)
    return head, parts


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    """So many bytes; None where the stream ends before. Each is written once, where it stays."""
    if size == 0:
        return b""
    data = connection.recv(size, socket.MSG_WAITALL)
    return data if len(data) == size else None


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [int(core) for core in sys.argv[3].split(",") if core])
