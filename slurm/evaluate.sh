#!/bin/bash
#SBATCH --job-name=wasteddp-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# sbatch slurm/evaluate.sh RUN [--split test] [--shards FOLDER]
# sbatch --gpus-per-node=0 --array=0-4 slurm/evaluate.sh runs/wasteddp-17       the runs of an array: RUN/<element>
source slurm/common.sh || exit 2       # submit it from the checkout, or with --chdir=CHECKOUT
run=${1:?sbatch slurm/evaluate.sh RUN}${SLURM_ARRAY_TASK_ID:+/$SLURM_ARRAY_TASK_ID}
shift
say "evaluates $run on $SLURM_JOB_NODELIST"
on_nodes python -m wasteddp.cli evaluate "$run" "$@"
