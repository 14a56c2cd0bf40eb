"""python -m tests.slurm.broken [WORD ...]: shows that the tests of this folder can fail.

It breaks each guarded line in a copy of the checkout, one at a time. The test of that line runs there alone and must
fail with the words that belong to the line. Before that, all tests must pass on the unchanged copy. WORDs select lines
by a part of the test's or the file's name. Prints a table; the exit code is 1 if a broken line was not noticed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SLURM = "wasteddp/training/watchdog/slurm.py"
JOB = "wasteddp/commands/slurm_job.py"
FOLDER = "tests/slurm"
LIMIT_S = 400  # for an event that never happens; a scene alone takes 60 s
TRAIN, COMMON, SHARD, SITE, STAGE = (
    f"slurm/{name}.sh" for name in ("train", "common", "shard", "site.example", "stage")
)


class Line(NamedTuple):
    test: str  # FILE::NAME
    file: str
    text: str  # occurs once in the file
    broken: str
    seen: str  # a regular expression for pytest's output, in the lines that start with E


class Verdict(NamedTuple):
    line: Line
    passed: bool
    said: str
    seconds: float

    @property
    def is_noticed(self) -> bool:
        return not self.passed and bool(re.search(self.line.seen, self.said))


def guarded(test: str, *lines: tuple[str, str, str, str]) -> Iterable[Line]:
    return (Line(test, *line) for line in lines)


def world(case: str, *lines: tuple[str, str, str, str]) -> Iterable[Line]:
    return guarded(f"test_templates.py::test_the_world_size_is_that_of_slurm[{case}]", *lines)


def template(test: str, *lines: tuple[str, str, str, str]) -> Iterable[Line]:
    return guarded(f"test_templates.py::test_{test}", *lines)


def follows(case: str, *lines: tuple[str, str, str, str]) -> Iterable[Line]:
    return template(f"what_follows_is_decided_by_what_this_attempt_left[{case}]", *lines)


def contained(case: str, *lines: tuple[str, str, str, str]) -> Iterable[Line]:
    return template(f"every_step_runs_in_the_container_of_the_sites_example[{case}]", *lines)


def job(test: str, *lines: tuple[str, str, str, str]) -> Iterable[Line]:
    return guarded(f"test_jobs.py::test_{test}", *lines)


# Lines of Python and bash are quoted verbatim.
LINES = (
    # --- without a cluster --------------------------------------------------------------------------------------------
    *world(
        "4-8-nodes.yaml-32",
        (TRAIN, "RANKS=$((SLURM_JOB_NUM_NODES * EACH))", "RANKS=$EACH", "'8' == '32'"),
        (TRAIN, "EACH=$((GPUS > 0 ?", "EACH=$((GPUS > 9 ?", "'4' == '32'"),
        (TRAIN, '--machine_rank "$SLURM_NODEID"', "--machine_rank '\"$SLURM_NODEID\"'", "'0' == '3'"),
        (TRAIN, '--num_machines "$SLURM_JOB_NUM_NODES"', "--num_machines 1", "'1' == '4'"),
        (TRAIN, "| head -n 1)", "| tail -n 1)", "'n2' == 'n1'"),
        (TRAIN, "MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))", "MASTER_PORT=29500", "'29500' == '20017'"),
        (COMMON, '--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ', "", "cpus-per-task=4"),
        (COMMON, " --kill-on-bad-exit=1", "", "kill-on-bad-exit=1"),
        (COMMON, "then nodes=1; shift; fi", "then shift; fi", "--nodes=1"),
    ),
    *world("1-8-nodes.yaml-8", (TRAIN, '[ "$RANKS" -gt 1 ]', '[ "$RANKS" -gt 8 ]', r"gpu\.yaml' == .*nodes\.yaml")),
    *world("1-1-gpu.yaml-1", (TRAIN, 'elif [ "$GPUS" -gt 0 ]', "elif false", r"cpu\.yaml' == .*gpu\.yaml")),
    *world("1--cpu.yaml-1", (TRAIN, "accelerate/cpu.yaml", "accelerate/cpu2.yaml", r"cpu2\.yaml' == .*cpu\.yaml")),
    *template(
        "too_few_cores_for_the_gpus_are_reported",
        (TRAIN, '[ "$CORES" -lt $((8 * GPUS)) ]', '[ "$CORES" -lt 8 ]', "== True|== False"),
    ),
    *template(
        "nodes_without_gpus_may_have_several_processes",
        (TRAIN, "${PROCESSES_PER_NODE:-1}", "1", "'2' == '8'"),
    ),
    *template(
        "the_launcher_takes_no_option_of_the_users_environment_and_has_time_for_a_save",
        (TRAIN, 'unset "${!PET_@}"', "true", "'PET_MAX_RESTARTS' not in"),
        (TRAIN, "SHUTDOWN_TIMEOUT=600", "SHUTDOWN_TIMEOUT=30", "'30' == '600'"),
    ),
    *template(
        "the_program_knows_how_early_the_warning_comes",
        (TRAIN, "#SBATCH --signal=B:USR1@300", "#SBATCH --signal=B:USR1", "'60' == '300'"),
        (TRAIN, "signal=${SBATCH_SIGNAL:-", "signal=${NO_SIGNAL:-", "'300' == '900'"),
    ),
    *template(
        "the_python_of_the_checkout_goes_before_every_other",
        (COMMON, "export PATH=$PWD/.venv/bin:$PATH", "export PATH=$PATH:$PWD/.venv/bin", "exists"),
    ),
    *contained(
        "INSIDE-w.sif",
        (COMMON, 'step ${INSIDE[@]+"${INSIDE[@]}"}', "step", "inside"),
        (COMMON, """'trap "" USR1; exec "$@"'""", """'exec "$@"'""", "138 == 0"),
        (SITE, ' --bind "$PWD"', "", "1 == 0"),
    ),
    *contained(
        "SRUN_OPTIONS-w.sqsh",
        (COMMON, ' ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"}', "", "inside"),
        (SITE, ' --container-mounts="$PWD:$PWD"', "", "1 == 0"),
        (SITE, ' --container-workdir="$PWD"', "", "2 == 0"),
    ),
    *template(
        "the_example_of_a_sites_file_can_be_used_as_it_is",
        (SITE, "export SBATCH_PARTITION=gpu", "SBATCH_PARTITION=gpu", "SBATCH_PARTITION=gpu"),
    ),
    *follows("finished", (TRAIN, '  say "finished"', '  say "done"', "'done'|startswith")),
    *follows("stopped", (TRAIN, 'elif [ -e "$RUN_OUT/RESUMABLE" ]; then', "elif false; then", "crashed, exit code 1")),
    *follows("warned", (TRAIN, 'requeue "saved before', 'say "saved before', "startswith")),
    *follows(
        "warned_too_early",
        (TRAIN, '[ "$(newest)" = "$before" ]', "false", "saved before the time limit"),
        (TRAIN, "before=$(newest)", "before=", "saved before the time limit"),
    ),
    *follows("mistake", (TRAIN, 'elif [ -e "$RUN_OUT/MISTAKE" ]; then', "elif false; then", "crashed, exit code 1")),
    *follows(
        "crash",
        (TRAIN, ' && rm -f "$RUN_OUT/RESUMABLE" "$RUN_OUT/MISTAKE"', "", "stopped by a signal and saved"),
        (TRAIN, '[ "$crashes" -le "$MAX_CRASHES" ]', "true", "back into the queue"),
    ),
    *follows("killed", (TRAIN, '\nexit "$code"', "\nexit 1", "1 == 137")),
    *template(
        "the_printed_command_resumes_the_run_of_an_element",
        (TRAIN, 'RUN_OUT=$(printf %q "$FOLDER") and', 'RUN_OUT=$(printf %q "$RUN_OUT") and', "/3/3"),
        (COMMON, "submit it again${RESUME:+; $RESUME}", "submit it again", "submit it again"),
    ),
    *template(
        "a_warning_reaches_the_program_once_when_it_has_started",
        (TRAIN, 'until [ "$RUN_OUT/environment.json" -nt', 'until [ ! "$RUN_OUT/environment.json" -nt', "'0'"),
        (TRAIN, '  kill -USR1 "$1"\n', '  while kill -USR1 "$1"; do sleep 1; done\n', "'1'"),
        (TRAIN, '  touch "$RUN_OUT/.launched"\n', "", "'0'"),
    ),
    *template(
        "an_element_of_an_array_is_a_seed_or_a_line_of_the_sweep",
        (TRAIN, '--set "run.seed=$SLURM_ARRAY_TASK_ID"', "--set run.seed=1", "run.seed=1"),
        (TRAIN, "RUN_OUT=$FOLDER${SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}", "RUN_OUT=$FOLDER", "run.out="),
        (TRAIN, 'eval "arguments+=($line)"', "arguments+=($line)", r"== \['optimizer"),
        (TRAIN, 'cannot be parsed: $line"; exit 2; }', 'cannot be parsed: $line"; }', "0 == 2"),
        (TRAIN, 'line $SLURM_ARRAY_TASK_ID"; exit 2; }', 'line $SLURM_ARRAY_TASK_ID"; }', "0 == 2"),
    ),
    *template(
        "arguments_may_be_written_in_every_way_that_the_program_takes",
        (TRAIN, "FOLDER=${job[0]:-$RUN_OUT}", "FOLDER=$RUN_OUT", "run.out="),
        (TRAIN, "shards=${job[1]:-}", "shards=shards/trashnet", "staged"),
        (TRAIN, '${job[@]+"${job[@]:2}"}', "--config configs/quickstart.yaml", "--resume"),
        (JOB, "shlex.quote(word).replace", "word.replace", "staged"),
    ),
    *template(
        "a_new_run_from_the_model_of_another",
        (JOB, "    if not arguments.out:\n", "    if True:\n", "run.out="),
        ("wasteddp/commands/training.py", 'sets.append("data.staged=")', "pass", "data.staged="),
    ),
    *template(
        "a_mistake_launches_nothing_and_is_no_crash",
        (TRAIN, '\ncode=$?\nif [ "$code" = 2 ]', '\ncode=0\nif [ "$code" = 2 ]', "1 == 2"),
    ),
    *template(
        "a_check_that_could_not_run_is_a_crash",
        (TRAIN, 'if [ "$code" = 0 ] && [ ${#job[@]} = 0 ]; then code=1; fi', ":", "crashed, exit code 1"),
    ),
    *template(
        "a_job_that_was_not_submitted_from_the_checkout_reports_it",
        (TRAIN, "source slurm/common.sh || exit 2", "source slurm/common.sh", "== 2"),
    ),
    *template(
        "the_folder_of_a_set_may_be_written_in_both_ways",
        (SHARD, "      --out=*) out=${!i#--out=} ;;\n", "", "2 == 0"),
    ),
    *template(
        "an_element_that_shards_and_is_warned_ends_and_is_requeued_and_not_marked_as_done",
        (SHARD, 'kill -TERM "$step"', ":", "back into the queue"),
        (SHARD, '[ "$code" = 0 ] && [ "$STAGE" != merge ]', '[ "$STAGE" != merge ]', "done-read-1"),
    ),
    *template(
        "an_element_evaluates_the_run_of_its_number",
        ("slurm/evaluate.sh", "${SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}", "", "'a b'"),
    ),
    *guarded(
        "test_staging.py::test_a_staged_copy_is_made_once_verified_each_time_and_removed_if_it_is_damaged",
        (STAGE, 'if [ ! -d "$2" ]; then', 'rm -rf "$2"\nif true; then', "st_ctime_ns"),
        (STAGE, 'python -m wasteddp.cli verify "$2" ||', "true ||", "0 == 2"),
        (STAGE, '  mv "$2" "$2.damaged"\n', "", "shards-1.lock"),
    ),
    *guarded(
        "test_staging.py::test_a_failure_leaves_no_part_of_a_copy_and_removes_none_that_others_may_read",
        (STAGE, "trap 'rm -rf \"$2.tmp\"' EXIT", "true", "copy.tmp"),
        (STAGE, 'if [ "$code" = 2 ]', 'if [ "$code" != 0 ]', "copy"),
    ),
    # --- jobs on a cluster --------------------------------------------------------------------------------------------
    *job(
        "two_nodes_train_as_one",
        (TRAIN, "RANKS=$((SLURM_JOB_NUM_NODES * EACH))", "RANKS=$EACH", "'FAILED' == 'COMPLETED'"),
    ),
    *job(
        "two_nodes_and_one_process_see_the_same_and_learn_the_same",
        (
            "wasteddp/training/dataloaders.py",
            "last_step, rank=runtime.rank,",
            "last_step, rank=0,",
            r"== \[1, 2, 3, 4\]",
        ),
    ),
    *job(
        "a_warning_saves_requeues_and_goes_on",
        (COMMON, """'trap "" USR1; exec "$@"'""", """'exec "$@"'""", "User defined signal"),
        (TRAIN, 'until [ "$RUN_OUT/environment.json" -nt', 'until [ ! "$RUN_OUT/environment.json" -nt', "None"),
        (TRAIN, "#SBATCH --open-mode=append", "#SBATCH --open-mode=truncate", "None"),
        (TRAIN, "trap 'warned=1' USR1", "trap '' USR1", "None"),
    ),
    *job(
        "slurms_own_warning_before_a_real_limit_saves_requeues_and_goes_on",
        (TRAIN, "trap 'warned=1' USR1", ":", "FAILED|the time limit is near"),
        (TRAIN, "signal=${SBATCH_SIGNAL:-", "signal=${NO_SIGNAL:-", "warns 35 s before its limit"),
    ),
    *job(
        "a_job_that_slurm_takes_off_its_nodes_goes_on_by_itself",
        (TRAIN, "#SBATCH --requeue", "#SBATCH --no-requeue", "PREEMPTED without"),
        (TRAIN, "trap 'ended=1' TERM", ":", "ended by Slurm"),
    ),
    *job(
        "a_job_whose_node_died_goes_on_by_itself",
        (TRAIN, "#SBATCH --requeue", "#SBATCH --no-requeue", "== 'COMPLETED'"),
        (TRAIN, "then sleep 5; fi", "then :; fi", "ended by Slurm"),
    ),
    *job(
        "a_cancelled_job_saves_and_stays_cancelled",
        (
            TRAIN,
            'if [ -n "$ended" ] || ! is_running; then',
            'if [ -e "$RUN_OUT/RESUMABLE" ]; then requeue saved; elif false; then',
            "'COMPLETED' == 'CANCELLED'",
        ),
    ),
    *job(
        "a_sweep_has_a_folder_for_each_element_and_only_the_warned_one_is_requeued",
        (COMMON, 'scontrol requeue "$SELF"', 'scontrol requeue "${SELF%_*}"', "attempt [12]"),
        (TRAIN, "RUN_OUT=$FOLDER${SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}", "RUN_OUT=$FOLDER", "."),
    ),
    *job(
        "a_crash_is_requeued_so_often_and_no_more",
        (TRAIN, '[ "$crashes" -le "$MAX_CRASHES" ]', "true", "waiting for the end of job"),
    ),
    *job(
        "a_number_of_processes_that_does_not_divide_the_batch_is_refused_and_not_requeued",
        (
            SLURM,
            "(out / MISTAKE_MARK).touch()",
            "pass",
            "== 1|there is an error to fix",
        ),
    ),
    *job(
        "a_mistake_in_the_settings_ends_before_anything_is_launched",
        (TRAIN, '\ncode=$?\nif [ "$code" = 2 ]', '\ncode=0\nif [ "$code" = 2 ]', "the settings have an error|=="),
    ),
    *job(
        "nodes_that_do_not_know_of_each_other_are_refused",
        (
            SLURM,
            "if nodes > 1 and",
            "if nodes > 9 and",
            "Slurm started this step on 2 nodes|==",
        ),
    ),
    *job(
        "the_sites_file_chooses_the_partition_and_a_disk_for_the_shards",
        (COMMON, 'if [ -f "$SITE" ]; then source "$SITE"; fi', ":", "unpack"),
        (TRAIN, 'arguments+=(--set "data.staged=$copy")', ":", "staged"),
    ),
    *job(
        "a_run_is_evaluated_by_a_job",
        ("slurm/evaluate.sh", 'evaluate "$run" "$@"', 'evaluate "$run"', "exists"),
    ),
    *guarded(
        "test_sharding_jobs.py::test_an_array_makes_the_set_of_one_machine_and_a_failed_element_is_repeated_alone",
        (SHARD, '--part "$SLURM_ARRAY_TASK_ID/$SHARD_PARTS"', '--part "1/$SHARD_PARTS"', "COMPLETED|FAILED"),
        (SHARD, '  touch "$SHARD_DONE-$STAGE-$SLURM_ARRAY_TASK_ID-of-$SHARD_PARTS"', "  :", "elements 1 2 3"),
        (
            SHARD,
            "${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} slurm/shard.sh",
            "slurm/shard.sh",
            ".",
        ),
    ),
)


def main(words: Sequence[str]) -> int:
    lines = [line for line in LINES if not words or any(word in line.test or word in line.file for word in words)]
    with tempfile.TemporaryDirectory(prefix="broken-") as folder:
        checkout = copied(Path(folder) / "checkout")
        for line in lines:
            assert (checkout / line.file).read_text().count(line.text) == 1, f"{line.text!r} is not once in {line.file}"
        passed, said, seconds = run(sorted({line.test for line in lines}), checkout)
        print(f"unbroken: {'passed' if passed else 'FAILED'} in {seconds:.0f} s\n{'' if passed else said}", flush=True)
        if not passed:
            return 1
        verdicts = [broken(line, checkout) for line in lines]
    missed = [verdict for verdict in verdicts if not verdict.is_noticed]
    print(f"\n{len(verdicts)} lines broken, {len(verdicts) - len(missed)} noticed by their test and for their reason")
    for verdict in missed:
        print(f"\nNOT NOTICED ({'passed' if verdict.passed else 'failed'}): {verdict.line}\n{verdict.said}")
    return 1 if missed else 0


def copied(to: Path) -> Path:
    """Copy the files of the checkout that git tracks or would add."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)
    return to


