"""What SimMIM's pre-training is worth on scikit-learn's digits when few labels are known: the same small model, with and without.

    python scripts/pretraining_on_digits.py --seeds 3 --model crossformer

For each seed: the model is pre-trained on all 1,437 training images without their labels (TASK simmim), then trained on 20 labelled images
of each class from those weights (--pretrained) and from none, by the same recipe, images and seed. The error is that of the last epoch on
the 360 validation images. Takes minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINING_IMAGES, CLASSES = 1437, 10

MODELS = {
    "crossformer": {"EMBED_DIM": 32, "DEPTHS": [1, 1, 2], "NUM_HEADS": [2, 4, 8], "GROUP_SIZE": [4, 2, 2], "INTERVAL": [2, 2, 1],
                    "PATCH_SIZE": [2, 4, 8], "MERGE_SIZE": [[2, 4], [2, 4]]},
    "swin": {"EMBED_DIM": 32, "DEPTHS": [2, 2, 2], "NUM_HEADS": [2, 4, 8], "WINDOW_SIZE": 4, "PATCH_SIZE": 2},
}
COMMON = {"DATA.DATASET": "digits", "DATA.IMG_SIZE": 16, "DATA.BATCH_SIZE": 64, "DATA.NUM_WORKERS": 0, "DEVICE": "cpu", "AUG.HFLIP": 0,
          "TRAIN.WARMUP_EPOCHS": 5, "TRAIN.REPORT": "none", "SAVE_FREQ": 1000, "PRINT_FREQ": 1000, "TRAIN.EVAL_FREQ": 1000}
PRETRAINING = {"TASK": "simmim", "DATA.MASK_PATCH_SIZE": 4, "MODEL.DROP_PATH_RATE": 0, "TRAIN.BASE_LR": 8e-3, "TRAIN.MIN_LR": 4e-5}
LABELLED = {"AUG.SCALE": [0.67, 1.0], "AUG.AUTO_AUGMENT": "none", "AUG.COLOR_JITTER": 0, "AUG.REPROB": 0, "AUG.MIXUP": 0, "AUG.CUTMIX": 0,
            "MODEL.DROP_PATH_RATE": 0.1, "TRAIN.MIN_LR": 4e-5}


def run(folder: Path, model: str, tag: str, *settings: dict[str, object]) -> Path:
    """Train once, unless that was done before; the run's folder."""
    node = {f"MODEL.{model.upper()}.{key}": value for key, value in MODELS[model].items()}
    keys = {"MODEL.TYPE": model, "MODEL.NAME": f"{model}_digits", "TAG": tag, "DATA.DATA_PATH": "datasets/digits",
            **node, **COMMON}
    for setting in settings:
        keys |= setting
    opts = [str(word) for item in keys.items() for word in item]
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), "--opts", *opts], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / "output" / f"{model}_digits" / tag


def error(run: Path) -> float:
    """Percent of the validation images that the last epoch has wrong."""
    return 100 - json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="crossformer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labels", type=int, default=20, help="labelled images a class")
    parser.add_argument("--pretraining-epochs", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[4e-3], help="rates of training with labels, each tried from both starts")
    parser.add_argument("--folder", type=Path, default=Path("output/pretraining_on_digits"))
    args = parser.parse_args()
    folder = args.folder.resolve()
    share = args.labels * CLASSES / TRAINING_IMAGES
    for rate in args.lr:
        found: dict[str, list[float]] = {"from scratch": [], "pre-trained": []}
        for seed in range(args.seeds):
            before = run(folder, args.model, f"simmim-{seed}", PRETRAINING, {"SEED": seed, "TRAIN.EPOCHS": args.pretraining_epochs})
            for start, weights in (("from scratch", {}), ("pre-trained", {"MODEL.PRETRAINED": before / "last.pth"})):
                tag = f"{start.replace(' ', '-')}-{args.labels}-{rate:g}-{seed}"
                labelled = run(folder, args.model, tag, LABELLED, weights, {
                    "SEED": seed, "DATA.SUBSET": share, "TRAIN.EPOCHS": args.epochs, "TRAIN.BASE_LR": rate})
                found[start].append(error(labelled))
            print(f"rate {rate:g}, seed {seed}: " + ", ".join(f"{start} {errors[-1]:.2f} %" for start, errors in found.items()), flush=True)
        gains = [a - b for a, b in zip(*found.values(), strict=True)]
        print(f"rate {rate:g}, {args.labels} labels a class: "
              + ", ".join(f"{start} {statistics.mean(errors):.2f} %" for start, errors in found.items())
              + f"; lower by {statistics.mean(gains):.2f} on average, in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds")


if __name__ == "__main__":
    main()
