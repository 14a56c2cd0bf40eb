"""Jobs of slurm/train.sh and slurm/evaluate.sh on a real Slurm, with the real training program on real shards.

The scenes of all tests run concurrently, each on its own nodes, because Slurm waits most of the time; each test
examines its scenes. Each test names the line that it guards, and how the test fails when the line is broken.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from cluster import ROOT, Cluster, Job, until
from safetensors.torch import load
from trainings import final_weights, rows

# 20 steps; each is logged and saved. The rate is small, so that rounding errors of another order of sums do not grow.
CONFIG = """
precision: fp32
run: {threads: 1}
data: {image_size: 32}
model: {arch: resnet18, weights: none, channels_last: false}
train: {epochs: 5, batch_size: 12, max_micro_batch: 6, log_every_steps: 1}
evaluate: {batch_size: 8}
optimizer: {lr: 0.001}
checkpoint: {every_steps: 1}
track: {wandb: disabled}
"""
LAST = "step 20/20"
# A site that kills the training program before it prints anything, as the kernel's out-of-memory killer would.
CRASHING_SITE = """
MAX_CRASHES=1
INSIDE=(bash -c 'case "$*" in *train.py*) kill -9 $$ ;; esac; exec "$@"' inside)
"""


class Ran(NamedTuple):
    job: Job
    state: str  # when it had ended
    run: Path
    text: str


class Scene(NamedTuple):
    cluster: Cluster
    folder: Path
    config: Path

    def train(self, *options: str, extra: tuple[str, ...] = (), **environment: str) -> Job:
        command = [*options, "slurm/train.sh", "--config", str(self.config), *extra]
        self.folder.mkdir(exist_ok=True)
        return self.cluster.submit(
            self.folder / "log.txt", *command, environment={"RUN_OUT": str(self.folder / "run"), **environment}
        )

    def processes(self, program: str) -> list[int]:
        """The running processes of this scene's run. `/proc` of this machine lists the nodes' processes too."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                words = path.read_bytes().decode().split("\0")
                if words[1:2] and words[1].endswith(f"/{program}") and f"run.out={self.folder}/run" in words:
                    found.append(int(path.parent.name))
        return found

    def ended(self, job: Job) -> Ran:
        state = job.end()
        return Ran(job, state, self.folder / "run", job.text())


def undisturbed(scene: Scene) -> Ran:
    return scene.ended(scene.train("--nodes=2", "--nodelist=n1,n2"))


def alone(scene: Scene) -> Ran:
    """One process. The site's file selects a partition that is not the default, and the node's local disk."""
    site = scene.folder.with_suffix(".site.sh")
    site.write_text(f"export SBATCH_PARTITION=high\nLOCAL_DISK={scene.folder}/disk\n")
    options = "--parsable --gpus-per-node=0 --cpus-per-task=2 --time=10 --nodelist=n1"
    log, run = scene.folder / "log.txt", scene.folder / "run"
    scene.folder.mkdir()
    sourced = f"source {site}; sbatch {options} --output={log} slurm/train.sh --config {scene.config}"
    job = scene.cluster.run("bash", "-c", sourced, environment={"SITE": str(site), "RUN_OUT": str(run)})
    partition = scene.cluster.run("squeue", "-h", "-j", job, "-o", "%P")
    ran = scene.ended(Job(scene.cluster, job, log))
    return ran._replace(text=f"partition {partition}\n{ran.text}")


def warned(scene: Scene) -> Ran:
    """Warns while the launcher starts, before the program can receive it."""
    job = scene.train("--nodes=2", "--nodelist=n3,n4")
    until(lambda: scene.processes("accelerate-launch"), "waiting for the launcher")
    job.warn()
    return scene.ended(job)


def limited(scene: Scene) -> Ran:
    """Slurm itself warns, 175 to 205 s after the start: it checks every 30 s, and looks 30 s ahead. Until then the
    training is stopped, or it would finish. With a shorter limit a busy machine is warned before the first step."""
    job = scene.train("--nodelist=n9", "--time=4", SBATCH_SIGNAL="B:USR1@35")
    job.seen("step 2/20|the time limit is near")
    held = scene.processes("train.py")
    for process in held:
        os.kill(process, signal.SIGSTOP)
    job.seen("the time limit is near")
    for process in held:
        os.kill(process, signal.SIGCONT)
    return scene.ended(job)


