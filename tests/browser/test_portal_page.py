"""What a person does on the portal's page."""

import csv
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from browser.conftest import ROOT, SCREENSHOTS
from cxr_portal.app import PAGE
from support.portals import Portal, portal
from support.servers import Server, free_port, serving

AXE = ROOT / "portal" / "web" / "node_modules" / "axe-core" / "axe.min.js"
MODES = ("light", "dark")


def upload(page: Page, *paths: Path) -> None:
    page.get_by_label("Files").set_input_files(paths)


def card(page: Page, name: str) -> Locator:
    return page.get_by_role("article", name=name)


def asking(page: Page) -> Locator:
    """Where the page says that it waits for the model."""
    return page.get_by_text("Asking the model")


def assert_accessible(page: Page) -> None:
    """No violation that axe can see, in either mode."""
    for mode in MODES:
        page.emulate_media(color_scheme=mode)
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")
        violations = [
            (one["id"], one["help"], [node["html"] for node in one["nodes"]][:3])
            for one in found["violations"]
        ]
        assert not violations, (mode, violations)
    page.emulate_media(color_scheme="light")


def photograph(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


class TestAnswers:
    @pytest.mark.parametrize("name", ["finding.png", "none.jpg", "finding.dcm"])
    def test_each_format_has_a_preview_and_an_answer(
        self, page: Page, images: dict[str, Path], name: str
    ) -> None:
        upload(page, images[name])
        one = card(page, name)
        expect(one.get_by_role("img", name=f"Preview of {name}")).to_be_visible()
        expect(one.get_by_role("row")).to_have_count(4)
        expect(one.get_by_text("Research use only")).to_be_visible()

    def test_words_for_each_outcome(self, page: Page, images: dict[str, Path]) -> None:
        names = ("finding.png", "none.jpg", "uncertain.png", "refused.png", "doubtful.png")
        upload(page, *(images[name] for name in names))
        said = {
            "finding.png": "Signs of Pneumonia",
            "none.jpg": "finds nothing that it was trained to find",
            "uncertain.png": "The model is not certain",
            "refused.png": "The data is not an image; send one JPEG, PNG, TIFF or DICOM file.",
            "doubtful.png": "it does not look like a radiograph",
        }
        for name, words in said.items():
            expect(card(page, name).get_by_role("status")).to_contain_text(words)
        expect(
            card(page, "refused.png").get_by_role("heading", name="Not analysed")
        ).to_be_visible()
        expect(card(page, "uncertain.png")).to_contain_text("not certain")
        assert_accessible(page)
        photograph(page, "answers")
        page.emulate_media(color_scheme="dark")
        photograph(page, "answers-dark")

    def test_dropping_files(self, page: Page, images: dict[str, Path]) -> None:
        data = page.evaluate_handle(
            """(bytes) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
                return transfer;
            }""",
            list(images["finding.png"].read_bytes()),
        )
        page.dispatch_event(".drop", "drop", {"dataTransfer": data})
        expect(card(page, "dropped.png")).to_contain_text("Signs of Pneumonia")

    def test_window_and_level(self, page: Page, images: dict[str, Path]) -> None:
        upload(page, images["finding.dcm"])
        one = card(page, "finding.dcm")
        picture = one.get_by_role("img", name="Preview")
        one.get_by_text("Window and level").click()
        before = picture.screenshot()
        one.get_by_label("Window").press("Home")
        assert picture.screenshot() != before
        one.get_by_role("button", name="As the file says").click()
        assert picture.screenshot() == before

    def test_another_modality_is_refused_in_words(
        self, page: Page, images: dict[str, Path]
    ) -> None:
        upload(page, images["other.dcm"])
        expect(card(page, "other.dcm").get_by_role("heading", name="Not analysed")).to_be_visible()

    def test_heat_map(self, page: Page, images: dict[str, Path]) -> None:
        upload(page, images["finding.png"])
        one = card(page, "finding.png")
        one.get_by_role("button", name="Show heat map").click()
        overlay = one.get_by_role("img", name="Heat map: orange speaks for Pneumonia")
        expect(overlay).to_be_visible()
        expect(overlay).not_to_have_js_property("naturalWidth", 0)
        box, under = overlay.bounding_box(), one.get_by_role("img", name="Preview").bounding_box()
        assert box == under, "it lies over the image"
        slider = one.get_by_label("Heat map", exact=True)
        slider.fill("0")
        expect(overlay).to_have_css("opacity", "0")
        without = overlay.screenshot()
        slider.fill("1")
        expect(overlay).to_have_css("opacity", "1")
        assert overlay.screenshot() != without
        one.get_by_label("of", exact=True).select_option("COVID-19")
        expect(one.get_by_role("img", name="orange speaks for COVID-19")).to_be_visible()
        assert_accessible(page)
        slider.fill("0.6")
        photograph(page, "heat-map")
        one.get_by_role("button", name="Hide heat map").click()
        expect(one.get_by_label("Heat map", exact=True)).to_have_count(0)

    def test_side_by_side(self, page: Page, images: dict[str, Path]) -> None:
        upload(page, images["finding.png"], images["none.jpg"])
        for name in ("finding.png", "none.jpg"):
            card(page, name).get_by_label("Compare").check()
        pair = page.get_by_role("region", name="Side by side")
        expect(pair.get_by_role("article")).to_have_count(2)
        boxes = [one.bounding_box() for one in pair.get_by_role("article").all()]
        assert boxes[0]
        assert boxes[1]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert_accessible(page)
        photograph(page, "compare")

    def test_history_and_csv(self, page: Page, images: dict[str, Path], tmp_path: Path) -> None:
        upload(page, images["finding.png"], images["refused.png"])
        expect(card(page, "finding.png")).to_contain_text("Signs of Pneumonia")
        expect(card(page, "refused.png")).to_contain_text("Not analysed")
        page.get_by_role("button", name="History").click()
        expect(page.get_by_role("row")).to_have_count(3)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as CSV").click()
        download.value.save_as(tmp_path / "answers.csv")
        rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8", newline="")))
        found = {row["file"]: row for row in rows}
        assert found["finding.png"]["label"] == "Pneumonia"
        assert float(found["finding.png"]["p(Pneumonia)"]) > 0.9
        assert found["refused.png"]["outcome"] == "refused"
        assert_accessible(page)
        photograph(page, "history")
        page.reload()
        page.get_by_role("button", name="History").click()
        expect(page.get_by_role("row")).to_have_count(3)
        page.get_by_role("button", name="Forget all").click()
        expect(page.get_by_text("There are none yet.")).to_be_visible()

    def test_model_card(self, page: Page) -> None:
        page.get_by_role("button", name="Model card").click()
        expect(page.get_by_role("heading", name="Model card: cxr 1.0")).to_be_visible()
        expect(page.get_by_text("Knows nothing of radiographs.")).to_be_visible()
        expect(page.get_by_role("row")).to_have_count(4)
        assert_accessible(page)
        photograph(page, "model-card")


class TestBatch:
    def test_many_files_become_a_job(self, page: Page, images: dict[str, Path]) -> None:
        upload(page, *(images[f"batch-{number}.png"] for number in range(12)))
        batch = page.get_by_role("region", name="Batch of 12 images")
        expect(batch.get_by_role("heading")).to_have_text("Batch of 12 images is done")
        expect(batch.get_by_role("status")).to_contain_text("12 of 12: 12 answered")
        expect(page.get_by_role("article").get_by_role("table")).to_have_count(12)
        photograph(page, "batch")
        assert_accessible(page)

    @pytest.mark.usefixtures("paused")
    def test_cancel(self, page: Page, images: dict[str, Path]) -> None:
        upload(page, *(images[f"batch-{number}.png"] for number in range(20)))
        batch = page.get_by_role("region", name="Batch of 20 images")
        expect(batch.get_by_role("button", name="Cancel")).to_be_visible()
        photograph(page, "batch-running")
        assert_accessible(page)
        batch.get_by_role("button", name="Cancel").click()
        expect(batch.get_by_role("heading")).to_have_text("Batch of 20 images was cancelled")
        cancelled = page.get_by_text("The batch was cancelled before this image.")
        expect(cancelled).to_have_count(20)
        page.reload()
        expect(cancelled).to_have_count(20)
        expect(asking(page)).to_have_count(0)
        photograph(page, "batch-cancelled-reloaded")
        assert_accessible(page)

    def test_a_reload_while_it_is_sent(self, page: Page, images: dict[str, Path]) -> None:
        page.route("**/v1/jobs", lambda _: None)
        upload(page, *(images[f"batch-{number}.png"] for number in range(9)))
        expect(page.get_by_role("article")).to_have_count(9)
        page.reload()
        expect(page.get_by_text("Choose the file again.")).to_have_count(9)
        expect(asking(page)).to_have_count(0)

    @pytest.mark.parametrize("broken", ["the database", "the network"])
    def test_answers_that_cannot_be_fetched_at_first(
        self, page: Page, images: dict[str, Path], broken: str
    ) -> None:
        def fail(route: Route) -> None:
            if broken == "the network":
                route.abort()
            else:
                route.fulfill(status=503)

        page.route("**/v1/jobs/*/result", fail)
        upload(page, *(images[f"batch-{number}.png"] for number in range(12)))
        batch = page.get_by_role("region", name="Batch of 12 images")
        expect(batch.get_by_role("heading")).to_have_text("Batch of 12 images is done")
        # It asks again.
        page.wait_for_event("request", lambda one: one.url.endswith("/result"))
        page.unroute("**/v1/jobs/*/result")
        expect(page.get_by_role("article").get_by_role("table")).to_have_count(12)
        expect(asking(page)).to_have_count(0)

    def test_a_reload_takes_it_up_again(
        self, page: Page, images: dict[str, Path], model: Server
    ) -> None:
        for worker in model.workers():
            worker.suspend()
        try:
            upload(page, *(images[f"batch-{number}.png"] for number in range(20)))
            batch = page.get_by_role("region", name="Batch of 20 images")
            expect(batch).to_be_visible()
            page.reload()
            expect(batch).to_be_visible()
        finally:
            for worker in model.workers():
                worker.resume()
        expect(batch.get_by_role("heading")).to_have_text("Batch of 20 images is done")
        expect(card(page, "batch-3.png").get_by_role("table")).to_be_visible()


@pytest.fixture
def paused(model: Server) -> Iterator[None]:
    """A model that does not answer for now."""
    for worker in model.workers():
        worker.suspend()
    yield
    for worker in model.workers():
        worker.resume()


class TestTrouble:
    def test_a_key_is_asked_for_and_an_expired_one_told(
        self, context: BrowserContext, model: Server, images: dict[str, Path]
    ) -> None:
        with portal(f"--server={model.grpc}", "--auth=required") as closed:
            page = context.new_page()
            page.goto(closed.url)
            dialog = page.get_by_role("dialog", name="API key")
            expect(dialog).to_contain_text("This portal needs a key.")
            assert_accessible(page)
            photograph(page, "key")
            dialog.get_by_label("Key").fill(closed.key(lifetime=timedelta(seconds=8)))
            dialog.get_by_role("button", name="Use this key").click()
            upload(page, images["finding.png"])
            expect(card(page, "finding.png")).to_contain_text("Signs of Pneumonia")
            time.sleep(8)
            upload(page, images["none.jpg"])
            expect(dialog).to_contain_text("The API key has expired.")
            dialog.get_by_label("Key").fill(closed.key())
            dialog.get_by_role("button", name="Use this key").click()
            expect(card(page, "none.jpg")).to_contain_text("finds nothing")

    def test_a_key_ends_in_the_middle_of_a_batch(
        self, context: BrowserContext, model: Server, images: dict[str, Path]
    ) -> None:
        with portal(f"--server={model.grpc}", "--auth=required") as closed:
            old = closed.keys("create", "viewer")
            page = context.new_page()
            page.goto(closed.url)
            dialog = page.get_by_role("dialog", name="API key")
            dialog.get_by_label("Key").fill(old["key"])
            dialog.get_by_role("button", name="Use this key").click()
            for worker in model.workers():
                worker.suspend()
            try:
                upload(page, *(images[f"batch-{number}.png"] for number in range(12)))
                expect(asking(page)).to_have_count(12)
                new = closed.keys("rotate", old["id"], "--overlap-hours=0")
                # Its streams end, and it has forgotten that the key was good.
                closed.stop()
                closed.start(port=int(closed.url.rpartition(":")[2]))
                expect(dialog).to_contain_text("The API key has expired.")
                expect(asking(page)).to_have_count(0)
                dialog.get_by_label("Key").fill(new["key"])
                dialog.get_by_role("button", name="Use this key").click()
                expect(asking(page)).to_have_count(12)
            finally:
                for worker in model.workers():
                    worker.resume()
            expect(page.get_by_role("heading", name="Batch of 12 images is done")).to_be_visible()
            expect(page.get_by_role("article").get_by_role("table")).to_have_count(12)

    def test_the_server_is_down_and_comes_back(
        self, context: BrowserContext, archive: Path, images: dict[str, Path]
    ) -> None:
        port = free_port()
        with portal(f"--server=127.0.0.1:{port}") as running:
            page = context.new_page()
            page.goto(running.url)
            expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
            upload(page, images["finding.png"])
            one = card(page, "finding.png")
            expect(one).to_contain_text("The model cannot be reached at the moment")
            photograph(page, "model-away")
            options = ("--runtime=inprocess", "--workers=1", f"--grpc-port={port}")
            with serving(archive, *options, "--rest-port=0", "--metrics-port=0", free_ports=False):
                expect(page.get_by_role("alert")).to_have_text("", timeout=20_000)
                one.get_by_role("button", name="Try again").click()
                expect(one).to_contain_text("Signs of Pneumonia")

    def test_the_portal_itself_is_gone(
        self, context: BrowserContext, model: Server, images: dict[str, Path]
    ) -> None:
        with portal(f"--server={model.grpc}") as running:
            page = context.new_page()
            page.goto(running.url)
            expect(page.get_by_role("heading", name="Images", exact=True)).to_be_visible()
            running.stop()
            upload(page, images["finding.png"])
            expect(card(page, "finding.png")).to_contain_text("The portal cannot be reached")


def test_the_page_is_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    built = {f"cxr_portal/static/{path.relative_to(PAGE)}" for path in PAGE.rglob("*.*")}
    assert built <= set(names)
    assert len(built) > 3


class TestEverybody:
    def test_research_use_only_is_always_in_sight(
        self, page: Page, images: dict[str, Path]
    ) -> None:
        upload(page, *(images[f"batch-{number}.png"] for number in range(8)))
        expect(page.get_by_role("article").get_by_role("table")).to_have_count(8)
        page.mouse.wheel(0, 5000)
        for view in ("Images", "History", "Model card"):
            page.get_by_role("button", name=view, exact=True).click()
            expect(page.get_by_text("Research use only.").first).to_be_in_viewport()

    def test_a_small_screen(
        self, chromium: Browser, gateway: Portal, images: dict[str, Path]
    ) -> None:
        page = chromium.new_page(base_url=gateway.url, viewport={"width": 360, "height": 740})
        page.goto("/")
        upload(page, images["finding.png"], images["finding.dcm"], images["refused.png"])
        expect(card(page, "finding.png").get_by_role("table")).to_be_visible()
        card(page, "finding.png").get_by_role("button", name="Show heat map").click()
        for view in ("Images", "History", "Model card"):
            page.get_by_role("button", name=view, exact=True).click()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 360, view
        page.get_by_role("button", name="Images", exact=True).click()
        card(page, "finding.png").scroll_into_view_if_needed()
        photograph(page, "small")
        page.close()

    def test_by_keyboard(self, page: Page, images: dict[str, Path]) -> None:
        def until(words: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                focused: str = page.evaluate(
                    """() => {
                        const one = document.activeElement;
                        return one.matches("a, button") ? one.ariaLabel || one.textContent : "";
                    }"""
                )
                if re.search(words, focused):
                    return
            raise AssertionError(f"the focus does not reach {words}")

        # Playwright hears of file choosers from here on, and not a moment after the key.
        page.on("filechooser", lambda _: None)
        until("Skip to the content")
        page.keyboard.press("Enter")
        expect(page.get_by_role("main")).to_be_focused()
        until("Choose files")
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files(images["finding.png"])
        expect(card(page, "finding.png")).to_contain_text("Signs of Pneumonia")
        until("Show heat map")
        page.keyboard.press("Enter")
        expect(page.get_by_role("img", name="Heat map")).to_be_visible()

    def test_the_empty_page(self, page: Page) -> None:
        expect(page.get_by_role("button", name="Choose files")).to_be_visible()
        assert_accessible(page)
        photograph(page, "empty")

    def test_dark_mode_can_be_chosen(self, page: Page) -> None:
        page.get_by_label("Colours").select_option("dark")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_label("Colours").select_option("light")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark != light
