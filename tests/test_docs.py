"""The links and paths of the documentation exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "runs"} & set(path.relative_to(ROOT).parts))
FOLDERS = "tests|configs|shards|launch|slurm|docs|wasteddp"


def _headings(page: Path) -> Iterator[str]:
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            yield re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")  # as GitHub names them


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link, heading in re.findall(r"\]\(([^)#\s]+)(?:#([^)]*))?\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page} links to {link}"
            assert not heading or heading in _headings(page.parent / link), f"{page} links to {link}#{heading}"
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.(?:py|md|sh|yaml|txt|json))`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_each_page_of_docs_is_in_its_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"({path.name})" not in index] == ["README.md"]


def test_the_names_of_code_md_are_defined_where_it_says() -> None:
    rows = re.findall(r"^\|[^|]*\| `([\w/.]+)` \| (.*) \|$", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE)
    assert len(rows) > 60
    for path, names in rows:
        code = (ROOT / "wasteddp" / path).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def |class )?{name}\b", code, re.MULTILINE), f"{path} does not define {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_remarks_on_commands_are_comments(page: Path) -> None:
    programs = r"(?:wasteddp|python3?|pip|bash|accelerate|torchrun|sbatch|[A-Z_]+=\S+)"
    found = re.findall(rf"^    {programs} \S.*? {{3,}}[^ #|].*$", page.read_text(), re.MULTILINE)
    assert not found, "a command must run as it is copied"
