#!/usr/bin/env bash
# Installs, shards, trains, evaluates and classifies images. A second run reuses all results.
#
#   bash launch/quickstart.sh                        on a small set of drawn, synthetic images; no network needed for it
#   IMAGES=/my/folder bash launch/quickstart.sh      on your images: a folder of class folders, a zip or tar of one, or a CSV
#   OUT=/scratch/me bash launch/quickstart.sh        shards and run go there instead of shards/ and runs/
#   bash launch/quickstart.sh --set train.epochs=5   arguments go to the training
#   bash launch/quickstart.sh --overwrite            after you added images: shards again, and trains a new run
#   TORCH_INDEX_URL, PYTHON                          see launch/install.sh
set -euo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH=$PWD/.venv/bin:$PATH
say() { printf '\n=== %s\n' "$*"; }
overwrite=()
for argument in "$@"; do
  shift
  if [ "$argument" = --overwrite ]; then overwrite=(--overwrite); else set -- "$@" "$argument"; fi
done
if [ -n "${IMAGES:-}" ]; then
  images=$(cd "$start" && realpath -q "${IMAGES/#\~/$HOME}") && [ -e "$images" ] || {
    printf 'error: there is no %s\n  so: there is nothing to train on\n  do: set IMAGES to a folder of class folders, a zip, tar or CSV\n' "$IMAGES" >&2
    exit 2
  }
fi

bash launch/install.sh

if [ -n "${IMAGES:-}" ]; then
  name=$(basename "$images")
  if [ ! -d "$images" ]; then name=$(sed -E 's/\.(zip|csv|tar|tgz|(tar\.)?(gz|bz2|xz|zst))$//I' <<< "$name"); fi
  while [ "${name#.}" != "$name" ]; do name=${name#.}; done # a hidden folder
  if [ -z "$name" ] || [ "$name" = / ]; then
    printf 'error: %s has no name\n  so: its shards would have none\n  do: set IMAGES to a folder below it\n' "$images" >&2
    exit 2
  fi
  shards=${OUT:+$OUT/}shards/$name run=${OUT:+$OUT/}runs/quickstart-$name
  say "sharding $images"
  wasteddp shard "$images" --out "$shards" "${overwrite[@]}"
else
  shards=${OUT:+$OUT/}shards/sample run=${OUT:+$OUT/}runs/quickstart
  say "drawing and sharding the synthetic sample"
  wasteddp shard shards/sample.yaml --out "$shards" "${overwrite[@]}"
fi

if [ ${#overwrite[@]} -gt 0 ] && [ -e "$run" ]; then # the old run stays as it is
  number=2
  while [ -e "$run-$number" ]; do number=$((number + 1)); done
  run=$run-$number
fi

weights=none
if [ -n "${IMAGES:-}" ]; then
  say "looking for ImageNet weights"
  weights=$(python - "$run" "$@" <<'PYTHON'
import contextlib
import sys
from pathlib import Path

from wasteddp import settings
from wasteddp.errors import WastedError
from wasteddp.model import networks, pretrained
from wasteddp.training.distributed import launcher

run, *rest = sys.argv[1:]
given, _ = launcher.parser(None).parse_known_args(["--config", "configs/quickstart.yaml", *rest])
model = settings.load(given.config, given.set).model
try:
    if (own := Path(run, "settings.yaml")).exists():
        weights = settings.load(own).model.weights
    else:
        with contextlib.redirect_stdout(sys.stderr):  # torch reports a download
            pretrained.initialise(networks.build(model.arch, 2), model.arch, "imagenet")
        weights = "imagenet"
except WastedError as error:
    print(f"{error.found}; the network starts from random weights, and needs more images", file=sys.stderr)
    weights = "none"
print(weights)
PYTHON
  )
  echo "the network starts from the weights: $weights"
fi

say "training"
wasteddp train --processes 1 --config configs/quickstart.yaml \
  --set data.shards="$shards" --set run.out="$run" --set model.weights="$weights" "$@"

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

say "writing the report"
wasteddp report "$run"

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
