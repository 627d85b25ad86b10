#!/usr/bin/env bash
# Lint, format and types, from .venv; changes no file. `.venv/bin/ruff format .` mends the format.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
