"""What was injected and how it ended, in a file, so that a long test can be made in pieces."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path


class Results:
    """A row for each point: program, injected, its number, result."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows: dict[tuple[str, str, int], str] = {(r[0], r[1], r[2]): r[3] for r in map(json.loads, lines)}

    @property
    def num(self) -> int:
        return len(self._rows)

    def has(self, program: str, injected: str, number: int) -> bool:
        return (program, injected, number) in self._rows

    def add(self, program: str, injected: str, number: int, result: str) -> None:
        self._rows[program, injected, number] = result
        with self._path.open("a") as file:
            file.write(json.dumps([program, injected, number, result]) + "\n")

    def counts(self, injected: str, program: str = "") -> Counter[str]:
        """Return how often each result came; of all programs if none is named."""
        return Counter(
            result for (name, what, _), result in self._rows.items() if what == injected and program in ("", name)
        )

    def table(self, rows: Mapping[str, object], programs: Iterable[str]) -> str:
        """Return a Markdown table with a row for each injection; `rows` may have words for it."""
        names = list(programs)
        lines = [f"| injected | {' | '.join(names)} | result |", "| --- " * (len(names) + 2) + "|"]
        for injected, words in rows.items():
            points = [str(self.counts(injected, name).total()) for name in names]
            ended = ", ".join(f"{count} {result}" for result, count in self.counts(injected).most_common())
            lines.append(f"| {words if isinstance(words, str) else injected} | {' | '.join(points)} | {ended} |")
        return "\n".join(lines)
