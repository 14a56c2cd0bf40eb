#!/usr/bin/env bash
# Installs the packages for the tests, checks style and types, and runs the tests. At the end it prints the seconds.
#
#   bash launch/test.sh              all of them, two at a time
#   bash launch/test.sh unit         in seconds: the tests that need no torch and start no process
#   bash launch/test.sh process      in minutes: the tests that start no other process, without the slow ones
#   bash launch/test.sh -k plan      arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh dev
export PATH=$PWD/.venv/bin:$PATH
SECONDS=0
unit=(
  tests/data/test_next_uses.py tests/order/test_keyed_random.py tests/order/test_plan_quality.py
  tests/sharding/test_archives.py tests/sharding/test_splits.py
  tests/data/test_decode.py tests/data/test_manifest.py tests/inference/test_reliability.py tests/training/test_console.py
  tests/training/test_journal.py tests/training/test_run_lock.py tests/test_docs.py tests/test_settings.py
)
two=(-n 2 --dist loadgroup)  # two processes of pytest; tests/conftest.py forms the groups
tier=all
trap 'code=$?; echo "$tier: ${SECONDS} s, exit code $code"' EXIT

case ${1:-} in
  unit) tier=unit; shift; pytest -m "not slow" "${unit[@]}" "$@"; exit ;;
  process) tier=process; shift; pytest "${two[@]}" -m "not slow and not processes" --ignore tests/gpu "$@"; exit ;;
esac
ruff check .
ruff format --check .
mypy wasteddp launch
if [ $# -gt 0 ]; then tier="pytest $*"; pytest --durations 30 "$@"; exit; fi
code=0
pytest "${two[@]}" --durations 40 --ignore tests/gpu || code=$?
pytest tests/gpu || code=$?  # alone, since some measure
exit "$code"