def taken(scene: Scene) -> Ran:
    """Another job preempts it, and then an administrator takes it off its node."""
    job = scene.train("--nodelist=n7")
    job.seen("step 2/20")
    scene.cluster.run("sbatch", "-p", "high", "-w", "n7", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    job.seen(r"attempt 2(?s:.*)\nstep \d+/20")
    scene.cluster.run("scontrol", "requeue", job.id)
    return scene.ended(job)


def node_killed(scene: Scene) -> Ran:
    job = scene.train("--nodes=2", "--exclude=n1,n2,n3,n4,n7,n9")
    job.seen("step 2/20")
    scene.cluster.node("kill", "n6")  # n5 and n8 remain
    return scene.ended(job)


def cancelled(scene: Scene) -> Ran:
    job = scene.train("--nodelist=n4")
    job.seen("step 2/20")
    scene.cluster.run("scancel", job.id)
    ran = scene.ended(job)
    time.sleep(3)
    return ran._replace(state=job.state())


def sweep(scene: Scene) -> Ran:
    """Two seeds; only element 1 is warned."""
    scene.folder.mkdir()
    log = scene.folder / "%a.txt"
    job = scene.train("--array=1-2", "--nodelist=n1", f"--output={log}")
    element = Job(scene.cluster, f"{job.id}_1", scene.folder / "1.txt")
    element.seen("step 2/20")
    element.warn()
    states = {element.end(), Job(scene.cluster, f"{job.id}_2", scene.folder / "2.txt").end()}
    return Ran(job, " ".join(states), scene.folder / "run", "")


def crashing(scene: Scene) -> Ran:
    site = scene.folder.with_suffix(".site.sh")
    site.write_text(CRASHING_SITE)
    return scene.ended(scene.train("--nodelist=n1", SITE=str(site)))


def mistaken(scene: Scene) -> Ran:
    extra = ("--set", "train.batch_size=13")
    return scene.ended(scene.train("--nodelist=n1", extra=extra, PROCESSES_PER_NODE="2"))


def misspelt(scene: Scene) -> Ran:
    return scene.ended(scene.train("--nodelist=n2", extra=("--set", "train.epoch=3")))


def apart(scene: Scene) -> Ran:
    """Two nodes without train.sh: each has a launcher that does not know the other node."""
    scene.folder.mkdir()
    launch = "accelerate launch --quiet --config_file launch/accelerate/cpu.yaml wasteddp/train.py"
    step = f"srun {launch} --config {scene.config} --set run.out={scene.folder / 'run'}"
    job = scene.cluster.submit(
        scene.folder / "log.txt", "--nodes=2", "--nodelist=n3,n4", "--ntasks-per-node=1", f"--wrap={step}"
    )
    return scene.ended(job)


SCENARIOS = (
    *(limited, undisturbed, warned, alone, node_killed, taken, cancelled),
    *(sweep, mistaken, apart, misspelt, crashing),
)


@pytest.fixture(scope="module")
def outcomes(
    cluster: Cluster,
    small_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Mapping[str, Future[Ran]]]:
    """Runs the scenes of the selected tests, four at a time: on two cores, more of them would start too slowly.

    `limited` begins first, since it waits longest.
    """
    folder = tmp_path_factory.mktemp("jobs")
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("data: {", f"data: {{shards: {small_shards}, "))
    marks = [mark for item in request.session.items for mark in item.iter_markers("scenario")]
    wanted = {name for mark in marks for name in mark.args}
    plays = [play for play in SCENARIOS if play.__name__ in wanted]
    with ThreadPoolExecutor(4) as pool:
        yield {play.__name__: pool.submit(play, Scene(cluster, folder / play.__name__, config)) for play in plays}


@pytest.fixture
def outcome(outcomes: Mapping[str, Future[Ran]]) -> Callable[[str], Ran]:
    def of(name: str) -> Ran:
        ran = outcomes[name].result()
        print(f"--- {name}: {ran.state}\n{ran.text}")  # shown if the test fails
        return ran

    return of


@pytest.mark.scenario("undisturbed")
def test_two_nodes_train_as_one(outcome: Callable[[str], Ran]) -> None:
    """Guards RANKS of train.sh: without the number of nodes it is 1, and the nodes refuse to train separately."""
    two = outcome("undisturbed")
    assert two.state == "COMPLETED"
    assert "2 node(s) x 1 process(es), 0 GPU(s) each, on n[1-2]" in two.text
    assert "2 x cpu" in two.text
    assert "2 processes x 6 images x 1 accumulated" in two.text
    assert two.text.count("the batch system warns 300 s before its limit") == 1
    assert re.search(r"=== .* attempt 1: finished\n$", two.text)


