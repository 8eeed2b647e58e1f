#!/bin/bash
# All checks in the order in which they are cheap: lint, types, layers, generated code, then the tests.
# usage: run.sh [lint]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH:/usr/sbin:/sbin"
say() { printf '\033[1m== %s\033[0m\n' "$*"; }

say "ruff"
ruff check --quiet .
ruff format --check --quiet . || { echo "not formatted: run make fmt" >&2; exit 1; }
say "mypy --strict"
mypy && mypy --strict tests/conftest.py
say "import layers"
lint-imports --no-cache | tail -n 3
say "generated protobuf code"
proto/generate.sh --check
[ "${1:-}" != lint ] || exit 0

say "tests: unit, property, tamper, conformance, kill, e2e"
exec pytest --durations=10 tests
