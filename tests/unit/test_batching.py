"""How many images the runtimes give a worker at once, on CPU and on GPU."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cxr.answer import Options
from cxr.config import load_config
from cxr_archive.packager import MODEL_CONFIG
from cxr_server import inprocess
from cxr_server.inprocess import Batching, InProcess
from cxr_server.settings import Settings
from cxr_server.torchserve import TorchServe
from cxr_server.workers import Job
from support.archives import Files, edited_archive


def batching(folder: Path, changes: dict[str, Any], provider: str) -> Batching:
    """What a worker is given whose engine runs on this provider."""

    def edit(files: Files) -> None:
        settings = yaml.safe_load(files[MODEL_CONFIG]) | changes
        files[MODEL_CONFIG] = yaml.safe_dump(settings).encode()

    async def read() -> Batching:
        runtime = InProcess(edited_archive(folder, edit), Settings())
        await runtime.start()
        try:
            return runtime._batching(provider)
        finally:
            await runtime.stop()

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("changes", "cpu", "gpu"),
    [
        ({}, Batching(size=1, delay=0), Batching(size=8, delay=0.005)),
        (
            {"maxBatchDelay": 20, "gpu": {"batchSize": 4}},
            Batching(size=1, delay=0.02),
            Batching(size=4, delay=0.02),
        ),
        ({"batchSize": 2, "gpu": None}, Batching(size=2, delay=0), Batching(size=2, delay=0)),
    ],
    ids=["as packed", "a part of it", "nothing of its own"],
)
def test_a_gpu_has_batches_of_its_own(
    changes: dict[str, Any],
    cpu: Batching,
    gpu: Batching,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inprocess, "worker_cores", lambda _: [])  # no processes
    assert batching(tmp_path / "cpu", changes, "CPUExecutionProvider") == cpu
    for provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        assert batching(tmp_path / provider, changes, provider) == gpu


MANY = pytest.mark.parametrize(
    ("workers", "waiting", "alone", "given"),
    [(2, 1, [], 1), (2, 3, [], 2), (2, 40, [], 4), (2, 40, [2], 2), (1, 40, [], 1)],
    ids=["few wait", "some wait", "many wait", "one of them alone", "a single worker"],
)


@MANY
def test_where_many_wait_a_worker_is_given_several(
    workers: int, waiting: int, alone: list[int], given: int, tmp_path: Path
) -> None:
    async def first() -> list[int]:
        runtime = InProcess(edited_archive(tmp_path, lambda _: None), Settings())
        runtime._ready = workers
        for place in range(waiting + 1):
            job = runtime._job(b"", Options())
            job.alone = place in alone
            runtime._waiting.put_nowait(job)
        first = runtime._waiting.get_nowait()
        jobs = await runtime._batch(first, Batching())
        await runtime.stop()
        return [job.arrival for job in jobs]

    assert asyncio.run(first()) == list(range(given))


@MANY
def test_where_many_wait_torchserve_is_given_several(
    workers: int, waiting: int, alone: list[int], given: int, tmp_path: Path
) -> None:
    assert first_of_many(tmp_path, workers, waiting, alone=alone) == list(range(given))


def test_torchserve_is_given_several_small_images_only(tmp_path: Path) -> None:
    assert first_of_many(tmp_path, 2, 40, image=bytes(300_000)) == [0, 1, 2]
    assert first_of_many(tmp_path, 2, 40, image=bytes(2_000_000)) == [0]


def test_an_older_archive_is_given_one_image_a_request(tmp_path: Path) -> None:
    assert first_of_many(tmp_path, 2, 40, reads_board=False) == [0]


def first_of_many(
    folder: Path,
    workers: int,
    waiting: int,
    *,
    alone: Sequence[int] = (),
    image: bytes = b"",
    reads_board: bool = True,
) -> list[int]:
    """What goes into TorchServe's next request, by arrival, where so many more wait."""

    async def first() -> list[int]:
        path = edited_archive(folder, lambda _: None)
        runtime = TorchServe(path, load_config(folder / "bundle"), Settings())
        runtime._ready, runtime._board_is_read = workers, reads_board
        for arrival in range(waiting + 1):
            runtime._waiting.append(
                Job(
                    arrival=arrival,
                    image=image,
                    options=Options(),
                    outcome=asyncio.get_running_loop().create_future(),
                    alone=arrival in alone,
                )
            )
        jobs = runtime._next()
        await runtime.stop()
        return [job.arrival for job in jobs]

    return asyncio.run(first())