@pytest.mark.scenario("alone", "undisturbed")
def test_two_nodes_and_one_process_see_the_same_and_learn_the_same(outcome: Callable[[str], Ran]) -> None:
    """Guards rank=runtime.rank of dataloaders.py: with rank 0 both nodes read the same, and the losses differ."""
    one, two = outcome("alone"), outcome("undisturbed")
    assert [row["step"] for row in rows(one.run)] == [row["step"] for row in rows(two.run)] == list(range(1, 21))
    for ours, theirs in zip(rows(two.run), rows(one.run), strict=True):
        # the loss of 12 images depends on which images they are, and on their crops and flips
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert ours.get("val/samples") == theirs.get("val/samples")
    weights_one, weights_two = load(final_weights(one.run)), load(final_weights(two.run))
    # without BatchNorm's statistics: each rank has its own, and their mean is saved
    learned = [name for name in weights_one if not re.search("running_|num_batches", name)]
    assert len(learned) == 65  # 21 convolutions, 21 norms of 2, the last layer's 2
    apart = {name: (weights_one[name] - weights_two[name]).abs().max().item() for name in learned}
    assert max(apart.values()) < 1e-5, apart


@pytest.mark.scenario("warned", "undisturbed")
def test_a_warning_saves_requeues_and_goes_on(outcome: Callable[[str], Ran]) -> None:
    """Guards `trap "" USR1` of common.sh and `warn` of train.sh: without the first the warning kills the launchers,
    and the other processes have KillWait to save; if `warn` does not wait, nothing receives it and nothing is requeued.
    """
    ran = outcome("warned")
    assert ran.state == "COMPLETED"
    step = re.search(r"stopped by SIGUSR1 at step (\d+) and saved", ran.text)
    assert step
    assert "User defined signal" not in ran.text  # srun prints it for a launcher that the signal killed
    assert "attempt 1: saved before the time limit; back into the queue" in ran.text
    assert f"step-{int(step[1]):08d}, attempt 2" in ran.text
    assert final_weights(ran.run) == final_weights(outcome("undisturbed").run)


@pytest.mark.scenario("limited", "alone")
def test_slurms_own_warning_before_a_real_limit_saves_requeues_and_goes_on(outcome: Callable[[str], Ran]) -> None:
    """Guards `trap ... USR1` of train.sh, and how it finds WASTEDDP_WARNING_S."""
    ran = outcome("limited")
    assert ran.state == "COMPLETED"
    says = r"=== (\S+ \S+) job \d+, attempt 1: "
    found = re.search(rf"{says}1 node.*\n(?s:.*){says}the time limit is near \((\S+)\): saving\n", ran.text)
    assert found
    began, warned, limit = (datetime.fromisoformat(time) for time in found.groups())
    assert began < warned < limit
    assert timedelta(seconds=180) < limit - began <= timedelta(seconds=240)  # `began` is printed after the start
    assert limit - warned >= timedelta(seconds=30)
    assert "the batch system warns 35 s before its limit" in ran.text
    assert re.search(r"stopped by SIGUSR1 at step \d+ and saved", ran.text)
    assert "attempt 1: saved before the time limit; back into the queue" in ran.text
    assert re.search(r"attempt \d+: finished\n$", ran.text)  # the second, unless this machine is very busy
    assert not (ran.run / "crashes.txt").exists()
    assert final_weights(ran.run) == final_weights(outcome("alone").run)


@pytest.mark.scenario("taken", "alone")
def test_a_job_that_slurm_takes_off_its_nodes_goes_on_by_itself(outcome: Callable[[str], Ran]) -> None:
    """Guards `trap 'ended=1' TERM` of train.sh: without it the batch shell dies, and cannot report how the job ended.

    And #SBATCH --requeue: with --no-requeue the state is PREEMPTED.
    """
    ran = outcome("taken")
    assert ran.state == "COMPLETED"
    assert "attempt 1: ended by Slurm" in ran.text
    assert "attempt 2: ended by Slurm" in ran.text
    assert len(re.findall(r"stopped by SIGTERM at step \d+ and saved", ran.text)) == 2
    assert "attempt 3: finished" in ran.text
    assert LAST in ran.text
    assert not (ran.run / "crashes.txt").exists()
    assert final_weights(ran.run) == final_weights(outcome("alone").run)


@pytest.mark.scenario("node_killed", "undisturbed")
def test_a_job_whose_node_died_goes_on_by_itself(outcome: Callable[[str], Ran]) -> None:
    """Guards #SBATCH --requeue: with --no-requeue it ends as NODE_FAIL. And the wait of train.sh before it counts an
    end as a crash: the remaining ranks detect a dead node before Slurm does, and their step ends first."""
    ran = outcome("node_killed")
    assert ran.state == "COMPLETED"
    assert "on n[5-6]" in ran.text
    assert "on n[5,8]" in ran.text
    assert "rank 1 of 2 does not respond any more" in ran.text
    assert "attempt 1: ended by Slurm; if it was preempted or its node failed, Slurm requeues it" in ran.text
    assert not (ran.run / "crashes.txt").exists()
    assert "attempt 2: finished" in ran.text
    assert final_weights(ran.run) == final_weights(outcome("undisturbed").run)


