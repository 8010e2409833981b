"""The portal's page in a real Chromium, in front of a real model server."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from cxr_archive.packager import pack
from cxr_portal.app import PAGE
from support.bundles import LABELS, make_bundle
from support.dicoms import dicom_bytes
from support.portals import Portal, portal
from support.servers import Server, serving

ROOT = Path(__file__).parents[2]
# Looked at by people; `make browser` leaves them here.
SCREENSHOTS = ROOT / "runs" / "portal-screenshots"
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    assert (PAGE / "index.html").is_file(), "the page is not built; run `make page`"
    path = os.environ.get("CXR_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    with sync_playwright() as playwright:
        # Without its own sandbox, which root and most containers cannot have.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model: dark images have no finding to it, bright ones Pneumonia."""
    folder = tmp_path_factory.mktemp("model")
    bundle = make_bundle(
        folder / "bundle",
        explained=True,
        guarded=True,
        labels=["No finding", "COVID-19", "Pneumonia"],
        uncertain=dict.fromkeys(LABELS, (0.35, 0.5)),
    )
    pack(bundle, folder / "cxr.mar")
    return folder / "cxr.mar"


@pytest.fixture(scope="session")
def model(archive: Path) -> Iterator[Server]:
    with serving(archive, "--runtime=inprocess", "--workers=1") as running:
        yield running


@pytest.fixture(scope="session")
def gateway(model: Server) -> Iterator[Portal]:
    with portal(f"--server={model.grpc}", "--images-per-minute=100000") as running:
        yield running


class Problems(list[str]):
    """What a browser has complained about: scripts, the policy, requests to elsewhere."""


@pytest.fixture
def problems() -> Problems:
    return Problems()


@pytest.fixture
def context(chromium: Browser, gateway: Portal, problems: Problems) -> Iterator[BrowserContext]:
    made = chromium.new_context(base_url=gateway.url, viewport={"width": 1100, "height": 900})
    made.set_default_timeout(15_000)

    def complained(message: ConsoleMessage) -> None:
        # That an answer is no 200 is told to the user, and by the browser, too.
        if message.type == "error" and "Failed to load resource" not in message.text:
            problems.append(message.text)

    made.on("console", complained)
    made.on("weberror", lambda error: problems.append(str(error.error)))
    made.on(
        "request",
        lambda request: (
            problems.append(f"asks {request.url}")
            if not request.url.startswith((gateway.url, "blob:"))
            else None
        ),
    )
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext, problems: Problems) -> Iterator[Page]:
    opened = context.new_page()
    opened.goto("/")
    yield opened
    assert not problems


def drawn(brightness: int, seed: int = 0, side: int = 160) -> np.ndarray:
    """Something like a chest: two dark fields in a bright frame, uint8 `[side, side]`."""
    rows, columns = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    noise = np.random.default_rng(seed).normal(0, 5, rows.shape)
    lungs = sum(
        np.exp(-((((columns - x) / 0.28) ** 2 + ((rows + 0.1) / 0.6) ** 2) ** 2))
        for x in (-0.42, 0.42)
    )
    grey = brightness + 45 * (0.5 - lungs) + noise
    return grey.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files to upload, by what becomes of them."""
    folder = tmp_path_factory.mktemp("images")
    plain = {"finding.png": 195, "none.jpg": 70, "uncertain.png": 120, "doubtful.png": 240}
    for name, brightness in plain.items():
        Image.fromarray(drawn(brightness)).save(folder / name)
    values = drawn(195).astype(np.uint16) * 16
    (folder / "finding.dcm").write_bytes(dicom_bytes(values, BitsStored=12, HighBit=11))
    (folder / "refused.png").write_bytes(b"not an image")
    (folder / "other.dcm").write_bytes(dicom_bytes(values, Modality="MR"))
    for number in range(40):
        Image.fromarray(drawn(60 + 4 * number, seed=number)).save(folder / f"batch-{number}.png")
    return {path.name: path for path in folder.iterdir()}
