"""Hide secrets in text: nothing that a run writes or sends may contain one. No imports from the package.

These count as secrets: the password in a URL, a signature or token in its query, a string in the form of a known
service's key, and the value of an environment variable with a name such as API_KEY or TOKEN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[hidden]"
_SHORTEST = 12  # characters of an environment variable's value: shorter values are often ordinary words

_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]+(?=@)|(?<=://)[^/\s@:]{20,}(?=@)")
_IN_QUERY = re.compile(
    r"(?<=[?&])((?:[\w.-]*(?:signature|token|secret|passw|credential|key))[\w.-]*|sig)=[^&\s]+", re.IGNORECASE
)
# Sources: the services' documentation of their key formats; GitHub's list of secret scanning patterns.
_KEY = re.compile(
    r"\b(?:wandb_v1_\w{20,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|sk-[\w-]{20,}|xox[abp]-[\w-]{10,}|AIza[\w-]{30,})"
)


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the text with `[hidden]` in place of each secret."""
    text = _USER_IN_URL.sub(HIDDEN, text)
    text = _IN_QUERY.sub(rf"\1={HIDDEN}", text)
    text = _KEY.sub(HIDDEN, text)
    for name, value in environment.items():
        is_path = value.startswith("/")  # such as GOOGLE_APPLICATION_CREDENTIALS
        if len(value) >= _SHORTEST and value in text and not is_path and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    return text


def redacted_tree(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Apply `redacted` to every string inside lists and mappings; the keys of mappings stay unchanged."""
    if isinstance(value, str):
        return redacted(value, environment)
    if isinstance(value, Mapping):
        return {key: redacted_tree(inner, environment) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_tree(inner, environment) for inner in value]
    return value
