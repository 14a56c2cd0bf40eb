#!/usr/bin/env bash
# Trains small networks on TrashNet from random weights, each without and with a teacher, and evaluates them on test.
#
#   launch/distill_lite0.sh SHARDS OUT [EPOCHS [SEED]]
#
# SHARDS: the set of `wasteddp shard shards/trashnet.yaml`. OUT: a folder for the weights and the runs. The packages are
# in configs/trashnet-efficientnet-lite0.yaml. The teacher is EfficientNet-Lite0, fine-tuned at the students' 128 px: it
# sees their images, and one that learned at 224 px knows less of them (docs/notes.md). After a stop, the same command
# goes on. STUDENTS="resnet18" names the students. THREADS: of each run, 2.
set -euo pipefail
shards=$1 out=$2 epochs=${3:-40} seed=${4:-0}
cd "$(dirname "$0")/.."
mkdir -p "$out"
test -e "$out/lite0.pth" || python -m launch.efficientnet_lite0 "$out/lite0.pth"

# run NAME CONFIG KEY=VALUE...: a training in OUT/NAME, and its evaluation on test
run() {
  local name=$1 config=$2 sets=()
  shift 2
  for one in "data.shards=$shards" "run.out=$out/$name" "run.seed=$seed" "run.threads=${THREADS:-2}" \
    track.wandb=disabled "$@"; do sets+=(--set "$one"); done
  python -m wasteddp train --cpu --config "configs/$config.yaml" "${sets[@]}"
  python -m wasteddp evaluate "$out/$name" --split test --batch-size 32
}

teacher=teacher-$seed
run "$teacher" trashnet-efficientnet-lite0 "model.weights=$out/lite0.pth" data.image_size=128 data.eval_size=144 \
  model.freeze=none precision=fp32
for student in ${STUDENTS:-mobilenet_v3_small resnet18}; do
  case $student in resnet*) precision=auto ;; *) precision=fp32 ;; esac # depthwise convolutions are slower in bf16
  for taught in "" "$out/$teacher/model"; do
    run "$student-${taught:+taught-}$epochs-$seed" trashnet-scratch "model.arch=$student" "train.teacher=$taught" \
      "train.epochs=$epochs" "precision=$precision" schedule.start_size=0 \
      'model.mean=[0.4980392156862745, 0.4980392156862745, 0.4980392156862745]' \
      'model.std=[0.5019607843137255, 0.5019607843137255, 0.5019607843137255]'
  done
done
