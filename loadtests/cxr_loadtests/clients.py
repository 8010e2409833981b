"""One connection to the service each: what was sent, and what came back.

Both clients wait cooperatively. urllib3 does so once gevent has replaced Python's sockets. gRPC has
its own sockets in C, which gevent cannot replace; `grpc.experimental.gevent` makes its waiting
cooperative. Without it, one call would stop all other clients of the process, and latencies would
be those of the load generator.

Nothing is repeated: a request that fails counts as failed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
import urllib3

from cxr_loadtests.target import Target

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_LARGEST = 256 * 1024 * 1024
# Every answer of the server has it; a gateway's own has not.
REQUEST_ID = "x-request-id"


class Reply(NamedTuple):
    """What came back.

    Attributes:
        code: HTTP status or name of the gRPC status; empty where there was no answer.
        body: of the answer.
        headers: its headers or initial metadata, by lower-case name.
        problem: why there was no answer.
    """

    code: str
    body: bytes
    headers: Mapping[str, str]
    problem: str = ""

    @property
    def from_server(self) -> bool:
        """Whether the server itself has answered, and no gateway before it."""
        return REQUEST_ID in self.headers


@dataclass(frozen=True)
class Sendable:
    """A request that is ready to be sent: its body costs nothing while the clock runs.

    Attributes:
        path: of the URL; empty for gRPC.
        body: of the request, or the serialized message.
        headers: HTTP headers.
    """

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class RestClient:
    """Requests over HTTP/1.1, by default over one connection that stays open."""

    def __init__(self, target: Target, timeout: float, *, connections: int = 1) -> None:
        self._pool = urllib3.connectionpool.connection_from_url(
            target.rest,
            maxsize=connections,
            block=False,
            retries=False,
            # In all: a number alone would count for connecting, and again for the answer.
            timeout=urllib3.Timeout(total=timeout),
        )
        self._headers = dict(target.headers)
        if target.host_header:
            self._headers["Host"] = target.host_header

    def send(self, request: Sendable) -> Reply:
        """Send a request, and wait for the answer."""
        try:
            answer = self._pool.urlopen(
                "POST", request.path, request.body, {**self._headers, **request.headers}
            )
        except urllib3.exceptions.TimeoutError:
            return Reply("", b"", {}, "timeout")
        except urllib3.exceptions.HTTPError as error:
            return Reply("", b"", {}, _name(error))
        headers = {name.lower(): value for name, value in answer.headers.items()}
        return Reply(str(answer.status), answer.data, headers)

    def get(self, path: str) -> Reply:
        """Ask with GET."""
        try:
            answer = self._pool.urlopen("GET", path, headers=self._headers)
        except urllib3.exceptions.HTTPError as error:
            return Reply("", b"", {}, _name(error))
        return Reply(str(answer.status), answer.data, dict(answer.headers))

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class GrpcClient:
    """Calls of ModelInfer over a connection of its own."""

    def __init__(self, target: Target, timeout: float) -> None:
        assert target.grpc is not None  # noqa: S101 - the scenario is left out otherwise
        self._timeout = timeout
        self._metadata = [(name.lower(), value) for name, value in target.headers.items()]
        options: list[tuple[str, Any]] = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", _LARGEST),
            ("grpc.enable_retries", 0),
        ]
        if target.authority:
            options.append(("grpc.default_authority", target.authority))
        scheme, _, address = target.grpc.rpartition("://")
        if scheme == "grpcs":
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.secure_channel(address, credentials, options=options)
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        # Bytes in and out: what is sent was serialized before, what comes back is read elsewhere.
        self._call = self._channel.unary_unary(_INFER)

    def send(self, request: Sendable) -> Reply:
        """Send a request, and wait for the answer."""
        try:
            body, call = self._call.with_call(
                request.body, timeout=self._timeout, metadata=self._metadata
            )
        except grpc.RpcError as error:
            headers = _metadata(error.initial_metadata())
            code = error.code().name
            if not headers and code in ("DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"):
                problem = "timeout" if code == "DEADLINE_EXCEEDED" else "connection"
                return Reply("", b"", {}, problem)
            return Reply(code, str(error.details()).encode(), headers)
        return Reply("OK", body, _metadata(call.initial_metadata()))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _metadata(items: Any) -> dict[str, str]:
    return {name: value for name, value in items or () if isinstance(value, str)}


def _name(error: Exception) -> str:
    """What went wrong, in a word; urllib3's messages hold addresses."""
    reason = getattr(error, "__cause__", None) or error
    return f"connection ({type(reason).__name__})"
