#!/usr/bin/env bash
# Creates .venv in the checkout with the tested versions. Does nothing if it is up to date.
#
#   bash launch/install.sh                           the packages for training
#   bash launch/install.sh dev                       and the packages for the tests
#   PYTHON=python3.12 bash launch/install.sh         another interpreter, 3.11 or newer
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu bash launch/install.sh
#                                                    PyTorch's own wheels (cpu, cu126, rocm6.4, ...) instead of PyPI's
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { printf 'error: %s\n  so: %s\n  do: %s\n' "$@" >&2; exit 2; }

extra=${1:-}
python=${PYTHON:-python3}
stamp=.venv/.installed${extra:+-$extra}
wanted=$(cat launch/constraints.txt pyproject.toml <(echo "${TORCH_INDEX_URL:-}") | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "$python is $("$python" --version 2>&1 || true), but Python 3.11 or newer is needed" \
    "the package cannot be installed" "install a newer Python and name it: PYTHON=python3.12 bash launch/install.sh"
[ -x .venv/bin/pip ] || { rm -rf .venv; "$python" -m venv .venv; } ||
  fail "$python cannot create a virtual environment" "the packages cannot be installed" \
    "on Debian and Ubuntu run: apt-get install python3-venv, then the same command again"

echo "installing into .venv (several minutes on a slow network; PyTorch with CUDA takes 6 GB of disk)"
index=.venv/.torch-index # of the torch that is installed; any build of the same version would satisfy pip
if [ "$(cat "$index" 2>/dev/null)" != "${TORCH_INDEX_URL:-}" ]; then
  .venv/bin/pip uninstall --quiet --yes torch torchvision 2>/dev/null
fi
if [ -n "${TORCH_INDEX_URL:-}" ]; then
  # both from the same index: a torch and a torchvision of different builds do not import together
  .venv/bin/pip install --quiet -c launch/constraints.txt --index-url "$TORCH_INDEX_URL" torch torchvision
fi
.venv/bin/pip install --quiet -c launch/constraints.txt -e ".${extra:+[$extra]}"
echo "${TORCH_INDEX_URL:-}" >"$index"
echo "$wanted" >"$stamp"
if [ -n "$extra" ]; then echo "$wanted" >.venv/.installed; fi
