#!/usr/bin/env bash
# All tests, on a machine that has nothing but Python 3.11: arguments go to pytest, as in `bash tests/run.sh -k masks`.
# --gpu runs those that need a GPU, and no others: these run on the CPU, wherever they are.
# --long kills the trainer a hundred times instead of five (some minutes more).
set -euo pipefail
if [[ "${1:-}" == --long ]]; then
  export KILLS=100
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh tests/requirements.txt
# Two processes with one thread each: the models are so small that threads would only wait for each other.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# One test at a time, in conftest.py's order.
exec .venv/bin/python -m pytest -n "${PYTEST_WORKERS:-2}" --dist load --maxschedchunk 1 "$@"
