"""Our whole program against a training loop as timm's users write it: the same model, images and recipe, in turns.

Both train on synthetic JPEG files (scripts/bench_data.py) in processes of their own: RandomResizedCrop, RandAugment, erasing, Mixup and
CutMix, bf16 where asked for, AdamW with clipping and a cosine schedule of three epochs. The second epoch counts, without evaluation
or checkpoint; start-up does not. The reference is ImageFolder-like reading through timm.data.create_loader, timm's Mixup,
SoftTargetCrossEntropy, create_optimizer_v2, create_scheduler_v2 and the step around them.

    python scripts/bench_program.py [--model swin_tiny_patch4_window7_224] [--batch 8] [--steps 12] [--rounds 3] [--workers 0]

The last line is `ratio R`: images a second of ours over the reference's, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path[:0] = [ROOT, os.path.join(ROOT, "scripts")]


def ours(options: argparse.Namespace, root: str, number: int) -> float:
    """Images a second of the second epoch of ``main.py``."""
    output = os.path.join(root, f"out{number}")
    keys = ["MODEL.NAME", options.model, "DATA.NUM_WORKERS", options.workers, "TRAIN.EVAL_FREQ", 1000, "SAVE_FREQ", 1000,
            "TRAIN.EPOCHS", 3, "TRAIN.WARMUP_EPOCHS", 1, "PRINT_FREQ", 1000, "TAG", "bench"]
    command = [sys.executable, os.path.join(ROOT, "main.py"), "--cfg", os.path.join(ROOT, "configs", "timm.yaml"), "--data-path",
               os.path.join(root, "originals"), "--batch-size", options.batch, "--precision", options.precision, "--output", output,
               "--device", options.device, "--opts", *keys]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    with open(os.path.join(output, options.model, "bench", "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file][1]["images_per_s"]


def theirs(options: argparse.Namespace, root: str) -> float:
    """The same of the reference, which runs as this script with ``--reference``."""
    command = [sys.executable, __file__, "--reference", root, *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return float(done.stdout.split()[-1])


def reference(options: argparse.Namespace) -> None:
    """Train by timm's parts; print images a second of the second epoch."""
    import timm
    import torch
    from timm.data import Mixup, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import dispatch_clip_grad

    import models  # noqa: F401  registers ours with timm

    device = torch.device(options.device)
    dataset = create_dataset("", root=os.path.join(options.reference, "originals", "train"))
    loader = create_loader(
        dataset, (3, 224, 224), options.batch, is_training=True, use_prefetcher=device.type == "cuda", re_prob=0.25, re_mode="pixel",
        auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, interpolation="bicubic", num_workers=options.workers, device=device,
        pin_memory=device.type == "cuda")
    classes = len(dataset.reader.class_to_idx)
    model = timm.create_model(options.model, num_classes=classes, drop_path_rate=0.1).to(device).train()
    mixup = Mixup(0.8, 1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=classes)
    optimizer, criterion = create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05), SoftTargetCrossEntropy()
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=3, updates_per_epoch=len(loader), step_on_epochs=False)
    number = 0
    for _ in range(2):
        start = time.perf_counter()
        for images, targets in loader:
            images, targets = mixup(images.to(device), targets.to(device))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
                loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), 5.0)
            optimizer.step()
            number += 1
            scheduler.step_update(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    print(len(loader) * options.batch / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="a timm model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference:
        reference(options)
        return
    from bench_data import make_sets
    with tempfile.TemporaryDirectory(prefix="bench-program-") as root:
        make_sets(root, options.batch * options.steps, ["originals"], distinct=1000)
        rates: dict[str, list[float]] = {"ours": [], "reference": []}
        for number in range(options.rounds):
            rates["reference"].append(theirs(options, root))
            rates["ours"].append(ours(options, root, number))
            print(", ".join(f"{name} {values[-1]:.2f} images/s" for name, values in rates.items()), flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{options.model}, batch {options.batch}, {options.precision} on {options.device}: "
          + ", ".join(f"{name} {value:.2f} images/s" for name, value in medians.items()))
    print(f"ratio {medians['ours'] / medians['reference']:.2f}")


if __name__ == "__main__":
    main()
