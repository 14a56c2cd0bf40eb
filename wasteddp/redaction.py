"""Hide secrets in text: nothing that a run writes or sends may contain one. No imports from the package.

These count as secrets: the user and password in a URL; a value with a name such as password, token or auth, in a URL's
query, after `=`, or in JSON and YAML; what follows `Bearer`; a string in the form of a known service's key; and the
value of an environment variable with a name such as API_KEY, TOKEN or DB_PWD, also percent-encoded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "[hidden]"
_SHORTEST = 12  # characters of a variable's value: shorter values are often ordinary words
_SHORTEST_PASSWORD = 6  # of a variable that holds a password, token or secret by its name

# Names of variables. PWD and OLDPWD themselves are folders; AUTHOR is not AUTH.
_PASSWORD_NAME = re.compile(r"passw|passphrase|(?<!^)(?<!^OLD)pwd|secret|token", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r"key|token|secret|passw|passphrase|(?<!^)(?<!^OLD)pwd|credential|auth(?!or)|bearer|signature|dsn", re.IGNORECASE
)
_WORDS = (
    r"(?:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|account[_-]?key|auth|authorization)"
)
# Up to the last @ that a host follows: passwords may hold / and @. A host with a port and a path is not a password.
_USER_IN_URL = re.compile(r"(?<=://)(?![\w.-]+:\d+/)[^\s\"'<>]*:[^\s\"'<>]*(?=@\[?[\w.-]+)|(?<=://)[^/\s@:]{20,}(?=@)")
_IN_QUERY = re.compile(
    r"(?<=[?&])((?:[\w.-]*(?:signature|token|secret|passw|pwd|credential|key|auth))[\w.-]*|sig)=[^&\s]+", re.IGNORECASE
)
_NAMED = re.compile(rf"(?<![\w-])((?:[\w-]*[_-])?{_WORDS})=(?!\[hidden\])[^\s&;,\"']{{4,}}", re.IGNORECASE)
# A line of YAML, or a value of JSON; not a colon in prose.
_IN_TREE = re.compile(
    rf"""((?:^|[{{,])\s*["']?(?:[\w-]*[_-])?{_WORDS}["']?\s*:\s*["']?)(?!\[hidden\])[^\s"',}}][^"',}}\n]{{3,}}""",
    re.IGNORECASE | re.MULTILINE,
)
_BEARER = re.compile(r"\b(bearer|authorization:\s*basic)\s+(?!\[hidden\])[\w.~+/=-]{8,}", re.IGNORECASE)
# Sources: the services' documentation of their key formats; GitHub's list of secret scanning patterns.
_KEY = re.compile(
    r"\b(?:wandb_v1_\w{20,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|sk-[\w-]{20,}|[sr]k_(?:live|test)_\w{16,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{30,}"
    r"|ya29\.[\w-]{20,}|npm_\w{30,}|pypi-[\w-]{20,}|dop_v1_\w{20,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,})"
    r"|hooks\.slack\.com/services/[\w/]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the text with `[hidden]` in place of each secret."""
    for name, value in environment.items():
        if not _SECRET_NAME.search(name) or _is_path(value):
            continue
        if len(value) >= (_SHORTEST_PASSWORD if _PASSWORD_NAME.search(name) else _SHORTEST):
            for form in (value, quote(value, safe=""), quote(value), quote_plus(value)):
                text = text.replace(form, HIDDEN)
    text = _USER_IN_URL.sub(HIDDEN, text)
    text = _IN_QUERY.sub(rf"\1={HIDDEN}", text)
    text = _KEY.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _NAMED.sub(rf"\1={HIDDEN}", text)
    return _IN_TREE.sub(rf"\1{HIDDEN}", text)


def _is_path(value: str) -> bool:
    """Whether a variable names a file, such as GOOGLE_APPLICATION_CREDENTIALS. A key may begin with / as well."""
    return value.startswith("/") and (Path(value).suffix != "" or Path(value).exists())


def redacted_tree(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Apply `redacted` to every string inside lists and mappings; the keys of mappings stay unchanged."""
    if isinstance(value, str):
        return redacted(value, environment)
    if isinstance(value, Mapping):
        return {key: redacted_tree(inner, environment) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_tree(inner, environment) for inner in value]
    return value
