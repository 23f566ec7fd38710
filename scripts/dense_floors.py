"""What the heads of dense tasks reach on the embedded canvases, by the program itself, beside the floors that hold for them.

    python scripts/dense_floors.py --seeds 3
    python scripts/dense_floors.py --seeds 1 --only retinanet upernet

Each run is ``main.py`` with configs/dense/canvases_<head>.yaml, started from the digits' classifier (trained first where it is missing).
The status is 1 where a figure of a seed lies below its floor.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of each config the figures with their floors, in percent.
FLOORS = {
    "mask_rcnn": {"box_ap": 68.0, "mask_ap": 57.0},
    "retinanet": {"box_ap": 55.0},
    "semantic_fpn": {"miou": 55.0},
    "upernet": {"miou": 60.0},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FLOORS, default=list(FLOORS), help="these heads; else all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each")
    parser.add_argument("--folder", type=Path, default=Path("output/dense_floors"),
                        help="of the runs; the same folder again continues runs that were stopped")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="further keys of every run")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    backbone = folder / "crossformer_digits/default/best.pth"
    if not backbone.exists():
        run_main("--cfg", ROOT / "configs/quickstart.yaml", "--output", folder)
    print(f"{'head':14}{'seed':>5}  {'figures (floors)':48}minutes", flush=True)
    below = 0
    for head in arguments.only:
        for seed in range(arguments.seeds):
            start, run = time.perf_counter(), folder / f"{head}_canvases" / f"seed{seed}"
            run_main("--cfg", ROOT / f"configs/dense/canvases_{head}.yaml", "--pretrained", backbone, "--output", folder, "--tag", run.name,
                     "--opts", "SEED", seed, "TRAIN.REPORT", "none", *arguments.opts)
            figures = last_evaluation(run, FLOORS[head])
            minutes = (time.perf_counter() - start) / 60
            below += any(figures[name] < floor for name, floor in FLOORS[head].items())
            told = ", ".join(f"{name} {figures[name]:.1f} ({floor:g})" for name, floor in FLOORS[head].items())
            print(f"{head:14}{seed:>5}  {told:48}{minutes:7.1f}", flush=True)
    return int(below > 0)


def run_main(*words: object) -> None:
    """Run main.py, whose output is shown where it fails.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}main.py {' '.join(map(str, words))} ended with status {done.returncode}")


def last_evaluation(run: Path, names: Iterable[str]) -> dict[str, float]:
    """The figures ``names`` of a run's last evaluation, in percent."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: row[name] for name in names} for row in rows if all(row.get(name) is not None for name in names)][-1]


if __name__ == "__main__":
    sys.exit(main())
