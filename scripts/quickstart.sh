#!/usr/bin/env bash
# From a fresh machine to a trained model: make the environment, train a small CrossFormer on real images, evaluate it.
# Arguments are passed on to main.py, e.g.: bash scripts/quickstart.sh --epochs 5 --warmup-epochs 1 --tag short
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
ensure_environment requirements.txt
python main.py --cfg configs/quickstart.yaml "$@"
echo "evaluating the best checkpoint:"
python main.py --cfg configs/quickstart.yaml --eval "$@"
