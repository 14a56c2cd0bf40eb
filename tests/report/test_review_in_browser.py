"""The page of `wasteddp review` in a real browser: keys, touch, what it keeps, and the CSV that it saves.

Skipped without Chromium, as tests/report/test_report_in_browser.py.
"""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wasteddp.report.page import Part, Picture, render_review
from wasteddp.sharding.corrections import read_corrections

pytestmark = pytest.mark.processes
EVIL = "=<b>\"x\",'y'</b>"
CLASSES = ("glass", "metal", "paper", EVIL)


def picture(path: str, label: str, suggested: str) -> Picture:
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 48), (40 * len(path) % 256, 90, 120)).save(jpeg, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    return Picture(path, label, suggested, ((suggested, 0.75), ("glass", 0.25)), url, "test")


def write_page(folder: Path, store: str = "set") -> Path:
    errors = [picture(f"test/{n}.jpg", "glass", "metal") for n in range(5)]
    errors.append(picture("=a,b.jpg", EVIL, "glass"))
    pair = (picture("test/0.jpg", "glass", "metal"), picture("train/0.jpg", "paper", "metal"))
    new = [picture(f"/new/{n}.jpg", "", "metal") for n in range(2)]
    parts = [
        Part("label-errors", "Labels that are probably wrong", "", [(one,) for one in errors], 9, ""),
        Part("pairs", "Pairs", "", [pair], 1, ""),
        Part("label-next", "Worth a label next", "", [(one,) for one in new], 2, ""),
    ]
    path = folder / "review.html"
    path.write_text(render_review(EVIL, "9 images", ["a warning"], parts, CLASSES, store=store))
    return path


def opened(context: Any, path: Path) -> Any:
    """Open the page in a tab that collects errors and requests in `page.trouble`."""
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda message: page.trouble.append(message.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on(
        "request", lambda one: page.trouble.append(one.url) if one.url[:5] not in ("file:", "data:", "blob:") else None
    )
    page.goto(path.as_uri())
    return page


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def saved(page: Any, key: str = "s") -> tuple[str, list[list[str]]]:
    """Save by a key; return the file's name and rows."""
    with page.expect_download() as started:
        page.keyboard.press(key)
    text = Path(started.value.path()).read_text(encoding="utf-8")
    return started.value.suggested_filename, list(csv.reader(io.StringIO(text, newline="")))


def current(page: Any) -> tuple[str, str]:
    """Return the path of the current picture, and the number of current pictures."""
    marked = page.locator(".slot.current")
    return marked.first.get_attribute("data-path"), str(marked.count())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_fits_and_asks_for_nothing(browser: Any, tmp_path: Path, width: int, height: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = opened(context, write_page(tmp_path))
    assert page.title() == f"{EVIL}: labels to look at"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    assert page.evaluate("[...document.images].filter((one) => !one.complete || !one.naturalWidth).length") == 0
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(paper.strip("rgb()").split(",")[0]) < 128) == (scheme == "dark")
    for key in ["", *["j"] * 9]:  # with each picture, the buttons stay on the screen, and so does the picture
        press(page, *key)
        buttons = page.locator(".panel").bounding_box()
        assert buttons["y"] >= 0
        assert buttons["y"] + buttons["height"] <= height + 1
        assert buttons["height"] < height * (0.55 if width < 760 else 1)
    page.evaluate("document.querySelector('#label-next .slot').scrollIntoView()")
    assert page.locator(".panel [data-do=confirm]").is_visible()
    assert page.trouble == []
    context.close()


def test_each_key_decides_and_the_csv_has_it(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = opened(context, write_page(tmp_path))
    assert page.locator(".count").text_content() == "0 of 9 done"  # test/0.jpg is there twice
    press(page, "Enter", "a", "d", "3", " ")  # test/0 to test/4
    assert current(page) == ("=a,b.jpg", "1")
    press(page, "4")  # its own class
    assert page.locator(".count").text_content() == "6 of 9 done"
    name, rows = saved(page)
    assert name == "corrections.csv"
    assert rows == [
        ["path", "label", "class", "action"],
        ["test/0.jpg", "glass", "glass", "confirm"],
        ["test/1.jpg", "glass", "metal", "correct"],
        ["test/2.jpg", "glass", "", "drop"],
        ["test/3.jpg", "glass", "paper", "correct"],
        ["test/4.jpg", "glass", "glass", "confirm"],
        ["./=a,b.jpg", "'" + EVIL, "'" + EVIL, "confirm"],
    ]
    assert page.trouble == []
    context.close()


def test_moving_undoing_and_deciding_again(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = opened(context, write_page(tmp_path))
    press(page, "k")
    assert current(page)[0] == "test/0.jpg"  # the first one stays
    press(page, "j", "ArrowRight", "k", "ArrowLeft")
    assert current(page)[0] == "test/0.jpg"
    tops = page.locator(".slot").evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().top)")
    paths = page.locator(".slot").evaluate_all("(all) => all.map((one) => one.dataset.path)")
    below = next(path for path, top in zip(paths, tops, strict=True) if top > tops[0] + 20)
    press(page, "ArrowDown")
    assert current(page)[0] == below
    press(page, "ArrowUp")
    assert current(page)[0] == "test/0.jpg"
    press(page, "a", "d", "u")
    assert current(page)[0] == "test/1.jpg"
    assert page.locator(".count").text_content() == "1 of 9 done"
    press(page, "k", "1")
    assert saved(page)[1][1:] == [["test/0.jpg", "glass", "glass", "confirm"]]
    press(page, "u")
    assert saved(page)[1][1:] == [["test/0.jpg", "glass", "metal", "correct"]]
    press(page, "u", "u")
    assert page.locator(".message").text_content() == "There is nothing to undo."
    assert page.locator(".count").text_content() == "0 of 9 done"
    press(page, "s")
    assert page.locator(".message").text_content() == "Nothing is decided yet."
    press(page, "Control+d")  # a key of the browser
    assert page.locator(".count").text_content() == "0 of 9 done"
    assert page.trouble == []
    context.close()


def test_an_image_in_two_cards_has_one_decision(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = opened(context, write_page(tmp_path))
    press(page, "d")
    badges = page.locator('.slot[data-path="test/0.jpg"] .decision').all_text_contents()
    assert badges == ["dropped", "dropped"]
    context.close()


def test_new_labels_are_saved_as_a_source_for_sharding(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = opened(context, write_page(tmp_path))
    page.locator('.slot[data-path="/new/0.jpg"]').click()
    assert "It is metal" in page.locator("[data-do=confirm]").text_content()
    press(page, "Enter", "3")
    name, rows = saved(page, "Shift+S")
    assert name == "new-labels.csv"
    assert rows == [["path", "label"], ["/new/0.jpg", "metal"], ["/new/1.jpg", "paper"]]
    press(page, "s")
    assert page.locator(".message").text_content() == "Nothing is decided yet."
    context.close()


def test_decisions_are_kept_for_the_same_set_only(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    path = write_page(tmp_path)
    page = opened(context, path)
    press(page, "a", "d")
    page.reload()
    assert page.locator(".count").text_content() == "2 of 9 done"
    assert current(page)[0] == "test/2.jpg"  # the first one that is left
    assert [row[3] for row in saved(page)[1][1:]] == ["correct", "drop"]
    page.goto(write_page(tmp_path, store="another set").as_uri())
    assert page.locator(".count").text_content() == "0 of 9 done"
    assert page.trouble == []
    context.close()


def test_a_browser_that_keeps_nothing_reports_it(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } })")
    page = opened(context, write_page(tmp_path))
    assert "does not keep" in page.locator(".message").text_content()
    press(page, "a")
    assert "does not keep" in page.locator(".message").text_content()
    assert saved(page)[1][1:] == [["test/0.jpg", "glass", "metal", "correct"]]
    context.close()


def test_a_phone_decides_by_touch(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = opened(context, write_page(tmp_path))
    page.locator("[data-do=accept]").tap()
    page.locator("[data-class=paper]").tap()
    page.locator('.slot[data-path="test/3.jpg"]').tap()
    page.locator("[data-do=drop]").tap()
    assert current(page)[0] == "test/4.jpg"
    with page.expect_download() as started:
        page.locator("[data-do=save]").tap()
    assert read_corrections(Path(started.value.path())).class_of == {
        "test/0.jpg": "metal",
        "test/1.jpg": "paper",
        "test/3.jpg": "",
    }
    assert Path(started.value.path()).read_text() == (
        "path,label,class,action\ntest/0.jpg,glass,metal,correct\ntest/1.jpg,glass,paper,correct\n"
        "test/3.jpg,glass,,drop\n"
    )
    assert page.trouble == []
    context.close()


def test_enter_on_a_button_that_was_reached_by_tab_presses_it(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = opened(context, write_page(tmp_path))
    page.locator("[data-do=drop]").focus()
    press(page, "Enter")
    page.locator("[data-class=metal]").click()  # by a pointer: Enter then confirms the next picture
    press(page, "Enter")
    assert [row[3] for row in saved(page)[1][1:]] == ["drop", "correct", "confirm"]
    context.close()
