#!/usr/bin/env bash
# Installs the packages for the tests, checks style and types, and runs the tests. At the end it prints the seconds.
#
#   bash launch/test.sh              all but the slow ones; those of several processes run beside the others and come last
#   bash launch/test.sh slow         the slow ones: long trainings, kills and faults
#   bash launch/test.sh unit         in seconds: the tests that need no torch and start no process
#   bash launch/test.sh process      in minutes: the tests that start no other process, without the slow ones
#   bash launch/test.sh -k plan      arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh dev
export PATH=$PWD/.venv/bin:$PATH
SECONDS=0
unit=(
  tests/data/remote/test_prefetch.py tests/order/test_keyed_random.py tests/order/test_plan_quality.py
  tests/sharding/test_archives.py tests/sharding/test_splits.py
  tests/data/decoding/test_decode.py tests/data/test_manifest.py tests/inference/test_reliability.py
  tests/training/tracking/test_journal.py tests/files/test_run_lock.py tests/test_docs.py tests/test_settings.py
  --deselect tests/sharding/test_archives.py::test_classes_are_renamed_and_merged  # its command imports torch: 3 s
)
several=(tests/chaos tests/distributed tests/slurm)  # all of their tests start processes, which mostly wait for each other
without=(--ignore tests/gpu "${several[@]/#/--ignore=}")
tier=all other=''
trap 'code=$?; kill $other 2>/dev/null || true; rm -f "${log:-}"; echo "$tier: ${SECONDS} s, exit code $code"' EXIT

# side_by_side FIRST... -- SECOND...: two pytests at once, with arguments of their own. The second one begins with mypy,
# which has one thread, and is shown at the end.
side_by_side() {
  local first=() code=0
  while [ "$1" != -- ]; do first+=("$1"); shift; done
  shift
  log=$(mktemp)
  bash -c 'mypy && exec pytest "$@"' - "$@" >"$log" 2>&1 &
  other=$!
  pytest "${first[@]}" || code=$?
  wait "$other" || code=$?
  other=''
  echo "beside it: mypy, and pytest $*"
  cat "$log"
  return "$code"
}

case ${1:-} in
  unit) tier=unit; shift; pytest -m "not slow" "${unit[@]}" "$@"; exit ;;
  slow) tier=slow; shift; pytest -m slow --durations 30 --ignore tests/gpu "$@"; exit ;;
  process)
    tier=process; shift
    pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not processes" "${without[@]}" "$@"; exit ;;
esac
ruff check .
ruff format --check .
if [ $# -gt 0 ]; then mypy; tier="pytest $*"; pytest --durations 30 "$@"; exit; fi
code=0
others=(-n 2 --dist loadfile --no-loadscope-reorder "${without[@]}" -m "not slow")  # tests/conftest.py has the order
side_by_side --durations 30 "${others[@]}" -- --durations 30 -m "not slow" "${several[@]}" || code=$?
pytest tests/gpu || code=$?  # alone, since some measure
exit "$code"
