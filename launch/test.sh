#!/usr/bin/env bash
# Installs the packages for the tests, checks style and types, and runs the tests.
#
#   bash launch/test.sh              all of them
#   bash launch/test.sh unit         the fast tests, which need no torch and start no process
#   bash launch/test.sh process      the tests of one process, without the slow ones
#   bash launch/test.sh -k plan      arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh dev
export PATH=$PWD/.venv/bin:$PATH
unit=(
  tests/order/test_demand.py tests/order/test_keyed_random.py tests/order/test_shuffle_quality.py
  tests/order/test_traffic.py tests/sharding/test_archives.py tests/sharding/test_splits.py
  tests/data/test_decode.py tests/data/test_manifest.py tests/inference/test_reliability.py tests/training/test_console.py
  tests/training/test_journal.py tests/training/test_run_lock.py tests/test_docs.py tests/test_settings.py
)
case ${1:-} in
  unit) shift; exec pytest -m "not slow" "${unit[@]}" "$@" ;;
  process)
    shift
    exec pytest -m "not slow" --ignore tests/chaos --ignore tests/distributed --ignore tests/gpu --ignore tests/slurm "$@" ;;
esac
ruff check .
ruff format --check .
mypy wasteddp launch
pytest --durations 30 "$@"
