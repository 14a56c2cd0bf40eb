#!/usr/bin/env bash
# Fine-tunes EfficientNet-Lite0 on TrashNet three times: the head, the last stage and the head, all layers.
#
#   launch/finetune_lite0.sh SHARDS OUT [EPOCHS [SEED]]
#
# SHARDS: the set of `wasteddp shard shards/trashnet.yaml`. OUT: a folder for the weights and the runs. The packages are
# in configs/trashnet-efficientnet-lite0.yaml. After a stop, the same command goes on. WHAT="backbone layer3" names the
# stages to freeze, one run each; the default is "backbone layer3 none". THREADS: of each run, 2.
set -euo pipefail
shards=$1 out=$2 epochs=${3:-12} seed=${4:-0}
cd "$(dirname "$0")/.."
mkdir -p "$out"
test -e "$out/lite0.pth" || python -m launch.efficientnet_lite0 "$out/lite0.pth"
for frozen in ${WHAT:-backbone layer3 none}; do
    run=$out/$frozen-$epochs-$seed
    python -m wasteddp train --cpu --config configs/trashnet-efficientnet-lite0.yaml \
        --set "data.shards=$shards" --set "model.weights=$out/lite0.pth" --set "run.out=$run" --set "run.seed=$seed" \
        --set "run.threads=${THREADS:-2}" --set "train.epochs=$epochs" --set "model.freeze=$frozen" \
        --set track.wandb=disabled
    python -m wasteddp evaluate "$run" --split test --batch-size 32
done
