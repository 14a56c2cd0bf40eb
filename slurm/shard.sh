#!/bin/bash
#SBATCH --job-name=wasteddp-shard
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=%x-%A_%a.out
# bash slurm/shard.sh PARTS SOURCE --out shards/NAME [options of `wasteddp shard`]      options of sbatch: SBATCH="--time=8:00:00"
#
# Submits three jobs that run one after the other: an array that reads, an array that writes, and a last step that writes
# the manifest. The set is bit for bit the one that one machine writes. If an element fails, run the same command again:
# it submits only the elements that are not done.
if [ -z "${SLURM_JOB_ID:-}" ]; then
  set -eu
  parts=${1:-} out=''
  [[ $parts =~ ^[1-9][0-9]*$ ]] || { echo "error: PARTS is '$parts': bash slurm/shard.sh 8 SOURCE --out shards/NAME" >&2; exit 2; }
  shift
  for ((i = 1; i <= $#; i++)); do
    case ${!i} in
      --out) j=$((i + 1)) out=${!j:-} ;;
      --out=*) out=${!i#--out=} ;;
    esac
  done
  out=${out/#\~\//$HOME/}                       # as the program does; bash leaves --out=~/set as it is
  [ -n "$out" ] || { echo "error: --out is missing: bash slurm/shard.sh 8 SOURCE --out shards/NAME" >&2; exit 2; }
  export SHARD_PARTS=$parts SHARD_DONE
  SHARD_DONE=$out/.sharding/done-$(printf '%s\0' "$@" | sha256sum | cut -c 1-8)    # other options create another set
  after=''
  for stage in read write; do
    waiting=()
    for ((i = 1; i <= parts; i++)); do
      if [ ! -e "$SHARD_DONE-$stage-$i-of-$parts" ] && [ ! -e "$out/manifest.json" ]; then waiting+=("$i"); fi
    done
    if [ ${#waiting[@]} = 0 ]; then
      echo "$stage: done"
      continue
    fi
    after=$(STAGE=$stage sbatch --parsable ${SBATCH:-} ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} \
      --array="$(IFS=,; echo "${waiting[*]}")" slurm/shard.sh "$@")
    echo "$stage: job $after, elements ${waiting[*]}"
  done
  last=$(STAGE=merge sbatch --parsable ${SBATCH:-} ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} slurm/shard.sh "$@")
  echo "merge: job $last"
  exit
fi

source slurm/common.sh || exit 2       # submit it from the checkout, or with --chdir=CHECKOUT
step='' warned=''
trap 'warned=1' USR1
heard() { if [ -n "$warned" ]; then kill -TERM "$step"; fi; }  # finished work is recorded: the next attempt continues there
part=()
if [ "$STAGE" != merge ]; then part=(--part "$SLURM_ARRAY_TASK_ID/$SHARD_PARTS" --stage "$STAGE"); fi
say "$STAGE ${part[*]} on $SLURM_JOB_NODELIST"
run_step python -m wasteddp.cli shard "$@" ${part[@]+"${part[@]}"}
if [ "$code" = 0 ] && [ "$STAGE" != merge ]; then
  touch "$SHARD_DONE-$STAGE-$SLURM_ARRAY_TASK_ID-of-$SHARD_PARTS"
fi
if [ "$code" != 0 ] && [ -n "$warned" ] && is_running; then requeue "the time limit is near"; fi
say "ended with exit code $code"
exit "$code"
