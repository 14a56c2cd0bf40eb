"""The page at /: drop, paste or take photos. It is in the style of the report, and shows text as text."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from wasteddp.decisions.unlikeness import UNLIKE_FROM

_CSS = (files("wasteddp.report") / "page.css").read_text("utf-8") + (files(__package__) / "try.css").read_text("utf-8")
_JS = (files(__package__) / "try.js").read_text("utf-8").replace("{unlike_from}", f"{UNLIKE_FROM:g}")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Nothing else runs or is loaded; the photos' previews are blobs of the page itself.
POLICY = (
    f"default-src 'none'; style-src {_hash(_CSS)}; script-src {_hash(_JS)}; img-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page(*, needs_token: bool, keeps: bool) -> str:
    """Return the page.

    Args:
        needs_token: it has a field for the token, which the page keeps until it is closed.
        keeps: the server keeps doubtful photos.
    """
    kept = "which keeps those that it is not sure of, for labelling" if keeps else "which keeps none"
    hidden = "" if needs_token else " hidden"
    html = (files(__package__) / "try.html").read_text("utf-8")
    return html.replace("{css}", _CSS).replace("{js}", _JS).replace("{token_hidden}", hidden).replace("{kept}", kept)
