# shellcheck shell=bash disable=SC1090,SC2034
# The scripts of this folder source this file in the batch shell of a job. It reads the site's file and defines shared
# functions.
LOCAL_DISK='' MAX_CRASHES=3 INSIDE=() SRUN_OPTIONS=() RESUME=''
SITE=${SITE:-slurm/site.sh}
if [ -f "$SITE" ]; then source "$SITE"; fi      # before `set -u`, with which many `module` commands fail
set -u
export PATH=$PWD/.venv/bin:$PATH                # before the folders that the site's modules add

# The id of an array's element: `scontrol requeue` with the plain job id can requeue the whole array.
SELF=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))

say() { echo "=== $(date '+%F %T') job $SELF, attempt $ATTEMPT: $*"; }

# Runs a command as one process per node, on all nodes or, with --nodes=1, on one, in the site's container if it names one.
# Replaces this shell. The command ignores USR1, which would kill the launcher or the program that starts the container.
# Children inherit this until the program installs its own handler.
on_nodes() {
  local nodes=$SLURM_JOB_NUM_NODES
  if [ "$1" = --nodes=1 ]; then nodes=1; shift; fi
  exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} \
    bash -c 'trap "" USR1; exec "$@"' step ${INSIDE[@]+"${INSIDE[@]}"} "$@"
}

# Starts a step, waits for it across signals, and sets $code to its exit code. The step runs in the background and `wait`
# in a loop, since bash runs a trap only between commands. A trap only sets a variable, and each script's own `heard`
# acts on it: if a step ends while a trap runs commands, bash 5.2 reports their exit code for it, or -1.
run_step() {
  (on_nodes "$@") &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    wait "$step"
    heard
  done
  wait "$step"
  code=$?
  if [ "$code" = -1 ]; then code=1; fi
  step=''
}

# Succeeds unless Slurm is ending this job. Slurm requeues a job that it ends, if it should: a cancelled job must not be
# requeued here, and a dead node is not a crash of the program. If Slurm does not answer, it is not ending the job.
is_running() {
  local state
  state=$(squeue -h -j "$SELF" -o %T) || return 0
  [ "$state" = RUNNING ]       # for a job that is being requeued squeue prints nothing
}

# Requeues this job, which ends it immediately.
requeue() {
  say "$*; back into the queue"
  if scontrol requeue "$SELF"; then exec sleep 600; fi     # Slurm kills this; a shell would still run a line or two
  if is_running; then
    say "Slurm did not requeue it: submit it again${RESUME:+; $RESUME}"
  else
    say "Slurm had already requeued or ended it"
  fi
}
