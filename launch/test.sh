#!/usr/bin/env bash
# Installs what the tests need, then checks style and types and runs the tests. Arguments go to pytest: -k plan, -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh dev
export PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy wasteddp launch
pytest "$@"
