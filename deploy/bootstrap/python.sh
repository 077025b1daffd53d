#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Prints the interpreter that the venv is made with: the system's where it is new enough, for its headers come as a
# package, and else the first python3 of the path.
set -euo pipefail

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
complete() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

on_path=$(command -v python3 || true)
for python in /usr/bin/python3 "$on_path"; do
    if [[ -n $python ]] && new_enough "$python" && complete "$python"; then
        echo "$python"
        exit 0
    fi
done
# None has venv yet: on Debian, python3-venv will give it to the system's.
for python in /usr/bin/python3 "$on_path"; do
    if [[ -n $python ]] && new_enough "$python"; then
        echo "$python"
        exit 0
    fi
done
echo "frostline: no python3 >= 3.11 (looked at /usr/bin/python3 and the path); install one" >&2
exit 1
