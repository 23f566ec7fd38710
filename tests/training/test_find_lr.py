"""--find-lr: rates that rise, a plot, a number, and nothing else left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from utils.training.lr_range import FIRST, Sweep, smoothed, suggestion


def test_rates_rise_evenly_in_their_logarithm() -> None:
    sweep = Sweep(1e-4, 1.0, 5, first=7)
    assert [sweep.lr_at(step) for step in range(7, 12)] == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1.0])


def test_the_rate_is_where_the_loss_falls_fastest() -> None:
    rates = [10 ** (n / 20 - 5) for n in range(100)]
    valley = [2.0 - 1.5 / (1 + (3e-3 / rate) ** 2) + (rate / 0.1) ** 2 for rate in rates]  # steepest at 3e-3, runs away from 0.1 on
    assert suggestion(rates, valley) == pytest.approx(3e-3, rel=0.5)
    assert suggestion(rates, [1.0 + rate for rate in rates]) is None and suggestion([], []) is None
    assert smoothed([3.0] * FIRST) == pytest.approx([3.0] * FIRST)


def test_a_sweep_leaves_a_plot_and_a_number(tiny_cfg: Path, program) -> None:
    opts = ["--opts", "FIND_LR.STEPS", 60, "FIND_LR.LOW", 1e-3, "FIND_LR.HIGH", 100]
    done = program("--cfg", tiny_cfg, "--find-lr", "lr.png", *opts)
    assert done.returncode == 0 and not done.stderr, done
    found = re.fullmatch(r"--lr (\S+): there the loss falls fastest .*", done.stdout.splitlines()[-1])
    assert found and 1e-3 < float(found[1]) < 100, done.stdout
    assert Image.open("lr.png").width > 400 and [path.name for path in program.folder.iterdir()] == ["lr.png"]
    for arguments, words in ((["lr.pdf"], "ends in .png"), (["nowhere/lr.png"], "no file can be written there"),
                             (["lr.png", "--opts", "FIND_LR.HIGH", 1e-9], "above FIND_LR.LOW")):
        done = program("--cfg", tiny_cfg, "--find-lr", *arguments)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done
