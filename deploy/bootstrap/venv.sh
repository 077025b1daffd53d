#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# venv.sh VENV PYPROJECT: makes the venv and installs the pinned requirements, when the last run installed others.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 pyproject=$2
record=$venv/frostline-requirements.txt

python=$("$here/python.sh")
wanted=$("$python" "$here/requirements.py" "$pyproject")
if [[ -x $venv/bin/python ]] && "$venv/bin/python" -c '' 2>/dev/null && [[ -f $record ]] &&
    [[ $(<"$record") == "$wanted" ]]; then
    exit 0
fi
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    echo "frostline: making the venv $(basename "$venv") with $python ($("$python" -V))"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
echo "frostline: installing $(wc -l <<<"$wanted") pinned Python packages and what they need into $(basename "$venv")"
rm -f "$record"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -r /dev/stdin <<<"$wanted"
printf '%s\n' "$wanted" >"$record"
