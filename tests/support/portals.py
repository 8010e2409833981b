"""Starts the real `cxr portal`, and looks at it from outside."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cxr_portal.settings import Scope
from cxr_portal.store import Store
from support.servers import CXR, START_TIMEOUT, STOP_TIMEOUT, ServerError


@dataclass
class Portal:
    """A `cxr portal` process.

    Attributes:
        options: what it was started with.
        database: URL of its database.
    """

    options: tuple[str, ...]
    database: str
    folder: Path
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def _announced(self) -> dict[str, str]:
        return json.loads((self.folder / "stdout").read_text().splitlines()[-1])

    @property
    def url(self) -> str:
        return self._announced["portal"]

    @property
    def metrics(self) -> str:
        return httpx.get(self._announced["metrics"]).text

    def start(self, *, port: int = 0) -> None:
        command = [CXR, "portal", "--drain-delay=0", *self.options, "--json"]
        command += [f"--port={port}", "--metrics-port=0", f"--database={self.database}"]
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("ab") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err)
        deadline = time.monotonic() + START_TIMEOUT
        while b"\n" not in (self.folder / "stdout").read_bytes():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"cxr portal did not start\n{self.log}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(STOP_TIMEOUT)

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def keys(self, *arguments: str) -> dict[str, Any]:
        """What `cxr portal keys` says as JSON."""
        return json.loads(keys(*arguments, f"--database={self.database}", "--json").stdout)

    def key(self, *scopes: Scope, **options: Any) -> str:
        """A new API key, with all scopes unless some are named."""
        store = Store(self.database)
        try:
            return store.create_key("test", frozenset(scopes or Scope), **options)[1]
        finally:
            store.close()


def keys(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `cxr portal keys`."""
    return portal_command("keys", *arguments)


def portal_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `cxr portal` to its end."""
    return subprocess.run(
        [CXR, "portal", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@contextlib.contextmanager
def portal(*options: str, database: str = "", start: bool = True) -> Iterator[Portal]:
    """Run `cxr portal` on free ports.

    Args:
        options: of the command.
        database: its URL; by default a new SQLite file.
        start: whether it runs at once.
    """
    with tempfile.TemporaryDirectory(prefix="p-") as home:
        running = Portal(options, database or f"sqlite:///{home}/portal.db", Path(home))
        (running.folder / "stderr").touch()
        try:
            if start:
                running.start()
            yield running
        except BaseException:
            sys.stderr.write(f"\n--- log of cxr portal ---\n{running.log[-5000:]}")
            raise
        finally:
            process = running.process
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    """A multipart form's files."""
    return [("images", (f"patient-{number}.png", image)) for number, image in enumerate(images)]


def environment(**changes: str) -> dict[str, str]:
    """This process' environment, changed."""
    return {**os.environ, **changes}
