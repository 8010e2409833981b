"""HTTP/1.1 as the REST endpoints speak it, byte by byte."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from cxr_server.wire import HttpProtocol

KEEP_ALIVE = 1


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body."""
    assert scope["type"] == "http"
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    length = str(len(body)).encode()
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(
        echo, http=HttpProtocol, ws="none", lifespan="off", timeout_keep_alive=KEEP_ALIVE
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        yield connection


def answer(connection: socket.socket) -> bytes:
    """The body of the next answer."""
    file = connection.makefile("rb")
    assert file.readline() == b"HTTP/1.1 200 OK\r\n"
    headers = dict(line.rstrip().lower().split(b": ") for line in iter(file.readline, b"\r\n"))
    return file.read(int(headers[b"content-length"]))


# What is in the body is nobody's header.
BODY = b"\r\nUpgrade: h2c\r\n\r\n" + bytes(300_000)


@pytest.mark.parametrize("pause", [False, True], ids=["at once", "the body later"])
@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.3"])
def test_an_offer_of_another_protocol_is_passed_over(port: int, offer: str, pause: bool) -> None:
    """As `curl --http2` makes it, and Java's HttpClient by default."""
    head = (
        f"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {offer}\r\n"
        f"HTTP2-Settings: AAMAAABk\r\nContent-Length: {len(BODY)}\r\n\r\n"
    ).encode()
    with connected(port) as connection:
        for _ in range(2):
            if pause:
                connection.sendall(head)
                time.sleep(0.2)
                connection.sendall(BODY)
            else:
                connection.sendall(head + BODY)
            assert answer(connection) == BODY


@pytest.mark.parametrize(
    "begun", [b"", b"POST / HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a head"]
)
@pytest.mark.parametrize("before", [False, True], ids=["first", "after another request"])
def test_a_head_that_does_not_come_ends_the_connection(
    port: int, begun: bytes, before: bool
) -> None:
    with connected(port) as connection:
        if before:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi")
            assert answer(connection) == b"hi"
        connection.sendall(begun)
        start = time.monotonic()
        assert connection.recv(100) == b""
        assert KEEP_ALIVE - 0.2 < time.monotonic() - start < KEEP_ALIVE + 5


def test_a_body_may_take_its_time(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nh")
        time.sleep(2 * KEEP_ALIVE)
        connection.sendall(b"i")
        assert answer(connection) == b"hi"
