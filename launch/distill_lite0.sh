#!/usr/bin/env bash
# Trains small networks on TrashNet from random weights, each without and with a teacher, and evaluates them on test.
#
#   launch/distill_lite0.sh SHARDS OUT TEACHER [EPOCHS [SEED]]
#
# SHARDS: the set of `wasteddp shard shards/trashnet.yaml`. OUT: a folder for the runs. TEACHER: the model of a run of
# launch/finetune_lite0.sh. After a stop, the same command goes on. STUDENTS="resnet18" names the students. THREADS: of
# each run, 2. The images keep one size from the first epoch: the teacher learned at 224 px. It needs wasteddp[timm].
set -euo pipefail
shards=$1 out=$2 teacher=$3 epochs=${4:-40} seed=${5:-0}
cd "$(dirname "$0")/.."
mkdir -p "$out"
for student in ${STUDENTS:-mobilenet_v3_small resnet18}; do
    for taught in "" "$teacher"; do
        run=$out/$student-${taught:+taught-}$epochs-$seed
        python -m wasteddp train --cpu --config configs/trashnet-scratch.yaml \
            --set "data.shards=$shards" --set "run.out=$run" --set "run.seed=$seed" --set "run.threads=${THREADS:-2}" \
            --set "model.arch=$student" --set "train.teacher=$taught" --set "train.epochs=$epochs" \
            --set 'model.mean=[0.4980392156862745, 0.4980392156862745, 0.4980392156862745]' \
            --set 'model.std=[0.5019607843137255, 0.5019607843137255, 0.5019607843137255]' \
            --set schedule.start_size=0 --set precision=fp32 --set track.wandb=disabled
        python -m wasteddp evaluate "$run" --split test --batch-size 32
    done
done
