#!/usr/bin/env bash
# Installs, shards, trains, evaluates and classifies images. A second run reuses all results.
#
#   bash launch/quickstart.sh                        on a small set of drawn, synthetic images; no network needed for it
#   IMAGES=/my/folder bash launch/quickstart.sh      on your images: a folder of class folders, a zip or tar of one, or a CSV
#   OUT=/scratch/me bash launch/quickstart.sh        shards and run go there instead of shards/ and runs/
#   bash launch/quickstart.sh --set train.epochs=5   arguments go to the training
#   TORCH_INDEX_URL, PYTHON                          see launch/install.sh
set -euo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PWD/.venv/bin:$PATH
say() { printf '\n=== %s\n' "$*"; }

bash launch/install.sh

if [ -n "${IMAGES:-}" ]; then
  images=$(cd "$start" && realpath "$IMAGES")
  name=$(basename "$images"); name=${name%%.*}
  shards=${OUT:+$OUT/}shards/$name run=${OUT:+$OUT/}runs/quickstart-$name
  say "sharding $images"
  wasteddp shard "$images" --out "$shards"
else
  shards=${OUT:+$OUT/}shards/sample run=${OUT:+$OUT/}runs/quickstart
  say "drawing and sharding the synthetic sample"
  wasteddp shard shards/sample.yaml --out "$shards"
fi

say "training"
accelerate launch --quiet wasteddp/train.py --config configs/quickstart.yaml \
  --set data.shards="$shards" --set run.out="$run" "$@"

say "evaluating on the test split"
wasteddp evaluate "$run" --split test --shards "$shards"

say "classifying a few images"
if [ -z "${IMAGES:-}" ]; then
  [ -d "$run/new-images" ] || wasteddp draw "$run/new-images" --images-per-class 2 --seed 2026
  wasteddp predict "$run" "$run/new-images" --csv "$run/predictions.csv"
elif [ -d "$images" ]; then
  # some images of the test split: `source` of each row is the path inside the folder
  mapfile -t some < <(python -c '
import csv, sys
for row in list(csv.DictReader(open(sys.argv[1])))[:6]: print(sys.argv[2] + "/" + row["source"])
' "$run/evaluations/test/predictions.csv" "$images")
  wasteddp predict "$run" "${some[@]}" --csv "$run/predictions.csv"
fi

cat <<END

=== the files of this run
shards        $shards
model         $run/model
log, metrics  $run/log.txt, $run/metrics.jsonl
evaluation    $run/evaluations/test/ (metrics.json, confusion.csv, confusion.png, predictions.csv)
report        $run/report.html (open it in a browser)
checkpoints   $run/checkpoints

classify more:  .venv/bin/wasteddp predict $run PHOTO.jpg MORE/*.jpg
your images:    IMAGES=/my/folder bash launch/quickstart.sh
END
