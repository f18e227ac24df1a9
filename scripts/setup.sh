# Sourced by the other scripts: leaves $PYTHON, an interpreter that has everything in the requirements file named in $1.
# Makes .venv unless PYTHON=… names an existing environment; installs only what is missing.

fail() { echo "error: $*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

satisfied() {  # every requirement that applies here is installed in a version that fits
  "$PYTHON" - "$1" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement

def check(path):
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            check(path.parent / line[3:])
        elif line:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate():
                assert need.specifier.contains(version(need.name), prereleases=True), need

check(Path(sys.argv[1]))
PY
}

setup() {
  local requirements=$1
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not a program"
    new_enough "$PYTHON" || fail "PYTHON=$PYTHON is older than Python 3.10, or no Python at all"
  else
    PYTHON=$PWD/.venv/bin/python
    if ! { [ -x "$PYTHON" ] && "$PYTHON" -m pip --version >/dev/null 2>&1; }; then
      local base=""
      for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if new_enough "$candidate"; then base=$candidate; break; fi
      done
      [ -n "$base" ] || fail "no Python 3.10 or newer was found; install one, or name it: PYTHON=/path/to/python"
      echo "making .venv with $("$base" --version)"
      "$base" -m venv --clear .venv || fail "could not make .venv here: is the disk full, or python3-venv missing?"
    fi
  fi
  satisfied "$requirements" && return
  local room
  room=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
  [ "$room" -ge "${ROOM_GB:-8}" ] || fail "installing PyTorch needs 8 GB on this disk, and $room GB are free (ROOM_GB=0 tries anyway)"
  echo "installing $requirements (PyTorch is large: a few minutes)"
  local log
  log=$(mktemp)
  if ! "$PYTHON" -m pip install --disable-pip-version-check --quiet -r "$requirements" >"$log" 2>&1; then
    fail "could not install $requirements: $(grep -iE 'no space|error' "$log" | tail -n 1) (no network, or no room? all of pip's output: $log)"
  fi
  rm -f "$log"
}
