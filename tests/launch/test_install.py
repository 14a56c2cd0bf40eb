"""`launch/install.sh` with a stand-in for pip: what is installed again, and when."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_torch_is_replaced_if_it_is_to_come_from_another_index(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    pip, calls = tmp_path / ".venv" / "bin" / "pip", tmp_path / "calls"
    pip.parent.mkdir(parents=True)
    pip.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n')
    pip.chmod(0o755)

    def calls_with(index: str) -> list[str]:
        calls.write_text("")
        environment = {**os.environ, "TORCH_INDEX_URL": index}
        subprocess.run(["bash", "launch/install.sh"], cwd=tmp_path, env=environment, check=True, capture_output=True)
        return [line.partition(" --quiet")[0] + line[-18:] for line in calls.read_text().splitlines()]

    assert len(calls_with("")) == 1
    assert calls_with("") == [], "it is up to date"
    others = ["uninstall" + " torch torchvision"[-18:], "install" + " torch torchvision"[-18:]]
    assert calls_with("https://other")[:2] == others
    assert calls_with("https://other") == []
    assert calls_with("")[0] == others[0]
