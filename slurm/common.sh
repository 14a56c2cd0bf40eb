# shellcheck shell=bash disable=SC1090,SC2034
# Sourced by the templates of this folder, in the batch shell of a job: reads the site's file, and defines the words
# that they share.
LOCAL_DISK='' MAX_CRASHES=3 INSIDE=() SRUN_OPTIONS=()
SITE=${SITE:-slurm/site.sh}
if [ -f "$SITE" ]; then source "$SITE"; fi      # before `set -u`, which many a `module` does not survive
set -u
export PATH=$PWD/.venv/bin:$PATH                # before what the site's modules put there

# An array's element by its own name: `scontrol requeue` of the plain job id can requeue the whole array.
SELF=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))

say() { echo "=== $(date '+%F %T') job $SELF, attempt $ATTEMPT: $*"; }

# One process a node, on all nodes or, with --nodes=1, on one; inside the site's container where it names one. Replaces
# this shell. USR1 is ignored from here on: it would kill the launcher, and a container's starter. Children inherit that
# until the program installs its own handler.
on_nodes() {
  local nodes=$SLURM_JOB_NUM_NODES
  if [ "$1" = --nodes=1 ]; then nodes=1; shift; fi
  exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} \
    bash -c 'trap "" USR1; exec "$@"' step ${INSIDE[@]+"${INSIDE[@]}"} "$@"
}

# Starts a step, waits for it whatever signals come, and leaves its exit code in $code. In the background and in a loop:
# bash runs a trap only between commands. A trap only sets a word, and `heard`, the template's own, does what is to be
# done: bash 5.2 gives a step that ends while a trap runs commands the exit code of these, and at worst, of none, -1.
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

# Whether Slurm is not about to end this job. What it ends it also requeues if it should: a cancelled job must not come
# back, and a dead node is no crash of ours. If Slurm does not answer, it is not ending anything.
is_running() {
  local state
  state=$(squeue -h -j "$SELF" -o %T) || return 0
  [ "$state" = RUNNING ]       # of a job that is being put back it says nothing
}

# Puts this job back into the queue, which ends it at once.
requeue() {
  say "$*; back into the queue"
  if scontrol requeue "$SELF"; then exec sleep 600; fi     # Slurm kills this; a shell would live on for a line or two
  if is_running; then
    say "Slurm did not requeue it: submit it again, with RUN_OUT=${RUN_OUT:-} if it is a training, and it goes on"
  else
    say "Slurm had put it back, or ended it, before that"
  fi
}
