"""The page of `wasteddp serve` in a real browser: photos are chosen, answered and shown, and text stays text.

Skipped without Chromium: run `apt-get install chromium`, or set CHROMIUM to the path of another Chromium.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from small_run import BINS, CARD, CLASSES, random_weights, write_image

from wasteddp.inference.bundle import read_card, save_bundle
from wasteddp.inference.classifier import Classifier
from wasteddp.serve.app import create_app
from wasteddp.serve.batches import Batches, Limits
from wasteddp.serve.metrics import Metrics
from wasteddp.serve.server import listen

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.processes
LIMIT_MS = 60_000.0  # a loaded machine is not a fault
TOKEN = "s3cret"
NAME = "<img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(folder, CARD, random_weights())
    limits = Limits()
    with (
        listen("127.0.0.1", 0) as listening,
        closing(Batches(Classifier.load(folder, device="cpu"), limits)) as batches,
    ):
        app = create_app(batches, read_card(folder), limits, Metrics(), token=TOKEN)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield address
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_photos_are_chosen_answered_and_shown(
    browser: Any, address: str, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    photo = write_image(tmp_path / NAME, 1)
    (tmp_path / "bad.jpg").write_bytes(photo.read_bytes()[:-100])
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    trouble, requests = list[str](), list[str]()
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.locator("#token").fill(TOKEN)
    page.locator("#choose").set_input_files([str(photo)])
    card = page.locator("#answers li").first
    card.wait_for()
    title = card.locator("h2").inner_text()
    assert title in {f"{name} \u2192 {BINS[name]}" for name in CLASSES}
    assert card.get_by_text("% sure").is_visible()
    assert card.get_by_text(NAME, exact=True).is_visible()
    sync_api.expect(card.locator("img")).to_have_js_property("naturalWidth", 48, timeout=LIMIT_MS)
    assert trouble == []
    page.locator("#camera").set_input_files([str(tmp_path / "bad.jpg")])
    page.locator("#answers .wrong").first.wait_for()
    assert page.locator("#answers li").first.get_by_text("truncated").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.strip("rgb()").split(",")[0]) < 128) == (scheme == "dark")
    page.close()
    assert {url for url in requests if not url.startswith("blob:")} == {address, f"{address}predict"}


def test_photos_are_dropped_and_pasted(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    for kind, holder in (("DragEvent", "dataTransfer"), ("ClipboardEvent", "clipboardData")):
        before = page.locator("#answers li").count()
        event = {"DragEvent": "drop", "ClipboardEvent": "paste"}[kind]
        page.evaluate(
            f"""() => {{
                const {holder} = new DataTransfer();
                {holder}.items.add(new File(["text"], "{event}.jpg"));
                document.dispatchEvent(new {kind}("{event}", {{ {holder}, bubbles: true, cancelable: true }}));
            }}"""
        )
        sync_api.expect(page.locator("#answers li")).to_have_count(before + 1, timeout=LIMIT_MS)
        assert page.locator("#answers li").first.get_by_text(f"{event}.jpg").is_visible()
        assert page.locator("#answers li").first.get_by_text("the token is missing or wrong").is_visible()
    page.close()
