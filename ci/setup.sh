#!/usr/bin/env bash
# Makes .venv with the pinned versions. Safe to run twice: a finished set-up is recognised by its stamp.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python_bin="${PYTHON:-python3}"
stamp=".venv/structdiff-$(cat pyproject.toml ci/constraints.txt ci/setup.sh | sha256sum | cut -c1-16)"
if [ -f "$stamp" ]; then
    exit 0
fi
"$python_bin" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || {
    echo "ci/setup.sh: Python 3.10 to 3.13 is needed, $("$python_bin" --version) found; set PYTHON=/path/to/python3.11" >&2
    exit 1
}
"$python_bin" -m venv .venv
rm -f .venv/structdiff-*    # stamps of other pins, which no longer hold
# torch before monai: resolved together, pip would take the newest build with all its CUDA packages.
.venv/bin/pip install --quiet torch==2.13.0
.venv/bin/pip install --quiet --constraint ci/constraints.txt --editable ".[test,format]"
# Only its files are read, for the viewer of the report; what it needs in Jupyter stays out.
.venv/bin/pip install --quiet --constraint ci/constraints.txt --no-deps ipyniivue
touch "$stamp"
