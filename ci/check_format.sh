#!/usr/bin/env bash
# Lint, format and types, from .venv; changes no file. `.venv/bin/ruff format .` mends the format.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# What is packed or handed to the model zoo also passes its tools, with its settings.
.venv/bin/black --quiet --check custom ci/unit_tests
.venv/bin/isort --quiet --check custom ci/unit_tests
.venv/bin/flake8 --config ci/flake8.ini custom ci/unit_tests
