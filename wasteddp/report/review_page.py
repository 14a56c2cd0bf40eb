"""The page of `wasteddp review`: pictures whose labels a person confirms, corrects or drops, in one HTML file.

The page needs no server and no network, and its content security policy forbids every request. Decisions are kept in
the browser's localStorage, under a name that belongs to the shard set: a page that is written again continues. Saving
downloads a CSV with the columns path,label,class,action for `wasteddp shard --corrections`, or, of images that had no
label, one with path,label, which `wasteddp shard` reads as a source.
"""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from wasteddp import __version__

SIDE_PX = 256
QUALITY = 75  # about 8 KB a picture at this side
_HERE = Path(__file__).parent
_COMMAND_KEYS = "jkdusa"
# Keys of the first classes; other classes are chosen by their buttons.
CLASS_KEYS = "1234567890" + "".join(letter for letter in string.ascii_lowercase if letter not in _COMMAND_KEYS)


@dataclass(frozen=True, slots=True)
class Picture:
    """One image on the page."""

    path: str  # in the source, as a CSV has it
    label: str  # empty: it has none
    suggested: str  # class that it probably has; empty: unknown
    top: tuple[tuple[str, float], ...] = ()  # the most probable classes and their probabilities
    url: str = ""  # `data:` URL; empty: the image cannot be shown
    split: str = ""
    file: str = ""  # of an image that is not in the shard set


@dataclass(frozen=True, slots=True)
class Part:
    """A section of the page: cards of one picture, or of two that are compared."""

    name: str  # for links
    title: str
    about: str
    cards: Sequence[tuple[Picture, ...]]
    num_found: int  # with the cards that are not here
    empty: str  # text if nothing was found
    note: str = ""


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("review_page.html")


def render_review(
    title: str, lead: str, warnings: Sequence[str], parts: Sequence[Part], classes: Sequence[str], *, store: str
) -> str:
    """Return the page's HTML.

    Args:
        store: identifies the shard set; the decisions in the browser are kept under it.
    """
    script, style, more_style = (
        (_HERE / name).read_text(encoding="utf-8") for name in ("review_page.js", "page.css", "review_page.css")
    )
    keys = CLASS_KEYS[: len(classes)]
    return _template().render(
        title=title,
        lead=lead,
        warnings=warnings,
        parts=parts,
        classes=list(zip(classes, [*keys, *[""] * (len(classes) - len(keys))], strict=True)),
        store=store,
        style=style + more_style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        tool=f"wasteddp {__version__}",
    )
