#!/bin/bash
# stage.sh SHARDS COPY: copies a shard set to this node's local disk and re-reads every byte of the copy. train.sh runs it
# on each node. An existing copy is only re-read; jobs that need the same copy take turns.
set -eu
mkdir -p "$(dirname "$2")"
exec 9>"$2.lock"
flock 9
if [ ! -d "$2" ]; then
  rm -rf "$2.tmp"
  cp -r "$1" "$2.tmp"
  mv "$2.tmp" "$2"
fi
python -m wasteddp.cli verify "$2" || { rm -rf "$2"; exit 1; }
