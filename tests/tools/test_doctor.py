"""The checks before a run: each problem is found, with its colour and what to do."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from faulty_server import serving
from small_run import CLASSES
from trainings import CPU2, ROOT, config_of

from wasteddp import cli
from wasteddp.data.manifest import Manifest
from wasteddp.settings import load, parse
from wasteddp.tools import machine_checks, run_checks
from wasteddp.tools.machine_checks import Device, Finding, print_table, worst
from wasteddp.training.checkpoint import reader
from wasteddp.training.checkpoint.progress import Lineage, Progress
from wasteddp.training.tracking import wandb_client

pytestmark = pytest.mark.usefixtures("full_width")  # these tests check the size of a checkpoint


def findings_of(said: str) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in json.loads(said)["findings"]}


def test_a_machine_alone_is_looked_at_from_versions_to_the_dashboard(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *config_of(tmp_path, small_shards), "--json", "--signal-leaves-s", "60"])
    found = findings_of(capsys.readouterr().out)
    assert list(found) == [
        "versions", "precision", "processes", "devices", "load", "/dev/shm", "clock",
        "shards", "weights", "all-reduce", "folder", "file system", "disk", "saving", "W&B",
    ]  # fmt: skip
    assert {found[name]["colour"] for name in ("precision", "shards", "weights", "folder", "file system")} == {"green"}
    assert "50 train, 13 val images" in found["shards"]["found"]
    assert "1 process(es) x 6 images x 2 accumulated = global batch 12" in found["processes"]["found"]
    assert "a checkpoint of 90 MB takes" in found["saving"]["found"]
    assert ended.value.code == max({"green": 0, "yellow": 1, "red": 2}[one["colour"]] for one in found.values())
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_two_processes_try_how_they_work_together(small_shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(CPU2)]
    command += ["-m", "wasteddp.tools.doctor", *config_of(tmp_path, small_shards), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    found = findings_of(done.stdout)
    assert "right on all 2 ranks" in found["all-reduce"]["found"]
    assert "2 x " in found["devices"]["found"]
    assert "between the earliest and the latest" in found["clock"]["found"]
    assert "2 process(es) x 6 images" in found["processes"]["found"]


def test_damage_is_red_and_named(small_shards: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    settings = parse(f"data: {{shards: {shards}}}\ntrain: {{batch_size: 8}}")
    assert run_checks.check_shards(settings, 0)[0].colour == "green"
    tar = shards / "val-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:1024] + b"x" * 64 + whole[1088:])
    finding, opened = run_checks.check_shards(settings, 0)
    assert (finding.colour, opened) == ("red", None)
    assert "val-000000.tar, sample" in finding.found
    assert "wasteddp verify" in finding.do
    tar.write_bytes(whole[:-512])
    assert "in the manifest it has" in run_checks.check_shards(settings, 0)[0].found
    assert run_checks.check_shards(parse("data: {shards: /nowhere}"), 0)[0].colour == "red"


def test_versions_are_compared_with_the_tested_ones() -> None:
    tested = machine_checks.versions_tested()
    assert tested.keys() >= {"torch", "accelerate", "safetensors"}
    assert "pytest" not in tested
    same = version("torch")
    assert machine_checks.check_versions({"torch": same}).colour == "green"
    other = machine_checks.check_versions({"torch": "1.0.0"})
    assert other.colour == "yellow"
    assert f"torch {same} (tested: 1.0.0)" in other.found
    missing = machine_checks.check_versions({"torch": same, "no-such-package": "1"})
    assert (missing.colour, missing.found) == ("red", "not installed: no-such-package")
    assert machine_checks.check_versions({}).colour == "yellow"


def device(rank: int, *, host: str = "node1", identity: str = "cpu", free: float = 1.0, threads: int = 1) -> Device:
    return Device(
        rank, host, identity, "H100" if identity != "cpu" else "x86_64", free, threads, cores=frozenset(range(4))
    )


def test_two_ranks_on_one_gpu_are_red_and_the_same_number_on_two_machines_is_not() -> None:
    shared = machine_checks.check_devices([device(0, identity="GPU-a"), device(1, identity="GPU-a")])
    assert shared.colour == "red"
    assert "ranks 0, 1 share the GPU GPU-a of node1" in shared.found
    apart = [device(0, identity="GPU-a"), device(1, host="node2", identity="GPU-b")]
    assert machine_checks.check_devices(apart) == Finding("devices", "green", "2 x H100 on 2 machine(s)")
    full = machine_checks.check_devices([device(0, identity="GPU-a", free=0.4)])
    assert full.colour == "yellow"
    assert "other programs use 60% of the memory of rank 0's GPU" in full.found
    crowded = machine_checks.check_devices([device(0, threads=4), device(1, threads=4)])
    assert crowded.colour == "yellow"
    assert "8 threads on the 4 cores of node1" in crowded.found


def test_clocks_shared_memory_and_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_checks.check_clocks([1e9, 1e9 + 0.2]).colour == "green"
    assert machine_checks.check_clocks([1e9, 1e9 + 5]).colour == "yellow"
    assert machine_checks.check_clocks([1e9, 1e9 + 500]).colour == "red"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 << 20))
    assert (
        machine_checks.check_shared_memory(8, tmp_path).do
        == "in a container: start it with --shm-size=2g or --ipc=host"
    )
    assert machine_checks.check_shared_memory(0, tmp_path).colour == "green"
    assert machine_checks.check_precision("fp16").colour == "red"
    assert machine_checks.check_precision("fp32").colour == "green"


def test_disk_and_the_time_that_a_signal_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "runs" / "new"
    assert run_checks.check_save(out, 1 << 20, leaves_s=1000).colour == "green"
    assert not out.exists()
    monkeypatch.setattr(run_checks, "_seconds_to_write", lambda *_: 20.0)
    assert run_checks.check_save(out, 1 << 20, leaves_s=30).colour == "yellow"
    assert "the last state would be lost" in run_checks.check_save(out, 1 << 20, leaves_s=10).found
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000_000))
    colours = [run_checks.check_disk(out, size).colour for size in (500_000_000, 1_000_000_000, 3_000_000_000)]
    assert colours == ["green", "yellow", "red"]
    (tmp_path / "file").write_text("")
    assert run_checks.check_save(tmp_path / "file" / "run", 1, leaves_s=1).colour == "red"


def test_a_set_at_a_url_is_read_as_a_run_reads_it(small_shards: Path, tmp_path: Path) -> None:
    with serving(small_shards) as server:
        settings = parse(f"data: {{shards: {server.url}, cache: {tmp_path / 'cache'}}}\ntrain: {{batch_size: 8}}")
        finding, opened = run_checks.check_shards(settings, 0)
        assert (finding.colour, opened.manifest.classes if opened else ()) == ("green", CLASSES), finding.found
        small = settings.model_copy(update={"train": settings.train.model_copy(update={"batch_size": 64})})
        assert "64" in run_checks.check_shards(small, 0)[0].found
    assert run_checks.check_shards(parse(f"data: {{shards: {server.url}, read_attempts: 1}}"), 0)[0].colour == "red"


def test_missing_weights_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_checks.check_weights(parse("model: {weights: none, arch: resnet18}"), ("a", "b")).colour == "green"
    missing = run_checks.check_weights(parse(f"model: {{weights: {tmp_path}/no.pth, arch: resnet18}}"), ("a", "b"))
    assert (missing.colour, "there is no such file" in missing.found) == ("red", True)
    teacher = parse(f"model: {{weights: none, arch: resnet18}}\ntrain: {{teacher: {tmp_path}}}")
    assert run_checks.check_weights(teacher, ("a", "b")).colour == "red"


def test_a_loaded_machine_is_yellow() -> None:
    assert [machine_checks.check_load(running, 8).colour for running in (0.5, 4.0, 4.5)] == ["green", "green", "yellow"]


def test_a_file_system_without_locks_or_folder_sync_is_yellow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "runs" / "new"
    assert run_checks.check_file_system(out).colour == "green"
    assert not out.exists()
    monkeypatch.setattr(run_checks, "sync_folder", lambda _: False)
    assert "cannot be synced" in run_checks.check_file_system(out).found

    def try_lock(descriptor: int) -> bool:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_checks, "try_lock", try_lock)
    finding = run_checks.check_file_system(out)
    assert (finding.colour, finding.found) == ("yellow", f"files in {out} cannot be locked: Function not implemented")


def test_the_folder_of_another_run_is_red(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"data: {{shards: {small_shards}}}\ntrain: {{batch_size: 8, epochs: 10}}\nrun: {{out: runs/x}}"
    manifest, lines = Manifest.load(small_shards), dict[str, Finding]()
    assert run_checks.check_folder(parse(text), run_checks.Opened(manifest, 6)).found == "runs/x: a new run"
    then = Progress(Lineage.of(parse(text), manifest), step=30)
    checkpoint = reader.Checkpoint(Path("step-30"), then, {}, parse(text).to_yaml())
    monkeypatch.setattr(reader, "newest", lambda folder, say: checkpoint)
    for override in ("run.threads=0", "optimizer.lr=0.5", "run.seed=7", "train.epochs=5", "train.stop_at_step=20"):
        lines[override] = run_checks.check_folder(parse(text, [override]), run_checks.Opened(manifest, 6))
    assert [line.colour for line in lines.values()] == ["green", "yellow", "red", "red", "red"]
    assert lines["run.threads=0"].found == "runs/x: continues from step 30 of 60"
    assert "changed: optimizer.lr was" in lines["optimizer.lr=0.5"].found
    assert "--accept-changes seed" in lines["run.seed=7"].do
    checkpoint = replace(checkpoint, progress=replace(then, step=60))
    finished = run_checks.check_folder(parse(text), run_checks.Opened(manifest, 6))
    assert (finished.colour, "nothing would be trained" in finished.found) == ("yellow", True)


def test_the_dashboard_s_mode_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert run_checks.check_wandb("disabled").found == "disabled, as set"
    assert run_checks.check_wandb("offline").found == "offline: as set"
    monkeypatch.setattr(wandb_client, "choose", lambda _: wandb_client.Mode("offline", "no API key"))
    assert run_checks.check_wandb("online").colour == "yellow"
    assert run_checks.check_wandb("auto").colour == "green"


def test_the_size_of_a_checkpoint_is_that_of_the_model(small_shards: Path, tmp_path: Path) -> None:
    settings = load(config_of(tmp_path, small_shards)[1])
    assert 44e6 < run_checks.model_bytes(settings.model.arch, 3) < 46e6  # ResNet18: 11.2 million weights of 4 bytes


def test_the_table_can_be_read_without_colours() -> None:
    findings = [Finding("disk", "green", "2 TB free"), Finding("clock", "yellow", "5 s [apart]", "set the clocks")]
    file = io.StringIO()
    print_table(findings, file)
    assert "yellow: the run can start; read the yellow rows first" in file.getvalue()
    assert "5 s [apart]" in file.getvalue()
    assert worst(findings) == "yellow"
    assert worst([*findings, Finding("shards", "red", "none")]) == "red"


def test_a_wrong_setting_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--set", "optimizer.rl=1"])
    assert ended.value.code == 2
    assert "did you mean" in capsys.readouterr().err
