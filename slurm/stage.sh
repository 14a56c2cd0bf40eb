#!/bin/bash
# stage.sh SHARDS COPY: copies a shard set to this node's local disk and re-reads every byte of the copy. train.sh runs it
# on each node. An existing copy is only re-read; jobs that need the same copy take turns. A damaged copy is removed, and
# the next job copies again; after any other failure the copy stays, since another job may be reading it.
set -eu
mkdir -p "$(dirname "$2")"
exec 9>"$2.lock"
flock 9
trap 'rm -rf "$2.tmp"' EXIT                    # also when a copy failed
if [ ! -d "$2" ]; then
  rm -rf "$2.tmp"
  cp -r "$1" "$2.tmp"
  mv "$2.tmp" "$2"
fi
code=0
python -m wasteddp.cli verify "$2" || code=$?
if [ "$code" = 2 ]; then                       # damaged: files that another job has opened stay readable
  rm -rf "$2.damaged"
  mv "$2" "$2.damaged"
  rm -rf "$2.damaged"
fi
exit "$code"
