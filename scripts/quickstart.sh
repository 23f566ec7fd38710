#!/usr/bin/env bash
# From a fresh machine to a trained model: make the environment, train a small CrossFormer on real images, evaluate it.
# Arguments are passed on to main.py, e.g.: bash scripts/quickstart.sh --epochs 5 --warmup-epochs 1 --tag short
# With "dense" first: Mask R-CNN on that CrossFormer, which finds and outlines digits on canvases, and a picture of what it found.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
ensure_environment requirements.txt

if [ "${1:-}" = dense ]; then
    shift
    config=configs/dense/quickstart.yaml backbone=output/crossformer_digits/default/best.pth run=output/mask_rcnn_canvases/instance
    if ! python -c 'import pycocotools' 2>/dev/null; then
        python -m pip install --quiet --disable-pip-version-check "$(sed -n 's/^\(pycocotools[^ ]*\).*/\1/p' requirements-extras.txt)"
    fi
    [ -e "$backbone" ] || python main.py --cfg configs/quickstart.yaml
    python main.py --cfg "$config" --pretrained "$backbone" "$@"
    echo "evaluating the best checkpoint:"
    python main.py --eval --resume "$run/best.pth"
    echo "what it finds on some of the validation canvases:"
    python main.py --predict datasets/canvases/images/val/000[0-7].png --resume "$run/best.pth" --sheet "$run/found.png" --json "$run/found.jsonl"
    exit
fi
python main.py --cfg configs/quickstart.yaml "$@"
echo "evaluating the best checkpoint:"
python main.py --cfg configs/quickstart.yaml --eval "$@"
