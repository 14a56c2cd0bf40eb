"""The wait check of the GPU tests is off after each test, whatever happens."""

from __future__ import annotations

import warnings

import pytest
import torch
from gpu_waits import no_wait_for_the_gpu


def test_the_switch_is_off_afterwards_although_it_warns_and_the_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def switch(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)
    with pytest.raises(ZeroDivisionError), no_wait_for_the_gpu():
        _ = 1 / 0
    assert modes == ["error", "default"]