def broken(line: Line, checkout: Path) -> Verdict:
    path = checkout / line.file
    whole = path.read_text()
    path.write_text(whole.replace(line.text, line.broken))
    verdict = Verdict(line, *run([line.test], checkout, SLURM_TESTS_LIMIT_S=str(LIMIT_S)))
    path.write_text(whole)
    words = " ".join(line.text.split()), " ".join(line.broken.split()) or "(removed)"
    outcome = "noticed" if verdict.is_noticed else "NOT NOTICED"
    print(f"{outcome}, {verdict.seconds:.0f} s: {line.file}: {words[0]} -> {words[1]}: {line.test}", flush=True)
    return verdict


def run(tests: Sequence[str], checkout: Path, **environment: str) -> tuple[bool, str, float]:
    """Run the tests. Return whether they passed, pytest's error lines, and the seconds that they took."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{FOLDER}/{test}" for test in tests)]
    if all(test.startswith("test_templates.py") for test in tests):
        command.append(f"--confcutdir={FOLDER}")  # they do not need tests/conftest.py, which imports torch
    began = time.monotonic()
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    said = "\n".join(text for text in done.stdout.splitlines() if text.startswith("E "))
    assert done.returncode in (0, 1), f"pytest could not run the tests:\n{done.stdout}{done.stderr}"
    assert not re.search(r"\d (error|skipped)", done.stdout), f"not tried:\n{done.stdout}"
    return done.returncode == 0, said, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
