"""What the runtimes do by themselves, without a process."""

import asyncio
from pathlib import Path

import pytest

from cxr_server import torchserve
from cxr_server.inprocess import InProcess
from cxr_server.settings import Settings
from support.archives import edited_archive


def test_a_port_is_found_where_all_but_the_privileged_are_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nodes for many connections are tuned."""
    tuned = tmp_path / "range"
    tuned.write_text("1024\t65535\n")
    monkeypatch.setattr(torchserve, "_EPHEMERAL_PORTS", tuned)
    assert torchserve._free_port() >= 1024


def test_a_neighbour_that_loads_does_not_hide_why_a_worker_cannot(tmp_path: Path) -> None:
    """The process ends with that reason; it would serve on with fewer workers."""

    class Hello:
        number = 1

        def __init__(self, **said: str) -> None:
            self._said = said

        async def receive(self, timeout: float) -> tuple[dict[str, str], list[bytes]]:  # noqa: ARG002
            return self._said, []

    async def both() -> str | None:
        runtime = InProcess(edited_archive(tmp_path, lambda _: None), Settings())
        assert not await runtime._load(Hello(error="It is damaged."))  # type: ignore[arg-type]
        assert await runtime._load(Hello(provider="CPUExecutionProvider"))  # type: ignore[arg-type]
        return runtime.load_error()

    assert asyncio.run(both()) == "It is damaged."
