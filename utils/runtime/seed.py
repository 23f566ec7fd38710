"""Seeding torch for what a step draws: dropout and stochastic depth."""

from __future__ import annotations

import random

import numpy as np
import torch

from data import seeds


def seed_all(seed: int, device: torch.device) -> None:
    """Seed this process's generators: torch's on the CPU and on ``device``.

    ``torch.manual_seed`` visits every device and costs 80 times as much.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def seed_initialisation(seed: int) -> None:
    """Seed everything that building a model may draw from; the same on every rank."""
    value = seeds.derive(seed, seeds.INIT)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)


def seed_micro_batch(seed: int, step: int, micro: int, rank: int, device: torch.device) -> None:
    """What dropout and drop path draw is a function of (seed, step, micro-batch, rank)."""
    seed_all(seeds.derive(seed, seeds.DROPOUT, step, micro, rank), device)


def make_deterministic(device: torch.device) -> None:
    """Repeatable kernels on the CPU, so that a resumed run ends in the same bits; GPUs keep their fast ones."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
