"""One model server, and portals in front of it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cxr_archive.packager import pack
from support.bundles import LABELS, make_bundle
from support.portals import Portal, portal
from support.servers import Server, serving

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