@pytest.mark.scenario("cancelled")
def test_a_cancelled_job_saves_and_stays_cancelled(outcome: Callable[[str], Ran]) -> None:
    """Guards the first branch after "what follows" of train.sh: if a saved run is always requeued, this one is too."""
    ran = outcome("cancelled")
    assert ran.state == "CANCELLED"
    assert re.search(r"stopped by SIGTERM at step \d+ and saved", ran.text)
    assert "back into the queue" not in ran.text
    assert "attempt 2" not in ran.text


@pytest.mark.scenario("sweep")
def test_a_sweep_has_a_folder_for_each_element_and_only_the_warned_one_is_requeued(
    outcome: Callable[[str], Ran],
) -> None:
    """Guards SELF of common.sh: with the plain job id, element 2 is requeued as well, or instead."""
    ran = outcome("sweep")
    assert ran.state == "COMPLETED"
    warned_log, other_log = ((ran.run.parent / f"{number}.txt").read_text() for number in (1, 2))
    assert f"job {ran.job.id}_1, attempt 2: finished" in warned_log
    assert f"job {ran.job.id}_2, attempt 1: finished" in other_log
    assert "attempt 2" not in other_log
    assert "seed 1" in warned_log
    assert "seed 2" in other_log
    assert rows(ran.run / "1")[-1]["step"] == rows(ran.run / "2")[-1]["step"] == 20
    assert final_weights(ran.run / "1") != final_weights(ran.run / "2")


@pytest.mark.scenario("crashing")
def test_a_crash_is_requeued_so_often_and_no_more(outcome: Callable[[str], Ran]) -> None:
    """Guards the comparison with MAX_CRASHES of train.sh: without it the job is requeued for ever."""
    ran = outcome("crashing")
    assert ran.state == "FAILED"
    assert "attempt 1: crashed, exit code 137 (1 of at most 1); back into the queue" in ran.text
    assert "attempt 2: crashed, exit code 137: that makes 2, MAX_CRASHES is 1: not requeued" in ran.text
    assert len((ran.run / "crashes.txt").read_text().splitlines()) == 2


@pytest.mark.scenario("mistaken")
def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_and_not_requeued(
    outcome: Callable[[str], Ran],
) -> None:
    """Guards MISTAKE_MARK of slurm.py: without the mark it counts as a crash, and is requeued."""
    ran = outcome("mistaken")
    assert ran.state == "FAILED"
    assert ran.text.count("error: train.batch_size is 13 and there are 2 processes") == 1
    assert "attempt 1: there is an error to fix, its message is above; not requeued" in ran.text
    assert "attempt 2" not in ran.text


@pytest.mark.scenario("misspelt")
def test_a_mistake_in_the_settings_ends_before_anything_is_launched(outcome: Callable[[str], Ran]) -> None:
    """Guards the check of the arguments in train.sh: without it every node starts a launcher first."""
    ran = outcome("misspelt")
    assert ran.state == "FAILED"
    assert "did you mean 'train.epochs'?" in ran.text
    assert "attempt 1: the arguments or the settings have an error" in ran.text
    assert "attempt 2" not in ran.text
    assert "launch.py" not in ran.text
    assert not ran.run.exists()


@pytest.mark.scenario("apart")
def test_nodes_that_do_not_know_of_each_other_are_refused(outcome: Callable[[str], Ran]) -> None:
    """Guards refuse_other_world of slurm.py: without it each node trains its own model."""
    ran = outcome("apart")
    assert ran.state == "FAILED"
    assert "Slurm started this step on 2 nodes; the launcher has 1 process(es)" in ran.text
    assert "step 1/" not in ran.text


@pytest.mark.scenario("alone")
def test_the_sites_file_chooses_the_partition_and_a_disk_for_the_shards(outcome: Callable[[str], Ran]) -> None:
    """Guards `source "$SITE"` of common.sh (no copy is created) and SBATCH_PARTITION (the partition is the default)."""
    ran = outcome("alone")
    assert ran.state == "COMPLETED"
    assert ran.text.startswith("partition high\n")
    (copy,) = (ran.run.parent / "disk").glob("shards-????????????")
    assert f"{copy} is whole: 73 samples" in ran.text
    assert f"staged: {copy}" in (ran.run / "settings.yaml").read_text()


@pytest.mark.scenario("undisturbed")
def test_a_run_is_evaluated_by_a_job(cluster: Cluster, outcome: Callable[[str], Ran], tmp_path: Path) -> None:
    """Guards evaluate.sh: without "$@" another split than the requested one is measured."""
    run, script = outcome("undisturbed").run, f"{ROOT}/slurm/evaluate.sh"
    job = cluster.submit(tmp_path / "log.txt", "--nodelist=n1", script, str(run), "--split", "train")
    assert job.end() == "COMPLETED", job.text()
    # the training writes `val`, and `test` is the default
    assert (run / "evaluations" / "train" / "metrics.json").exists()
