#!/usr/bin/env bash
# Makes .venv, installs requirements-dev.txt, and runs the whole test suite. Uses an existing environment with
# PYTHON=/path/to/python. Further words go to pytest, e.g. scripts/test.sh -k sage.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
setup requirements-dev.txt
exec "$PYTHON" -m pytest "$@"
