#!/usr/bin/env bash
# make_venv.sh FOLDER [PYTHON]: a virtual environment in FOLDER with paca (editable) and its tools installed.
# PYTHON left out: the first of the usual names that runs and is new enough.
set -euo pipefail
venv=$1
wanted=${2:-}
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

fail() {
    printf '\n%s\n' "$1" >&2
    exit 1
}

if [ -n "$wanted" ]; then
    command -v "$wanted" >/dev/null || fail "PYTHON=$wanted: no such program. Give the path of a Python 3.11 or newer."
    "$wanted" -c "$new_enough" 2>/dev/null \
        || fail "PYTHON=$wanted is $("$wanted" --version 2>&1); paca needs Python 3.11 or newer."
    python=$wanted
else
    python=
    # Asking each for its version also skips pyenv's shims of versions that are not active.
    for name in python3.11 python3.12 python3.13 python3 python; do
        if "$name" -c "$new_enough" 2>/dev/null; then
            python=$name
            break
        fi
    done
    [ -n "$python" ] || fail "paca needs Python 3.11 or newer and found none (python3 here: $(python3 --version 2>&1 || true)).
Install one (Debian, Ubuntu: apt install python3 python3-venv), or say where it is: make demo PYTHON=/path/to/python3"
fi

# A folder left by an interrupted set-up has no working pip; --clear starts it over.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "Creating $venv with $("$python" --version) ..."
    "$python" -m venv --clear "$venv" || fail "$python could not make a virtual environment in $venv; its message is above.
If it says that ensurepip is not available (Debian, Ubuntu): apt install python3-venv. Then run make again."
fi

echo "Installing paca and what it needs into $venv: about two minutes, and up to ten on a slow line or machine ..."
failed="The installation failed; pip's message is above.
Nothing else was changed: run the same command again once the cause is gone."
install=("$venv/bin/python" -m pip install --editable '.[dev]')
if [ -t 1 ]; then # bars and names for a person
    "${install[@]}" || fail "$failed"
else # a line for each package in a log; what fails goes to standard error
    PYTHONUNBUFFERED=1 "${install[@]}" --progress-bar off | while IFS= read -r line; do # awk would hold lines back
        case $line in Collecting\ * | Installing\ * | *MB\)) printf '%s\n' "$line" ;; esac
    done || fail "$failed"
fi
