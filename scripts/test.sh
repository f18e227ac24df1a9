#!/usr/bin/env bash
# Makes .venv, installs requirements-dev.txt, and runs the whole test suite. Uses an existing environment with
# PYTHON=/path/to/python. Further arguments go to pytest, e.g. scripts/test.sh -k sage; -n 8 for as many processes.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup requirements-dev.txt
export OMP_NUM_THREADS=1  # threads of several processes would stall each other
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
