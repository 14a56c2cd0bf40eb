"""Fixtures of the GPU tests: they free the memory of each test, and report measurements.

    python -m pytest -m gpu

Each module marks its tests with `pytestmark = ON_A_GPU`, so that they are skipped without a GPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

_MEASURED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASURED] = []


@pytest.fixture(scope="module", autouse=True)
def _full_width(full_width: None) -> None:
    """Measure the networks of users, not narrow ones."""


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A function that takes a line with a number and its unit; the line is printed at the end of the run."""
    return request.config.stash.setdefault(_MEASURED, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(_MEASURED, []):
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        terminalreporter.section(f"measured on {card}, torch {torch.__version__}")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Empty torch's cache: the next test could not use its memory."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
