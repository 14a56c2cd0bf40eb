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
        return calls.read_text().splitlines()

    first, again, other, other_again, back = map(calls_with, ("", "", "https://other", "https://other", ""))
    assert [line.split()[0] for line in first] == ["install"]
    assert again == other_again == [], "it is up to date"
    assert [line.split()[0] for line in other] == ["uninstall", "install", "install"]
    assert "--index-url https://other torch torchvision" in other[1]
    assert [line.split()[0] for line in back] == ["uninstall", "install"]
