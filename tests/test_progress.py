"""The bar of a long step: nothing of it stays on a terminal before the next message, also after an error."""

from __future__ import annotations

import io
import sys
from math import inf, nan

import pytest

from wasteddp.parallel import duration, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_before_an_error(monkeypatch: pytest.MonkeyPatch, term: str) -> str:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", term)

    def fail() -> None:
        with progress("reading", 3) as advance:
            advance()
            raise ValueError("an error")

    with pytest.raises(ValueError, match="an error"):
        fail()
    return terminal.getvalue()


def test_the_bar_is_removed_before_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = shown_before_an_error(monkeypatch, "xterm")
    assert "reading" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")  # one line up, and cleared
    assert shown.count("\n") == 1


def test_a_terminal_that_cannot_remove_a_line_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_before_an_error(monkeypatch, "dumb") == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (3725, "62 min"), (7500, "2 h 5 min"), (nan, "unknown"), (inf, "unknown")]
)
def test_a_duration_is_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
