#!/bin/bash
#SBATCH --job-name=wasteddp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1            # one launcher a node; it starts one process a GPU
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300            # to this shell, 300 s before the time limit
#SBATCH --output=%x-%j.out
# sbatch [--nodes=N --gpus-per-node=M ...] slurm/train.sh --config configs/resnet50.yaml [--set key=value ...]
#
# Submit it from the checkout, with .venv made by launch/install.sh on a file system that all nodes see. The run's folder
# is RUN_OUT, by default runs/<job name>-<job id>. Before the time limit the run saves and the job is put back in the
# queue; it goes on by itself. Nodes without GPUs: sbatch --gpus-per-node=0 slurm/train.sh ... (one process a node)
set -u
cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/.venv/bin:$PATH
RUN_OUT=${RUN_OUT:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
GPUS=${SLURM_GPUS_ON_NODE:-0}
RANKS=$((SLURM_JOB_NUM_NODES * (GPUS > 0 ? GPUS : 1)))
[ "$GPUS" = 0 ] && export ACCELERATE_USE_CPU=true
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))   # below the ephemeral ports
MULTI=; [ "$RANKS" -gt 1 ] && MULTI=--multi_gpu   # refused for one process; without it several train alone, silently
export RUN_OUT RANKS MASTER_ADDR MASTER_PORT MULTI
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600       # the launcher would kill a rank that saves after 30 s

step= warned= ended=
trap 'warned=1; echo "$(date +%T) time limit is near: saving"; [ -n "$step" ] && kill -USR1 "$step"' USR1
trap 'ended=1' TERM                             # preempted or cancelled: Slurm decides what follows

# $SLURM_NODEID is each node's own, so it must be expanded there. The launcher ignores USR1, and its children inherit
# that until the program installs its handler; otherwise the warning would kill the launcher.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
  trap "" USR1
  exec accelerate launch --quiet $MULTI --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$RANKS" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
    --mixed_precision no --dynamo_backend no wasteddp/train.py "$@" --set run.out="$RUN_OUT"' launch "$@" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"; code=$?

# Never after SIGTERM: a job that its owner cancelled would come back.
if [ -n "$warned" ] && [ -z "$ended" ] && [ -e "$RUN_OUT/RESUMABLE" ]; then
  echo "$(date +%T) saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" && { trap - TERM; sleep 60; }
fi
exit "$code"
