"""A real server that the tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_archive.packager import pack
from cxr_server.settings import RuntimeName
from support.bundles import make_bundle
from support.servers import Server, serving

# Small limits, so that small requests can be too large.
MAX_IMAGE_BYTES = 200_000
MAX_IMAGE_PIXELS = 2_000_000
MAX_BATCH = 8
MAX_REQUEST_BYTES = 2 * MAX_IMAGE_BYTES


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, as training exports one."""
    return make_bundle(tmp_path_factory.mktemp("bundle"), explained=True)


@pytest.fixture(scope="session")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, packed."""
    path = tmp_path_factory.mktemp("archive") / "cxr.mar"
    pack(bundle, path)
    return path


@pytest.fixture(scope="session", params=RuntimeName)
def server(archive: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server for all tests that leave it as it is: two workers, small limits."""
    with serving(
        archive,
        f"--runtime={request.param}",
        "--workers=2",
        f"--max-image-bytes={MAX_IMAGE_BYTES}",
        f"--max-image-pixels={MAX_IMAGE_PIXELS}",
        f"--max-batch={MAX_BATCH}",
    ) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show a server's log with a test that failed."""
    report = yield
    for name, value in getattr(item, "funcargs", {}).items():
        if report.failed and isinstance(value, Server):
            report.sections.append((f"log of cxr serve ({name})", value.log[-5000:]))
    return report
