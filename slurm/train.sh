#!/bin/bash
#SBATCH --job-name=wasteddp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1            # one launcher per node; it starts one process per GPU
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300            # to this shell, 300 s before the time limit
#SBATCH --output=%x-%j.out
# sbatch [--nodes=2 --gpus-per-node=4 --cpus-per-task=32 ...] slurm/train.sh --config configs/resnet50.yaml [--set key=value ...]
# sbatch --gpus-per-node=0 slurm/train.sh ...        nodes without GPUs: one process per node, or PROCESSES_PER_NODE=n
# sbatch --array=0-4 slurm/train.sh ...              five seeds: run.seed is the element's number
# SWEEP=FILE sbatch --array=1-3 slurm/train.sh ...   line n of FILE has additional arguments for element n
#
# The arguments are those of `wasteddp train`. The run's folder is --out or run.out as set, or RUN_OUT, or
# runs/<job name>-<job id>; an element uses a subfolder.
source slurm/common.sh || exit 2       # submit it from the checkout, or with --chdir=CHECKOUT

# --- the arguments, and the run's folder unless they set it -----------------------------------------------------------
arguments=("$@")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  if [ -n "${SWEEP:-}" ]; then
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$SWEEP")
    [ -n "$line" ] || { say "error: $SWEEP has no line $SLURM_ARRAY_TASK_ID"; exit 2; }
    # a line is parsed like a command line, with quotes
    eval "arguments+=($line)" || { say "error: line $SLURM_ARRAY_TASK_ID of $SWEEP cannot be parsed: $line"; exit 2; }
  else
    arguments+=(--set "run.seed=$SLURM_ARRAY_TASK_ID")
  fi
fi
RUN_OUT=${RUN_OUT:-runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}

# --- nodes and processes, from Slurm ----------------------------------------------------------------------------------
GPUS=${SLURM_GPUS_ON_NODE:-0}
EACH=$((GPUS > 0 ? GPUS : ${PROCESSES_PER_NODE:-1}))
RANKS=$((SLURM_JOB_NUM_NODES * EACH))
if [ "$RANKS" -gt 1 ]; then LAUNCH=launch/accelerate/nodes.yaml     # without a file accelerate uses the user's default
elif [ "$GPUS" -gt 0 ]; then LAUNCH=launch/accelerate/gpu.yaml
else LAUNCH=launch/accelerate/cpu.yaml; fi
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))   # below the ephemeral ports
export RANKS LAUNCH MASTER_ADDR MASTER_PORT
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600       # the launcher would kill a saving rank after 30 s
unset "${!PET_@}" 2>/dev/null                   # torchrun would read options from these

