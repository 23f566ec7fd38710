"""Kill a training run at random moments, again and again, and prove that it ends in the bits of one that was left alone.

    python scripts/kill_loop.py --kills 50 --workers 2

Two runs of the same small recipe on generated images: one undisturbed, one ended by SIGKILL (the whole process group) at
moments drawn from a seed that is printed: between steps, in the middle of a save, in an evaluation, right after a start.
Every new start must resume in mid-run and do only the steps left; in the end weights, averaged weights, optimizer, counters
and metrics (but for times) must be equal. Exit status 0 if all of that holds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STEPS_A_KILL = 14
STATE = ("model", "ema", "optimizer", "scaler", "step", "best", "loss_sums", "loss_steps", "skipped", "evaluated", "classes", "config")
RECIPE = """
DATA: {DATASET: folder, DATA_PATH: images, IMG_SIZE: 32, BATCH_SIZE: 8}
MODEL:
  NAME: killed
  DROP_PATH_RATE: 0.2
  CROSSFORMER: {EMBED_DIM: 16, DEPTHS: [1, 2], NUM_HEADS: [1, 2], GROUP_SIZE: [4, 4], INTERVAL: [2, 1], MERGE_SIZE: [[2, 4]]}
TRAIN: {WARMUP_EPOCHS: 1, BASE_LR: 0.05, EMA_DECAY: 0.9, SAVE_EVERY_STEPS: 3}
PRINT_FREQ: 1
PRECISION: fp32
"""


class Failure(AssertionError):
    """What the proof did not find as it must be."""


def prepare(folder: Path) -> None:
    """Generated images of four classes and the recipe."""
    generator = np.random.RandomState(0)
    for split, count in (("train", 11), ("val", 6)):
        for number, name in enumerate("abcd"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.randint(0, 120, (40, 48, 3)) + 40 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / name / f"{i}.png")
    (folder / "killed.yaml").write_text(RECIPE)


def command(epochs: int, workers: int, processes: int, compiled: str = "off") -> list[str]:
    """The one command that starts and continues the run."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, str(ROOT / "main.py"), "--cfg", "killed.yaml", "--epochs", str(epochs), "--num-workers",
            str(workers), "--batch-size", str(8 // processes), "--compile", compiled]


def start(arguments: list[str], folder: Path, tag: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*arguments, "--tag", tag], cwd=folder, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run_until(process: subprocess.Popen[str], log: Path, steps: int | None, delay: float) -> tuple[int, list[int], str]:
    """Follow a run, and kill it ``delay`` seconds after it has done ``steps`` steps (None: let it end).

    Args:
        log: the run's log.txt, which has a line for every step.

    Returns:
        The step it resumed at (-1: it did not), the steps it did, and its output.
    """
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout))
    reader.start()
    before = log.stat().st_size if log.exists() else 0
    while process.poll() is None:
        resumed, done = _resumed(said), _steps(log, before)
        if steps is not None and (resumed >= 0 or done) and len(done) >= steps:
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    reader.join()
    return _resumed(said), _steps(log, before), "".join(said)


def _resumed(said: list[str]) -> int:
    return next((int(found[1]) for line in list(said) if (found := re.match(r"resumed \S+ at step (\d+)$", line))), -1)


def _steps(log: Path, before: int) -> list[int]:
    """Numbers of the steps that were written after the first ``before`` bytes."""
    if not log.exists():
        return []
    with log.open(encoding="utf-8") as file:
        file.seek(before)
        found = re.findall(r"^epoch (\d+)/\d+ step (\d+)/(\d+) .*\n", file.read(), re.M)
    return [(int(epoch) - 1) * int(per_epoch) + int(step) for epoch, step, per_epoch in found]


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Names of what is not equal bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        return [name for key in a.keys() | b.keys() for name in differences(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [name for i, (x, y) in enumerate(zip(a, b, strict=True)) for name in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [where]


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """The last checkpoint's state, and the metrics without times."""
    content = torch.load(folder / "last.pth", weights_only=True)
    content["config"] = "".join(line for line in content["config"].splitlines(True) if not line.startswith("TAG"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return ({key: content[key] for key in STATE}, [{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in rows])


def prove(folder: Path, kills: int, workers: int, processes: int, seed: int, say: bool, compiled: str = "off") -> None:
    """The whole proof; raises ``Failure`` with what is wrong."""
    generator = random.Random(seed)
    prepare(folder)
    arguments = command(max(3, kills * STEPS_A_KILL // 5), workers, processes, compiled)
    *_, said = run_until(start(arguments, folder, "alone"), folder / "output/killed/alone/log.txt", None, 0)
    if "finished" not in said:
        raise Failure(f"the undisturbed run did not end well:\n{said[-2000:]}")
    reached = 0
    for number in range(kills + 1):
        last = number == kills
        steps = None if last else generator.randint(0 if number else 7, STEPS_A_KILL)
        delay = generator.uniform(0, 0.06)
        resumed, done, said = run_until(start(arguments, folder, "killed"), folder / "output/killed/killed/log.txt", steps, delay)
        if say:
            print(f"start {number + 1}: " + (f"resumed at step {resumed}, " if resumed >= 0 else "from scratch, ")
                  + (f"did {len(done)} steps to the end" if last else f"killed {1000 * delay:.0f} ms after {len(done)} steps"), flush=True)
        if number and resumed <= 0:
            raise Failure(f"start {number + 1} did not resume:\n{said[-2000:]}")
        # Saves come every 3 steps and are written in the background: at most two of them are lost.
        if number and not reached - 9 <= resumed:
            raise Failure(f"start {number + 1} resumed at step {resumed}, although step {reached} had been done")
        if done and done != list(range(max(resumed, 0) + 1, max(resumed, 0) + 1 + len(done))):
            raise Failure(f"start {number + 1} resumed at step {resumed} and did the steps {done[:3]}...")
        if last and "finished" not in said:
            raise Failure(f"the last start did not finish:\n{said[-2000:]}")
        reached = max([reached, *done])
    left = list((folder / "output/killed/killed").glob(".tmp-*"))
    if left:
        raise Failure(f"left behind: {left}")
    (state, rows), (expected, expected_rows) = outcome(folder / "output/killed/killed"), outcome(folder / "output/killed/alone")
    wrong = differences(state, expected) + differences(rows, expected_rows, "metrics")
    if wrong:
        raise Failure(f"not equal to the undisturbed run: {', '.join(wrong[:10])}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="DataLoader workers")
    parser.add_argument("--processes", type=int, default=1, help="ranks, by torchrun")
    parser.add_argument("--compile", default="off", choices=("off", "blocks", "model"), help="torch.compile")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30), help="of the moments; drawn and printed")
    parser.add_argument("--quiet", action="store_true", help="the result alone")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            prove(Path(folder), args.kills, args.workers, args.processes, args.seed, not args.quiet, args.compile)
        except Failure as failure:
            print(f"failed: {failure}")
            return 1
    print(f"{args.kills} kills, every start resumed in mid-run and did only the steps left; the end is equal bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
