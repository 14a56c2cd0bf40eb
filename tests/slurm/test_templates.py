"""What slurm/train.sh makes of what Slurm says, without a Slurm: `srun` and its kin are stand-ins that take notes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "configs/quickstart.yaml"

# Each notes its arguments, one a line; srun then runs the command behind its options, as the first node would.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >>"$NOTES/srun"; echo >>"$NOTES/srun"
while [[ $1 == --* ]]; do shift; done
PATH=$NOTES/bin:$PATH SLURM_NODEID=0 exec "$@"
"""
STAND_INS = {
    "srun": SRUN,
    "accelerate": '#!/bin/bash\nprintf "%s\\n" "$@" >"$NOTES/accelerate"; env >"$NOTES/environment"\n',
    "apptainer": '#!/bin/bash\nprintf "%s\\n" "$@" >"$NOTES/apptainer"; shift 5; "$@"\n',
    "scontrol": "#!/bin/bash\necho n1; echo n2\n",
    "squeue": "#!/bin/bash\necho RUNNING\n",
}
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "wasteddp", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "4"}

Template = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def template(tmp_path: Path) -> Template:
    """Runs train.sh as a job's batch script; `tmp_path` has the notes."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(
        *arguments: str, site: str = "", cwd: Path = ROOT, nodes: int = 1, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "site.sh").write_text(site)
        given = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        given |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **JOB}
        given |= {"NOTES": str(tmp_path), "SITE": str(tmp_path / "site.sh"), "RUN_OUT": str(tmp_path / "run")}
        given |= {"SLURM_JOB_NUM_NODES": str(nodes), **environment}
        command = ["bash", str(ROOT / "slurm" / "train.sh"), *arguments]
        return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, check=False)

    return run


def noted(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()


def environment_of(folder: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in noted(folder, "environment") if "=" in line)


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    ("nodes", "gpus", "config", "ranks"),
    [
        (1, "", "cpu.yaml", "1"),
        (1, "1", "gpu.yaml", "1"),
        (1, "8", "nodes.yaml", "8"),
        (4, "8", "nodes.yaml", "32"),
        (2, "", "nodes.yaml", "2"),
        (2, "0", "nodes.yaml", "2"),
        (3, "1", "nodes.yaml", "3"),
    ],
)
def test_the_world_is_what_slurm_says(
    template: Template, tmp_path: Path, nodes: int, gpus: str, config: str, ranks: str
) -> None:
    environment = {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    done = template("--config", CONFIG, nodes=nodes, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    words = noted(tmp_path, "accelerate")
    assert after(words, "--config_file") == f"launch/accelerate/{config}"
    assert after(words, "--num_processes") == ranks
    assert after(words, "--num_machines") == str(nodes)
    assert after(words, "--machine_rank") == "0"
    assert after(words, "--main_process_ip") == "n1"
    assert after(words, "--main_process_port") == "20017"
    assert words[-3:] == [CONFIG, "--set", f"run.out={tmp_path / 'run'}"]
    steps = (tmp_path / "srun").read_text().split("\n\n")
    assert "--nodes=1\n" in steps[0]  # the check of the settings
    assert f"--nodes={nodes}\n--ntasks={nodes}\n--ntasks-per-node=1\n" in steps[1]
    assert "--cpus-per-task=4\n" in steps[1]


def test_nodes_without_gpus_may_have_several_processes(template: Template, tmp_path: Path) -> None:
    template("--config", CONFIG, nodes=2, PROCESSES_PER_NODE="4")
    assert after(noted(tmp_path, "accelerate"), "--num_processes") == "8"


def test_options_of_torchrun_in_the_environment_do_not_leak_in(template: Template, tmp_path: Path) -> None:
    """Guards `unset` of train.sh: torchrun takes PET_MAX_RESTARTS for --max_restarts."""
    template("--config", CONFIG, PET_MAX_RESTARTS="9")
    assert "PET_MAX_RESTARTS" not in environment_of(tmp_path)


def test_the_program_knows_how_early_the_warning_comes(template: Template, tmp_path: Path) -> None:
    template("--config", CONFIG)
    assert environment_of(tmp_path)["WASTEDDP_WARNING_S"] == "300"
    template("--config", CONFIG, SBATCH_SIGNAL="B:USR1@900")
    assert environment_of(tmp_path)["WASTEDDP_WARNING_S"] == "900"


def test_apptainer_is_put_before_every_command(template: Template, tmp_path: Path) -> None:
    done = template("--config", CONFIG, site="INSIDE=(apptainer exec --nv --bind '/a b' IMAGE)\n")
    assert done.returncode == 0, done.stderr
    assert noted(tmp_path, "apptainer")[:5] == ["exec", "--nv", "--bind", "/a b", "IMAGE"]
    assert "accelerate launch" in (tmp_path / "apptainer").read_text()
    assert noted(tmp_path, "accelerate")[0] == "launch"


def test_pyxis_is_given_to_srun(template: Template, tmp_path: Path) -> None:
    site = 'SRUN_OPTIONS=(--container-image=/i/w.sqsh --container-mounts="$PWD:$PWD")\n'
    assert template("--config", CONFIG, site=site).returncode == 0
    both = f"--container-image=/i/w.sqsh\n--container-mounts={ROOT}:{ROOT}\nbash\n-c\n"
    assert (tmp_path / "srun").read_text().count(both) == 2  # the check of the settings, and the training


def test_the_example_of_a_sites_file_can_be_used_as_it_is(template: Template, tmp_path: Path) -> None:
    example = (ROOT / "slurm" / "site.example.sh").read_text()
    assert template("--config", CONFIG, site=example).returncode == 0
    sourced = ["bash", "-euc", f"source {tmp_path / 'site.sh'}; echo $SBATCH_ACCOUNT $SBATCH_PARTITION"]
    assert subprocess.run(sourced, capture_output=True, text=True, check=True).stdout == "my-project gpu\n"


def test_an_element_of_an_array_is_a_seed_or_a_line_of_the_sweep(template: Template, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "2"}
    template("--config", CONFIG, **array)
    words = noted(tmp_path, "accelerate")
    assert words[-4:] == ["--set", "run.seed=2", "--set", f"run.out={tmp_path / 'run' / '2'}"]
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--set optimizer.lr=0.1\n--set optimizer.lr=0.2 --set 'track.project=a b'\n")
    template("--config", CONFIG, SWEEP=str(sweep), **array)
    words = noted(tmp_path, "accelerate")
    assert words[-6:-2] == ["--set", "optimizer.lr=0.2", "--set", "track.project=a b"]
    done = template("--config", CONFIG, SWEEP=str(sweep), **{**array, "SLURM_ARRAY_TASK_ID": "3"})
    assert done.returncode == 2
    assert f"error: {sweep} has no line 3" in done.stdout


def test_the_runs_folder_can_be_set_like_any_setting(template: Template, tmp_path: Path) -> None:
    template("--config", CONFIG, "--set", f"run.out={tmp_path / 'mine'}")
    assert noted(tmp_path, "accelerate")[-1] == f"run.out={tmp_path / 'mine'}"
    assert (tmp_path / "mine").is_dir()


def test_a_mistake_in_the_settings_launches_nothing(template: Template, tmp_path: Path) -> None:
    done = template("--config", "configs/none.yaml")
    assert done.returncode == 2
    assert "reading the settings" in done.stderr
    assert not (tmp_path / "accelerate").exists()


def test_a_job_that_was_not_submitted_from_the_checkout_says_so(template: Template, tmp_path: Path) -> None:
    done = template("--config", CONFIG, cwd=tmp_path)
    assert done.returncode == 2
    assert "slurm/common.sh: No such file" in done.stderr


def test_a_staged_copy_is_made_once_verified_each_time_and_removed_if_it_is_damaged(
    small_shards: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "disk" / "shards-1"

    def stage() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", str(ROOT / "slurm" / "stage.sh"), str(small_shards), str(copy)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert stage().returncode == 0
    made = copy.stat().st_ino
    assert stage().returncode == 0
    assert copy.stat().st_ino == made
    tar = min(copy.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    damaged = stage()
    assert damaged.returncode == 1
    assert tar.name in damaged.stderr
    assert not copy.exists()
    assert stage().returncode == 0
