"""`evaluate` and `predict` on a GPU: processes, the default there, give the answers of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gpu_waits import ON_A_GPU
from small_run import write_run

from wasteddp.cli import main
from wasteddp.data.decoding.workers import Workers, start_workers
from wasteddp.inference import evaluate, predict

pytestmark = ON_A_GPU


@pytest.mark.parametrize("module", [evaluate, predict])
def test_processes_are_the_default_and_answer_as_threads_do(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kinds, answers = write_run(tmp_path), [], []

    @contextmanager
    def watched(asked: int | str, device_type: str) -> Iterator[Workers]:
        with start_workers(asked, device_type) as workers:
            kinds.append("threads" if workers.server is None else "processes")
            yield workers

    monkeypatch.setattr(module, "start_workers", watched)
    csv = run / "evaluations" / "test" / "predictions.csv" if module is evaluate else tmp_path / "answers.csv"
    command = ["evaluate", str(run)] if module is evaluate else ["predict", str(run), str(tmp_path / "images")]
    command += [] if module is evaluate else ["--csv", str(csv)]
    for workers in (["--workers", "2 threads"], []):
        assert main([*command, *workers]) == 0
        answers.append(csv.read_bytes())
        csv.unlink()
    assert kinds == ["threads", "processes"]
    assert answers[0] == answers[1]
