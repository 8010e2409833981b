"""gRPC beside other users of a process: gevent cannot see into its waiting by itself."""

import subprocess
import sys

import pytest

# A server that accepts a connection, and says nothing.
_SCRIPT = """
{first}
import socket
import gevent
from cxr_loadtests.clients import GrpcClient, Sendable
from cxr_loadtests.target import Target

ticks = 0

def tick():
    global ticks
    while True:
        gevent.sleep(0.05)
        ticks += 1

with socket.create_server(("127.0.0.1", 0)) as silent:
    address = f"127.0.0.1:{{silent.getsockname()[1]}}"
    client = GrpcClient(Target(rest="http://127.0.0.1:1", grpc=address), 1.5)
    gevent.spawn(tick)
    gevent.sleep(0.1)
    before = ticks
    reply = client.send(Sendable("", b""))
    print(reply.problem, ticks - before)
"""


@pytest.mark.parametrize(
    ("first", "cooperative"),
    [
        ("import cxr_loadtests.drive", True),
        # What gevent does alone, without `grpc.experimental.gevent`.
        ("from gevent import monkey; monkey.patch_all()", False),
    ],
)
def test_a_grpc_call_that_waits_holds_up_no_other_user(first: str, cooperative: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(first=first)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    problem, ticks = done.stdout.split()
    assert problem == "timeout"
    # Some 30 fit into the call.
    assert (int(ticks) > 5) == cooperative, ticks
