#!/usr/bin/env bash
# Make the environment and run the tests. Arguments are passed on to pytest, e.g.: bash scripts/test.sh -k config
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
ensure_environment requirements-dev.txt
# Two at a time: many of them wait for programs that they start, stop and kill.
OMP_NUM_THREADS=1 python -m pytest -n 2 "$@"