# How long before the limit Slurm warns. Slurm does not pass it to the job: from SBATCH_SIGNAL, else from the line above.
signal=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=\([^ ]*\).*/\1/p' "$0")}
case $signal in *@*) WASTEDDP_WARNING_S=${signal##*@} ;; *) WASTEDDP_WARNING_S=60 ;; esac     # 60: Slurm's own default
export WASTEDDP_WARNING_S
say "$SLURM_JOB_NUM_NODES node(s) x $EACH process(es), $GPUS GPU(s) each, on $SLURM_JOB_NODELIST"
CORES=${SLURM_CPUS_PER_TASK:-1}                 # of a node
if [ "$CORES" -lt $((8 * GPUS)) ]; then
  say "warning: $CORES core(s) for $GPUS GPU(s), which may wait for decoded images. Submit with --cpus-per-task=$((8 * GPUS))"
fi

step='' warned='' heard='' ended='' started='' code=0
trap 'warned=1' USR1
trap 'ended=1' TERM                             # preempted, cancelled or out of time: Slurm decides what follows
limit() { squeue -h -j "$SELF" -o %e; }
newest() { find "$RUN_OUT/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1; }

# Passes the warning to every process of a step, once. Before the program has written its environment.json it may have
# no handler. After a save or the last step, a second signal would kill the program that writes the report or exits.
warn() {
  until [ "$RUN_OUT/environment.json" -nt "$RUN_OUT/.launched" ]; do
    sleep 1
    kill -0 "$1" 2>/dev/null || return
  done
  kill -USR1 "$1"
}
heard() {
  if [ -z "$warned" ] || [ -n "$heard" ]; then return; fi
  heard=1
  say "the time limit is near ($(limit)): saving"
  warn "$step" 2>/dev/null &
}

# Records an attempt that crashed or finished no step, and requeues the job, MAX_CRASHES times in total.
try_again() {
  echo "$(date '+%F %T') attempt $ATTEMPT on $SLURM_JOB_NODELIST: $*" >>"$RUN_OUT/crashes.txt"
  local crashes
  crashes=$(wc -l <"$RUN_OUT/crashes.txt")
  if [ "$crashes" -le "$MAX_CRASHES" ]; then
    requeue "$* ($crashes of at most $MAX_CRASHES)"
  else
    say "$*: that makes $crashes, MAX_CRASHES is $MAX_CRASHES: not requeued. $RUN_OUT/crashes.txt lists when and where"
  fi
}

# --- check the arguments and the settings before all nodes are used ---------------------------------------------------
# The program parses them. It prints one line: JOB, the run's folder, its shards, and the arguments of wasteddp/train.py.
found=$( (on_nodes --nodes=1 python -m wasteddp.commands.slurm_job "$RUN_OUT" ${arguments[@]+"${arguments[@]}"}) )
code=$?
if [ "$code" = 2 ]; then
  say "the arguments or the settings have an error, its message is above; not requeued"
  exit 2
fi
eval "job=($(sed -n 's/^JOB //p' <<<"$found"))"
if [ "$code" = 0 ] && [ ${#job[@]} = 0 ]; then code=1; fi
FOLDER=${job[0]:-$RUN_OUT} shards=${job[1]:-}
RUN_OUT=$FOLDER${SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}
arguments=(${job[@]+"${job[@]:2}"} --set "run.out=$RUN_OUT")
RESUME="RUN_OUT=$(printf %q "$FOLDER") and the same command${SLURM_ARRAY_TASK_ID:+ with --array=$SLURM_ARRAY_TASK_ID} resume it"
say "the run is $RUN_OUT"
mkdir -p "$RUN_OUT" && rm -f "$RUN_OUT/RESUMABLE" "$RUN_OUT/MISTAKE"
before=$(newest)

# --- copy the shards to each node's disk, if the site names one -------------------------------------------------------
if [ "$code" = 0 ] && [ -n "$LOCAL_DISK" ] && [ -f "$shards/manifest.json" ]; then
  copy=$LOCAL_DISK/$(basename "$shards")-$(sha256sum "$shards/manifest.json" | cut -c 1-12)
  run_step bash slurm/stage.sh "$shards" "$copy"
  if [ "$code" = 0 ]; then
    arguments+=(--set "data.staged=$copy")
  else
    say "staging failed: the shards are read from $shards"
    code=0
  fi
fi

# --- train. $SLURM_NODEID differs between nodes, so the inner text is expanded on each --------------------------------
# accelerate-launch is `accelerate launch` without its other commands, one of which imports timm for 2 s.
if [ "$code" = 0 ] && [ -z "$warned$ended" ]; then
  started=1
  touch "$RUN_OUT/.launched"
  run_step bash -c '
    exec accelerate-launch --quiet --config_file "$LAUNCH" --num_machines "$SLURM_JOB_NUM_NODES" \
      --machine_rank "$SLURM_NODEID" --num_processes "$RANKS" --main_process_ip "$MASTER_ADDR" \
      --main_process_port "$MASTER_PORT" wasteddp/train.py "$@"' launch "${arguments[@]}"
fi

# --- what follows. If Slurm ends the job, nothing: a cancelled job must not be requeued -------------------------------
# A step ends at a node's death before Slurm detects it: wait until squeue reports that Slurm is ending the job.
if [ "$code" != 0 ] && [ -z "$ended" ] && [ ! -e "$RUN_OUT/RESUMABLE" ] && [ ! -e "$RUN_OUT/MISTAKE" ]; then sleep 5; fi
if [ -n "$ended" ] || ! is_running; then
  say "ended by Slurm; if it was preempted or its node failed, Slurm requeues it"
elif [ -n "$warned" ] && { [ -e "$RUN_OUT/RESUMABLE" ] || [ -z "$started" ]; }; then
  if [ "$(newest)" = "$before" ]; then
    try_again "warned before the first step: --time must leave more than the start takes and $WASTEDDP_WARNING_S s of warning"
  else
    requeue "saved before the time limit"
  fi
elif [ "$code" = 0 ]; then
  say "finished"
elif [ -e "$RUN_OUT/RESUMABLE" ]; then
  say "stopped by a signal and saved; not requeued. $RESUME"
elif [ -e "$RUN_OUT/MISTAKE" ]; then
  say "there is an error to fix, its message is above; not requeued"
  code=2
else
  try_again "crashed, exit code $code"
fi
exit "$code"
