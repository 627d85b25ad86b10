#!/usr/bin/env bash
# Set-up, style and types, then the fast tests; --slow adds the slow ones. Needs no GPU.
set -euo pipefail
usage="usage: bash ci/test.sh [--slow]"
selection=(-m "not slow")
for argument in "$@"; do
    case "$argument" in
        --slow) selection=() ;;
        *) echo "ci/test.sh: unknown argument '$argument'; $usage" >&2; exit 2 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Idle OpenMP threads that spin would starve the tests that start processes of their own.
export OMP_WAIT_POLICY=passive
bash ci/setup.sh
bash ci/check_format.sh
# Two processes, each with whole files, whose fixtures are made once.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "${selection[@]}"
