"""The scripts without a Slurm: `srun` and the other programs are stand-ins that record their arguments."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wasteddp.training.distributed import launcher

ROOT = Path(__file__).parents[2]
CONFIG = "configs/quickstart.yaml"

# Each stand-in records its arguments, one per line. srun then runs the command after its options as the last node
# would, with Pyxis in the image. As documented, the image has its own PATH and only the mounted folders, and starts
# in `/`.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >>"$NOTES/srun"; echo >>"$NOTES/srun"
path=$NOTES/bin:$PATH image='' mounts='' workdir=/
while [[ $1 == --* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --ntasks=*|--ntasks-per-node=1|--kill-on-bad-exit=1|--cpus-per-task=*) ;;
    --container-image=*) image=${1#*=} ;;
    --container-mounts=*) mounts=${1#*=} ;;
    --container-workdir=*) workdir=${1#*=} ;;
    *) echo "srun: unrecognized option '$1'" >&2; exit 1 ;;
  esac
  shift
done
if [ -n "$image" ]; then
  [ "$mounts" = "$PWD:$PWD" ] || exit 1
  cd "$workdir" && path=$NOTES/image:/usr/bin:/bin
fi
PATH=$path SLURM_NODEID=$((nodes - 1)) exec "$@"
"""
# The same for Apptainer, which starts in the current folder.
APPTAINER = """#!/bin/bash
printf '%s\\n' "$@" >>"$NOTES/apptainer"; echo >>"$NOTES/apptainer"
[ "$1 $2 $3 $4" = "exec --nv --bind $PWD" ] || exit 1
shift 5
PATH=$NOTES/image:/usr/bin:/bin exec "$@"
"""
ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" >"$NOTES/accelerate"
env >"$NOTES/environment"
eval "${ENDS:-}"
"""
STAND_INS = {
    "bin/srun": SRUN,
    "bin/apptainer": APPTAINER,
    "bin/accelerate-launch": ACCELERATE,
    "bin/scontrol": "#!/bin/bash\necho n1; echo n2\n",
    "bin/squeue": "#!/bin/bash\necho RUNNING\n",
    "bin/sleep": "#!/bin/bash\n",
    "image/python": f'#!/bin/bash\necho python >>"$NOTES/inside"; exec {sys.executable} "$@"\n',
    "image/accelerate-launch": '#!/bin/bash\necho accelerate >>"$NOTES/inside"; "$NOTES"/bin/accelerate-launch "$@"\n',
}
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "wasteddp",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_PER_TASK": "4",
    "SLURM_NODEID": "0",
}

Template = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def template(tmp_path: Path) -> Template:
    """Run a script, by default train.sh, as the batch script of a job; `tmp_path` has the records."""
    for name, text in STAND_INS.items():
        write_program(tmp_path / name, text)

    def run(
        *arguments: str, site: str = "", cwd: Path = ROOT, nodes: int = 1, script: str = "train.sh", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        (tmp_path / "site.sh").write_text(f"MAX_CRASHES=0  # a crash ends the job, with its exit code\n{site}")
        given = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        given |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **JOB}
        given |= {"NOTES": str(tmp_path), "SITE": str(tmp_path / "site.sh"), "RUN_OUT": str(tmp_path / "run")}
        given |= {"SLURM_JOB_NUM_NODES": str(nodes), **environment}
        command = ["bash", str(ROOT / "slurm" / script), *arguments]
        return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, check=False)

    return run


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


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
def test_the_world_size_is_that_of_slurm(
    template: Template, tmp_path: Path, nodes: int, gpus: str, config: str, ranks: str
) -> None:
    environment = {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    done = template("--config", CONFIG, nodes=nodes, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    words = noted(tmp_path, "accelerate")
    assert after(words, "--config_file") == f"launch/accelerate/{config}"
    assert after(words, "--num_processes") == ranks
    assert after(words, "--num_machines") == str(nodes)
    assert after(words, "--machine_rank") == str(nodes - 1)  # the last node's own
    assert after(words, "--main_process_ip") == "n1"
    assert after(words, "--main_process_port") == "20017"
    given = launcher.parser(None).parse_args(words[words.index("wasteddp/train.py") + 1 :])
    assert given.config == CONFIG
    assert given.set[-1] == f"run.out={tmp_path / 'run'}"
    steps = (tmp_path / "srun").read_text().split("\n\n")
    assert "--nodes=1\n" in steps[0]  # the check of the arguments
    assert f"--nodes={nodes}\n--ntasks={nodes}\n--ntasks-per-node=1\n--kill-on-bad-exit=1\n" in steps[1]
    assert "--cpus-per-task=4\n" in steps[1]


@pytest.mark.parametrize(("gpus", "cores", "warns"), [("4", "32", ""), ("4", "31", "32"), ("", "1", "")])
def test_too_few_cores_for_the_gpus_are_reported(template: Template, gpus: str, cores: str, warns: str) -> None:
    said = template("--config", CONFIG, SLURM_GPUS_ON_NODE=gpus, SLURM_CPUS_PER_TASK=cores).stdout
    assert ("warning: 31 core(s) for 4 GPU(s)" in said) == bool(warns)
    assert (f"Submit with --cpus-per-task={warns}\n" in said) == bool(warns)


def test_nodes_without_gpus_may_have_several_processes(template: Template, tmp_path: Path) -> None:
    template("--config", CONFIG, nodes=2, PROCESSES_PER_NODE="4")
    assert after(noted(tmp_path, "accelerate"), "--num_processes") == "8"


def test_the_launcher_takes_no_option_of_the_users_environment_and_has_time_for_a_save(
    template: Template, tmp_path: Path
) -> None:
    """torchrun reads --max_restarts from PET_MAX_RESTARTS, and kills ranks 30 s after it asked them to end."""
    template("--config", CONFIG, PET_MAX_RESTARTS="9")
    environment = environment_of(tmp_path)
    assert "PET_MAX_RESTARTS" not in environment
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def test_the_program_knows_how_early_the_warning_comes(template: Template, tmp_path: Path) -> None:
    template("--config", CONFIG)
    assert environment_of(tmp_path)["WASTEDDP_WARNING_S"] == "300"
    template("--config", CONFIG, SBATCH_SIGNAL="B:USR1@900")
    assert environment_of(tmp_path)["WASTEDDP_WARNING_S"] == "900"


def test_the_python_of_the_checkout_goes_before_every_other(template: Template, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    write_program(checkout / ".venv/bin/python", f'#!/bin/bash\ntouch "$NOTES/used"; exec {sys.executable} "$@"\n')
    for name in ("configs", "launch", "slurm", "wasteddp"):
        (checkout / name).symlink_to(ROOT / name)
    done = template("--config", CONFIG, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "used").exists()


@pytest.mark.parametrize(("container", "image"), [("INSIDE", "w.sif"), ("SRUN_OPTIONS", "w.sqsh")])
def test_every_step_runs_in_the_container_of_the_sites_example(
    template: Template, tmp_path: Path, container: str, image: str
) -> None:
    """Apptainer and Pyxis as documented: with the lines of site.example.sh the image's own Python runs the program in
    the checkout, and receives signals as outside: the warning kills no process between it and Slurm."""
    example = (ROOT / "slurm" / "site.example.sh").read_text()
    site = example.replace(f"# {container}=", f"{container}=").replace("/images/wasteddp.", "/i/w.")
    done = template("--config", CONFIG, site=site, ENDS='kill -USR1 $$; pwd >"$NOTES/where"')
    assert done.returncode == 0, done.stderr
    assert noted(tmp_path, "inside") == ["python", "accelerate"]  # the check of the arguments, and the training
    assert noted(tmp_path, "where") == [str(ROOT)]
    assert after(noted(tmp_path, "accelerate"), "--config") == CONFIG
    program = "srun" if container == "SRUN_OPTIONS" else "apptainer"
    assert (tmp_path / program).read_text().count(f"/i/{image}\n") == 2


def test_the_example_of_a_sites_file_can_be_used_as_it_is(template: Template, tmp_path: Path) -> None:
    example = (ROOT / "slurm" / "site.example.sh").read_text()
    assert template("--config", CONFIG, site=example).returncode == 0
    site = re.sub("^( *)# (export (?:HF|NCCL))", r"\1\2", example, flags=re.MULTILINE)
    (tmp_path / "site.sh").write_text(site)
    for job in ("", "17"):  # on the login node, as sbatch and `doctor` see it, and in a job
        sourced = f"unset NCCL_SOCKET_IFNAME; SLURM_JOB_ID={job} USER=me; source {tmp_path / 'site.sh'}; env"
        done = subprocess.run(["bash", "-euc", sourced], capture_output=True, text=True, check=True)
        seen = set(done.stdout.splitlines())
        assert {"SBATCH_ACCOUNT=my-project", "SBATCH_PARTITION=gpu"} <= seen
        assert {"HF_HOME=/scratch/me/hf", "TORCH_HOME=/scratch/me/torch"} <= seen
        assert any(line.startswith("NCCL_SOCKET_IFNAME=") for line in seen) == bool(job)


WARNED = 'touch "$RUN_OUT/RESUMABLE"; kill -USR1 $PPID; exit 1'  # the batch shell is the parent
NOT_REQUEUED = ": that makes 1, MAX_CRASHES is 0: not requeued"


@pytest.mark.parametrize(
    ("ends", "said", "code"),
    [
        ("", "finished", 0),
        ('touch "$RUN_OUT/RESUMABLE"; exit 1', "stopped by a signal and saved; not requeued", 1),
        (
            f'mkdir -p "$RUN_OUT/checkpoints/step-00000009"; {WARNED}',
            "saved before the time limit; back into the queue",
            0,
        ),
        (WARNED, "warned before the first step: --time must leave more than the start takes and 300 s of warning", 1),
        ('touch "$RUN_OUT/MISTAKE"; exit 1', "there is an error to fix, its message is above; not requeued", 2),
        ("exit 1", f"crashed, exit code 1{NOT_REQUEUED}", 1),
        ("kill -9 $$", f"crashed, exit code 137{NOT_REQUEUED}", 137),
    ],
    ids=["finished", "stopped", "warned", "warned_too_early", "mistake", "crash", "killed"],
)
def test_what_follows_is_decided_by_what_this_attempt_left(
    template: Template, tmp_path: Path, ends: str, said: str, code: int
) -> None:
    """The marks of earlier attempts are removed: with an old RESUMABLE, a crash would count as saved. An attempt
    without a step counts as a crash: with too short a time limit, the job would be requeued forever."""
    (tmp_path / "run" / "checkpoints" / "step-00000008").mkdir(parents=True)
    for mark in ("RESUMABLE", "MISTAKE"):
        (tmp_path / "run" / mark).touch()
    done = template("--config", CONFIG, ENDS=ends)
    last = [line for line in done.stdout.splitlines() if line.startswith("=== ")][-1]
    assert last.split("attempt 1: ")[1].startswith(said)
    assert done.returncode == code


def test_the_printed_command_resumes_the_run_of_an_element(template: Template, tmp_path: Path) -> None:
    """The script appends the element's number to RUN_OUT: with the element's folder a new run would start in it."""
    first = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3", "RUN_OUT": str(tmp_path / "my run")}
    refused = '#!/bin/bash\n[ "$1" != requeue ] || exit 1\necho n1\n'
    write_program(tmp_path / "bin" / "scontrol", refused)
    for ends in ('touch "$RUN_OUT/RESUMABLE"; exit 1', f'mkdir -p "$RUN_OUT/checkpoints/step-00000009"; {WARNED}'):
        done = template("--config", CONFIG, ENDS=ends, **first)
        last = [line for line in done.stdout.splitlines() if line.startswith("=== ")][-1]
        found = re.search(r"RUN_OUT=(.*) and the same command with --array=3 resume it$", last)
        assert found, last
        (folder,) = shlex.split(found[1])
        template("--config", CONFIG, **{**first, "SLURM_ARRAY_JOB_ID": "17", "RUN_OUT": folder})
        assert sets_of(tmp_path)[-1] == f"run.out={tmp_path / 'my run' / '3'}"


PROGRAM = """
import os, pathlib, signal, time
heard, started = [], 0
signal.signal(signal.SIGUSR1, lambda *_: heard.append(started))
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(0.3)
started = 1
pathlib.Path(os.environ["RUN_OUT"], "environment.json").touch()
time.sleep(0.5)
pathlib.Path(os.environ["NOTES"], "heard").write_text("\\n".join(map(str, heard)))
"""


def test_a_warning_reaches_the_program_once_when_it_has_started(template: Template, tmp_path: Path) -> None:
    """Before its start the program has no handler. A second signal would kill the report writer or the program."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").touch()  # of an earlier attempt
    template("--config", CONFIG, ENDS='exec python -c "$PROGRAM"', PROGRAM=PROGRAM)
    assert noted(tmp_path, "heard") == ["1"]


