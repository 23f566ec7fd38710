"""Whether Mask2Former learns: a small one on 32 canvases of digits, evaluated on the same canvases.

    python scripts/mask2former_overfit.py --steps 400

It does not generalise from a thousand canvases of this size, so what is asked of it is that it can learn 32 by heart: mask AP of 85 or
more after 400 steps of 8 images. The status is 1 where it is less. Everything goes through the program: main.py, a data set in COCO's
form, and COCO's evaluation. Takes minutes on one core; a run that was interrupted continues in the same --folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.dense.canvases import write_canvases  # noqa: E402

CANVASES, FLOOR = 32, 85.0
SETTINGS = {
    "TASK": "mask", "DATA.DATASET": "coco", "DATA.BATCH_SIZE": 8, "DATA.NUM_WORKERS": 0, "DATA.DENSE.SHORT_SIDE": [96],
    "DATA.DENSE.LONG_SIDE": 128, "DATA.DENSE.SCALE": [1.0, 1.0], "AUG.HFLIP": 0, "MODEL.DENSE.HEAD": "mask2former", "MODEL.DENSE.WIDTH": 64,
    "MODEL.DENSE.QUERIES": 20, "MODEL.TYPE": "crossformer", "MODEL.NAME": "mask2former_overfit", "MODEL.DROP_PATH_RATE": 0,
    "MODEL.CROSSFORMER.EMBED_DIM": 32, "MODEL.CROSSFORMER.DEPTHS": [1, 1, 2, 1], "MODEL.CROSSFORMER.NUM_HEADS": [2, 4, 8, 16],
    "MODEL.CROSSFORMER.GROUP_SIZE": [4, 4, 4, 4], "MODEL.CROSSFORMER.INTERVAL": [8, 4, 2, 1],
    "MODEL.CROSSFORMER.PATCH_SIZE": [2, 4, 8, 16], "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.REPORT": "none", "TRAIN.WARMUP_EPOCHS": 5, "PRINT_FREQ": 20, "PRECISION": "fp32", "DEVICE": "cpu",
}


def write_data(folder: Path) -> None:
    """The first training canvases, as both splits."""
    write_canvases(str(folder), train=CANVASES, val=1)
    for kind in ("images", "masks"):
        shutil.rmtree(folder / kind / "val")
        shutil.copytree(folder / kind / "train", folder / kind / "val")
    shutil.copy(folder / "annotations" / "instances_train.json", folder / "annotations" / "instances_val.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of a step of 8 images")
    parser.add_argument("--folder", type=Path, help="where data and run are kept (a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if not (folder / "data").exists():
            (folder / "data").mkdir(parents=True)
            write_data(folder / "data")
        keys = {**SETTINGS, "DATA.DATA_PATH": folder / "data", "OUTPUT": folder / "output", "TRAIN.EPOCHS": -(-args.steps * 8 // CANVASES),
                "TRAIN.BASE_LR": args.rate * 512 / 8, "TRAIN.EVAL_FREQ": 1000, "SAVE_FREQ": 1000}
        status = subprocess.call([sys.executable, str(ROOT / "main.py"), "--opts", *(str(word) for item in keys.items() for word in item)])
        if status:
            raise SystemExit(status)
        metrics = next((folder / "output").rglob("metrics.jsonl"))
        found = json.loads(metrics.read_text().splitlines()[-1])["mask_ap"]
    print(f"mask AP {found:.1f} after {args.steps} steps; at least {FLOOR:g} is asked for after 400")
    raise SystemExit(found < FLOOR)


if __name__ == "__main__":
    main()
