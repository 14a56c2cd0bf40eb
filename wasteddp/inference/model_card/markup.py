"""Text that is data, such as names of classes, in Markdown and YAML: it is shown as it is and formats nothing."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from wasteddp.errors import inert

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_SPACE = re.compile(r"\s+")


def one_line(text: str) -> str:
    """Return the text in one line, without control characters and in valid Unicode."""
    return inert(_SPACE.sub(" ", text)).encode("utf-8", "backslashreplace").decode().strip()


def literal(text: str) -> str:
    """Return Markdown that shows the text as it is: CommonMark takes any punctuation after a backslash literally."""
    return _PUNCTUATION.sub(lambda found: "\\" + found.group(), one_line(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Its cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def front_matter(values: Mapping[str, Any], comment: str) -> str:
    """Return values as the YAML at the head of a file, without the closing line. Texts in it are of one line."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10**9)
    return f"---\n{comment}\n{text}"