def sets_of(folder: Path) -> list[str]:
    words = noted(folder, "accelerate")
    return launcher.parser(None).parse_args(words[words.index("wasteddp/train.py") + 1 :]).set  # type: ignore[no-any-return]


def test_an_element_of_an_array_is_a_seed_or_a_line_of_the_sweep(template: Template, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "2"}
    template("--config", CONFIG, **array)
    assert sets_of(tmp_path)[-2:] == ["run.seed=2", f"run.out={tmp_path / 'run' / '2'}"]
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--set optimizer.lr=0.1\n--set optimizer.lr=0.2 --set 'track.project=a b'\n--set 'x\n")
    template("--config", CONFIG, SWEEP=str(sweep), **array)
    assert sets_of(tmp_path)[-3:-1] == ["optimizer.lr=0.2", "track.project=a b"]
    for element, error in (("3", f"line 3 of {sweep} cannot be parsed: --set 'x"), ("4", f"{sweep} has no line 4")):
        done = template("--config", CONFIG, SWEEP=str(sweep), **{**array, "SLURM_ARRAY_TASK_ID": element})
        assert done.returncode == 2
        assert f"error: {error}\n" in done.stdout


STAGING = """#!/bin/sh
case "$1" in *stage.sh) shift; printf '%s\\n' "$@" >"$NOTES/staged" ;; *) exec /bin/bash "$@" ;; esac
"""


