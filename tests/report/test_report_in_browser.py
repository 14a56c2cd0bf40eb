"""A report in a real browser: no errors, no requests, nothing cut off, and the values under the pointer.

Skipped without Chromium: run `apt-get install chromium`, or set CHROMIUM to the path of another Chromium.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reported_run import sorted_items, write_decisions, write_reported_run

from wasteddp.decisions.calibration import calibrate
from wasteddp.inference.bundle import read_card, replace_card
from wasteddp.report.page import write_report

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_reported_run(tmp_path_factory.mktemp("browser"))
    found = calibrate(*sorted_items(5, 400), split="val")
    replace_card(run / "model", replace(read_card(run / "model"), temperature=2.0, calibration=found.to_json()))
    write_decisions(run, groups=40)
    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("script", [True, False], ids=["", "without its script"])
def test_the_page_opens_without_an_error_or_a_request_and_fits(
    browser: Any, run: Path, width: int, height: int, scheme: str, script: bool
) -> None:
    page_path = write_report([run])
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=script
    )
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "request", lambda request: trouble.append(request.url) if request.url[:5] not in ("file:", "data:") else None
    )
    page.goto(page_path.as_uri())
    assert page.title() == "run"
    assert page.locator("svg").count() >= 7
    assert page.get_by_text("Surest mistakes").is_visible()
    if script:  # `evaluate` needs JavaScript
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth") <= width, "the page is wider than the screen"
        broken = "[...document.images].filter((image) => !image.complete || !image.naturalWidth).length"
        assert page.evaluate(broken) == 0
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(paper.strip("rgb()").split(",")[0]) < 128) == (scheme == "dark")
    page.close()
    assert [one for one in trouble if not one.startswith(("file://" + str(page_path), "data:"))] == []


def test_the_figures_in_the_browser_are_those_of_the_files(browser: Any, run: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(write_report([run]).as_uri())
    rows = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    charts = dict(
        page.evaluate("""[...document.querySelectorAll("[data-chart]")].map((one) => [
            one.querySelector("figcaption").textContent.trim().split(" ")[0],
            JSON.parse(one.querySelector("script").textContent)])""")
    )
    loss = charts["Loss"]["lines"][0]
    assert loss["values"] == pytest.approx([rows[step]["train/loss"] for step in loss["steps"]], rel=1e-5)
    assert loss["steps"] == list(rows)
    record = json.loads((run / "evaluations" / "test" / "metrics.json").read_text())
    cells = page.locator("[data-confusion=test] tbody td").all_text_contents()
    assert [int(cell or 0) for cell in cells] == [count for row in record["confusion"] for count in row]

    plot = page.locator("[data-chart] .plot").first
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] - 4, "y": box["height"] / 2})
    tip = plot.locator(".tip div").all_text_contents()
    for words, metric in zip(tip, ("train/loss", "val/loss"), strict=True):
        _, value, _, _, step = words.split()  # such as: train 0.2994 · step 100
        assert float(value) == pytest.approx(rows[int(step)][metric], rel=1e-4)
        assert int(step) > 90
    page.close()


def test_the_decisions_in_the_browser_are_those_of_the_file(browser: Any, run: Path) -> None:
    record = json.loads((run / "evaluations" / "test" / "decisions.json").read_text())
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(write_report([run]).as_uri())
    section = page.locator("section.decisions")
    said = section.locator(".sentences").inner_text()
    assert f"{100 * record['error_alone']:.1f}\u00a0% go into a wrong bin" in said
    assert "it was reached here" in said, "the items are of groups, so nothing is promised"
    shares = section.locator("table.bins").first.locator("td.interval > span.number").all_inner_texts()
    expected = [f"{100 * row[name][0]:.1f} %" for row in record["bins"] for name in ("purity", "recovery")]
    assert shares == expected
    widths = section.locator(".thousand-bar span").evaluate_all("(all) => all.map((one) => one.offsetWidth)")
    assert sum(widths) == pytest.approx(section.locator(".thousand-bar").bounding_box()["width"], abs=4)
    drawn = section.locator(".curve path.line").get_attribute("d")
    assert drawn.count("L") == len(record["risk_coverage"]) - 1
    page.close()


def test_the_page_prints(browser: Any, run: Path) -> None:
    page = browser.new_page()
    page.goto(write_report([run]).as_uri())
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
