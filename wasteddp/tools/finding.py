"""The findings of the checks before a run: a colour, a sentence, and what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wasteddp.errors import inert

Colour = Literal["green", "yellow", "red"]
EXIT_CODES: dict[Colour, int] = {"green": 0, "yellow": 1, "red": 2}
_VERDICTS: dict[Colour, str] = {
    "green": "ready to start",
    "yellow": "the run can start; read the yellow rows first",
    "red": "do not start: fix the red rows first, or the run would fail or be useless",
}
_WIDTH = 130


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    colour: Colour
    found: str
    do: str = ""


def worst(findings: Sequence[Finding]) -> Colour:
    return max((finding.colour for finding in findings), key=lambda colour: EXIT_CODES[colour], default="green")


def print_table(findings: Sequence[Finding], file: TextIO | None = None) -> None:
    """Print the findings as a table, and the verdict. Each colour is also a word, for logs and colour-blind readers."""
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=_WIDTH)
    table = Table(show_lines=True)
    for title in ("", "check", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        colour = finding.colour
        texts = (escape(inert(text)) for text in (finding.check, finding.found, finding.do))
        table.add_row(f"[{colour}]{colour}", *texts)
    console.print(table)
    colour = worst(findings)
    console.print(f"[{colour}]{colour}[/]: {_VERDICTS[colour]}")


def to_json(findings: Sequence[Finding]) -> str:
    colour = worst(findings)
    return json.dumps({"verdict": colour, "findings": [asdict(finding) for finding in findings]}, indent=1)