def test_arguments_may_be_written_in_every_way_that_the_program_takes(template: Template, tmp_path: Path) -> None:
    """Only the program's own parser reads them: the shards to copy and the run's folder are those of the settings."""
    config, shards = tmp_path / "mine 1.yaml", tmp_path / "my 'set'"
    config.write_text(f"data: {{shards: {json.dumps(str(shards))}}}\n")
    shards.mkdir()
    (shards / "manifest.json").touch()
    write_program(tmp_path / "bin" / "bash", STAGING)
    site = f"LOCAL_DISK={tmp_path / 'disk'}"
    done = template(f"--conf={config}", f"--set=run.out={tmp_path / 'mine'}", "--resume=never", site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert noted(tmp_path, "staged")[0] == str(shards)
    assert sets_of(tmp_path)[-2:] == [f"run.out={tmp_path / 'mine'}", f"data.staged={noted(tmp_path, 'staged')[1]}"]
    assert after(noted(tmp_path, "accelerate"), "--resume") == "never"
    assert (tmp_path / "mine").is_dir()


def test_a_new_run_from_the_model_of_another(template: Template, tmp_path: Path) -> None:
    """As `wasteddp train --from RUN`: with its settings, but for its copy of the shards."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.yaml").write_text("data: {shards: a, staged: b}\nrun: {out: old}\n")
    assert template("--from", str(tmp_path / "old")).returncode == 0
    assert after(noted(tmp_path, "accelerate"), "--config") == str(tmp_path / "old" / "settings.yaml")
    sets = sets_of(tmp_path)
    assert {f"model.weights={tmp_path / 'old'}", "data.staged="} <= set(sets)
    assert sets[-1] == f"run.out={tmp_path / 'run'}"
    assert template("--from", str(tmp_path / "old"), "--out", str(tmp_path / "new")).returncode == 0
    assert sets_of(tmp_path)[-1] == f"run.out={tmp_path / 'new'}"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--config", "configs/none.yaml"], "reading the settings"),
        (["--config", CONFIG, "--set", "train.epoch=1"], "did you mean 'train.epochs'?"),
        ([], "neither --config nor --from is given"),
        (["--config", CONFIG, "--sets", "train.epochs=1"], "unrecognized arguments: --sets"),
        (["--config", CONFIG, "--processes", "2"], "unrecognized arguments: --processes"),
    ],
)
def test_a_mistake_launches_nothing_and_is_no_crash(
    template: Template, tmp_path: Path, arguments: list[str], error: str
) -> None:
    done = template(*arguments)
    assert done.returncode == 2
    assert error in done.stderr
    assert done.stdout.endswith("its message is above; not requeued\n")
    assert not (tmp_path / "accelerate").exists()
    assert not (tmp_path / "run").exists()


def test_a_check_that_could_not_run_is_a_crash(template: Template, tmp_path: Path) -> None:
    """As if the container could not be entered: then srun may even report success."""
    for code, crash in (("0", "1"), ("137", "137")):
        write_program(tmp_path / "bin" / "python", f"#!/bin/bash\nexit {code}\n")
        done = template("--config", CONFIG)
        assert f"crashed, exit code {crash}{NOT_REQUEUED}" in done.stdout
        assert not (tmp_path / "accelerate").exists()
        (tmp_path / "run" / "crashes.txt").unlink()


def test_a_job_that_was_not_submitted_from_the_checkout_reports_it(template: Template, tmp_path: Path) -> None:
    done = template("--config", CONFIG, cwd=tmp_path)
    assert done.returncode == 2
    assert "slurm/common.sh: No such file" in done.stderr


@pytest.mark.parametrize("words", [["--out", "SET"], ["--out=SET"], ["--out=~/my set"]])
def test_the_folder_of_a_set_may_be_written_in_both_ways(template: Template, tmp_path: Path, words: list[str]) -> None:
    write_program(tmp_path / "bin" / "sbatch", '#!/bin/bash\necho "$SHARD_DONE" >>"$NOTES/sbatch"; echo 5\n')
    given = [word.replace("SET", str(tmp_path / "my set")) for word in words]
    done = template("2", "images", *given, script="shard.sh", SLURM_JOB_ID="", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert noted(tmp_path, "sbatch")[0].startswith(f"{tmp_path}/my set/.sharding/done-")
    for missing in ([], ["--out"]):
        done = template("2", "images", *missing, script="shard.sh", SLURM_JOB_ID="")
        assert done.returncode == 2
        assert "error: --out is missing" in done.stderr


def test_an_element_that_shards_and_is_warned_ends_and_is_requeued_and_not_marked_as_done(
    template: Template, tmp_path: Path
) -> None:
    write_program(tmp_path / "bin" / "python", "#!/bin/bash\nkill -USR1 $PPID\nexec /bin/sleep 20\n")
    element = {"STAGE": "read", "SHARD_PARTS": "2", "SHARD_DONE": str(tmp_path / "done"), "SLURM_ARRAY_TASK_ID": "1"}
    done = template("images", "--out", "set", script="shard.sh", **element)
    assert "attempt 1: the time limit is near; back into the queue" in done.stdout
    assert not list(tmp_path.glob("done*"))


def test_an_element_evaluates_the_run_of_its_number(template: Template, tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "python", '#!/bin/bash\nprintf "%s\\n" "$@" >"$NOTES/python"\n')
    assert template("a b", "--split", "test", script="evaluate.sh", SLURM_ARRAY_TASK_ID="2").returncode == 0
    assert noted(tmp_path, "python")[2:] == ["evaluate", "a b/2", "--split", "test"]
