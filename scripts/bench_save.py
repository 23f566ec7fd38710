"""How long training stands still for a checkpoint: written while it waits, and in the background.

    python scripts/bench_save.py --cfg configs/crossformer_t.yaml

Both in turn in one run, on the real state of the config's model (weights, average, optimizer), into a temporary folder. The
last line is ``ratio R``: the stall of waiting over that of the background save.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import get_config
from models import build_model
from utils.checkpoints.background_saver import Saver
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.state import TrainState
from utils.optim.ema import WeightAverage
from utils.optim.optimizer import build_optimizer


def build_state(cfg: str) -> TrainState:
    """The state after one step, whose gradients are synthetic."""
    config = get_config(cfg, [])
    model = build_model(config)
    state = TrainState(model, build_optimizer(config, model), torch.amp.GradScaler("cpu", enabled=False), WeightAverage(model, 0.999))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    return state


def stall(state: TrainState, folder: str, background: bool) -> tuple[float, float]:
    """Seconds until training may go on, and until the file is there."""
    saver = Saver(CheckpointFolder(folder, keep=1), background, {}, logging.getLogger("trainer"))
    begun = time.perf_counter()
    saver.save(state, {"hvt_format": 1}, best=False)
    stood = time.perf_counter() - begun
    saver.wait()
    return stood, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default=str(Path(__file__).resolve().parent.parent / "configs/crossformer_t.yaml"))
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    state = build_state(args.cfg)
    figures: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for number in range(args.repeats):
            state.step = number
            for background in figures:
                figures[background].append(stall(state, folder, background))
    medians = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in figures.items()}
    print(f"a checkpoint of {state.size() / 2**20:.0f} MiB, medians of {args.repeats}")
    for background, (stood, whole) in medians.items():
        how = 'in the background' if background else 'waiting for it   '
        print(f"{how}: training stands still for {stood:.3f} s, file there after {whole:.3f} s")
    print(f"ratio {medians[False][0] / medians[True][0]:.1f}")


if __name__ == "__main__":
    main()
