#!/bin/bash
# stage.sh SHARDS FOLDER: copies a shard set to FOLDER on this node's own disk, and re-reads every byte of the copy.
# train.sh runs it on each node. A copy that is there and of the same manifest is only re-read; two jobs take turns.
set -eu
copy=$2/$(basename "$1")
mkdir -p "$2"
exec 9>"$copy.lock"
flock 9
if ! cmp -s "$1/manifest.json" "$copy/manifest.json"; then
  rm -rf "$copy" "$copy.tmp"
  cp -r "$1" "$copy.tmp"
  mv "$copy.tmp" "$copy"
fi
python -m wasteddp.cli verify "$copy" || { rm -rf "$copy"; exit 1; }
