"""`wasteddp train`: its processes, its exit codes, and a new run from the model of a finished one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import CLASSES, write_images
from trainings import PROGRAM, ROOT, config_of, rows

from wasteddp import cli, settings, train
from wasteddp.inference.bundle import load_bundle
from wasteddp.sharding.build import Job, Options, make_shards
from wasteddp.training.distributed import launcher

pytestmark = pytest.mark.processes
# `wasteddp train`, with the program whose network is narrow
COMMAND = [
    sys.executable, "-c",
    "import sys; from pathlib import Path; from wasteddp.training.distributed import launcher; "
    f"launcher.launch.__kwdefaults__['program'] = Path({str(PROGRAM)!r}); "
    "from wasteddp import cli; sys.exit(cli.main(['train', *sys.argv[1:]]))",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + 120
    while not (run / "checkpoints" / f"step-{step:08d}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_signal_saves_once_and_the_same_command_ends_the_run(small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--processes", "2", "--set", "train.epochs=200"]
    process = start(arguments)
    wait_for_step(tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)  # Ctrl-C: passed on once, since a second one leaves at once
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    _, *after = re.split(r"^stopped by SIGINT at step \d+ and saved; .*\n(?=report: )", output, flags=re.MULTILINE)
    assert len(after) == 1, output  # once, and then the report
    assert len(after[0].strip().splitlines()) == 1, output  # no stack of a rank that lost the store of rank 0
    step = rows(tmp_path / "run")[-1]["step"]
    process = start([*arguments, "--set", f"train.stop_at_step={step + 3}"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert rows(tmp_path / "run")[-1]["step"] == step + 3


def test_two_processes_end_with_the_programs_code_and_message(small_shards: Path, tmp_path: Path) -> None:
    process = start([*config_of(tmp_path, small_shards), "--processes", "2", "--set", "model.arch=resnet51"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "'resnet51' is not a classifier" in output
    assert "Traceback" not in output


def test_where_the_launcher_is_killed_the_run_saves(small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--processes", "2", "--set", "train.epochs=200"]
    process = start(arguments)
    wait_for_step(tmp_path / "run", 2)
    process.kill()
    process.communicate(timeout=120)  # until the processes have ended: they hold the pipe
    until = time.monotonic() + 60
    while not (tmp_path / "run" / "RESUMABLE").exists():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_killed_process_ends_the_others_and_the_command_fails(small_shards: Path, tmp_path: Path) -> None:
    arguments = [*config_of(tmp_path, small_shards), "--processes", "2", "--set", "train.epochs=200"]
    process = start([*arguments, "--set", "run.timeout_s=5"])
    wait_for_step(tmp_path / "run", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 70


def test_the_arguments_reach_the_program_as_they_were_given() -> None:
    line = ["--config", "a b.yaml", "--set", "run.out=x #2", "--set", "train.epochs=3", "--resume", "never"]
    line += ["--accept-changes", "seed,lanes", "--check"]
    given = launcher.parser(None).parse_args(line)
    assert launcher.parser(None).parse_args(launcher.as_given(given)) == given


def test_without_a_device_file_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_GPU_FILES", ("/none",))
    assert launcher.num_gpus() == 0


def test_a_new_run_on_a_grown_set_starts_from_the_old_model(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weekly routine: new images, one class more."""
    assert train.main(config_of(tmp_path, small_shards)) == 0
    run, classes = tmp_path / "run", (*CLASSES, "wood")
    grown = write_images(tmp_path / "images", {"train": (20, 22, 20, 9), "val": (5, 5, 5, 4)}, classes)
    make_shards(Job(grown, tmp_path / "grown", Options()), workers=1)
    lines: list[list[str]] = []
    monkeypatch.setattr(launcher, "launch", lambda line, num, more: lines.append(list(line)) or 0)
    weekly = [
        "train",
        "--from",
        str(run),
        "--out",
        str(tmp_path / "next"),
        "--set",
        f"data.shards={tmp_path / 'grown'}",
    ]
    assert cli.main([*weekly, "--cpu"]) == 0
    capsys.readouterr()
    assert train.main([*lines[0], "--set", "train.stop_at_step=1", "--set", "optimizer.lr=1e-9"]) == 0
    assert f"the model of {run}" in capsys.readouterr().out
    card, old = load_bundle(run)
    new = load_file(tmp_path / "next" / "checkpoints" / "step-00000001" / "model.safetensors")
    rows_of = [(classes.index(name), card.classes.index(name)) for name in card.classes]
    for to, of in rows_of:
        assert torch.allclose(new["fc.weight"][to], old["fc.weight"][of], atol=1e-6)
    assert torch.allclose(new["conv1.weight"], old["conv1.weight"], atol=1e-6)
    assert json.loads((tmp_path / "next" / "model" / "model.json").read_text())["classes"] == list(classes)


def test_a_new_run_needs_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yaml").write_text("")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--from", str(tmp_path)])
    assert f"--out {tmp_path}-2" in capsys.readouterr().err


def test_a_new_run_does_not_read_the_old_runs_copy_of_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy on a node's disk is of the old set."""
    (tmp_path / "settings.yaml").write_text("data: {shards: old, staged: /local/old}")
    lines: list[list[str]] = []
    monkeypatch.setattr(launcher, "launch", lambda line, num, more: lines.append(list(line)) or 0)
    assert cli.main(["train", "--cpu", "--from", str(tmp_path), "--out", "x", "--set", "data.shards=new"]) == 0
    given = launcher.parser(None).parse_args(lines[0])
    data = settings.load(given.config, given.set).data
    assert (data.shards, data.staged) == ("new", "")


def test_a_wrong_argument_is_reported_before_torch_is_imported() -> None:
    """Also by the program itself, which a launcher starts."""
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--confg', 'x']\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    )
    code += "finally: print('torch' in sys.modules)"
    program = str(ROOT / "wasteddp" / "train.py")
    done = subprocess.run([sys.executable, "-c", code.format(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["predcit", "x"])
    assert "did you mean 'predict'?" in capsys.readouterr().err


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "wasteddp", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout[:8]) == (0, "wasteddp")


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("os.kill(os.getpid(), 9)", 70, "error: every process was killed, the first by SIGKILL"),
        (
            "sys.exit(3) if rank == 0 else time.sleep(60)",
            3,
            "killed rank 1: still running 0.5 s after the first failure",
        ),
        ("sys.exit(75)", 75, ""),
        ("sys.exit(0)", 0, ""),
        ("time.sleep(1.5 * rank)", 0, ""),  # who ends well does not end the others
    ],
)
def test_the_ends_of_two_processes_become_one(program: str, code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{program}\n")
    start = (
        "import sys; from pathlib import Path; from wasteddp.training.distributed import launcher; "
        "launcher._END_S = 0.5; sys.exit(launcher.launch([], 2, program=Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, str(tmp_path / "program.py")],
        env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert bool(message) == bool(done.stderr)
