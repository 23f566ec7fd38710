#!/usr/bin/env bash
# Everything that only a GPU can show, in eight minutes at most and without a network: right numbers, the tests' CUDA branches, speed
# against the goals, the whole program beside timm's loop, where a step's time goes, memory, waits. Results: a table, and gpu_check.json.
#   bash scripts/gpu_check.sh                               # all parts
#   bash scripts/gpu_check.sh --parts goals profile         # some; --help lists them
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/gpu_check.py" "$@"
