"""TRAIN.ITERATIONS: a run of so many steps, whose last epoch may be cut short."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from conftest import differences, load, run_main
from faults import fault, start, wait_for, waiting

from config import ConfigError, get_config
from utils.optim.lr_schedule import build_schedule
from utils.reporting.run_reader import facts, read_run

STATE = ("model", "ema", "optimizer", "step", "best", "loss_sums")
# Epochs have 5 steps of 8 images: two whole ones and three steps of a third.
COMMAND = ("--iterations", 13, "--warmup-steps", 4, "--opts", "TRAIN.SAVE_EVERY_STEPS", 1, "TRAIN.LR_SCHEDULER.NAME", "multistep",
           "TRAIN.LR_SCHEDULER.MULTISTEPS", "[9, 12]", "TRAIN.REPORT", "none")


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "seconds")} for line in lines]


@pytest.fixture(scope="module")
def cfg(tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_cfg``, but without a warm-up in epochs."""
    path = tmp_path_factory.mktemp("iterations") / "tiny.yaml"
    path.write_text(tiny_cfg.read_text().replace("WARMUP_EPOCHS: 0.5, ", ""))
    return path


@pytest.fixture(scope="module")
def straight(cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    done = run_main("--cfg", cfg, *COMMAND, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "output/tiny/default"


def test_the_last_epoch_is_cut_short_and_evaluated(straight: Path) -> None:
    assert [(row["epoch"], row["step"]) for row in rows(straight)] == [(1, 5), (2, 10), (3, 13)]
    assert all(row["top1"] is not None and row["train_loss"] > 0 and "skipped_steps" not in row for row in rows(straight))
    base = load(straight / "last.pth")["global_batch"] / 512 * 0.05
    assert [row["lr"] for row in rows(straight)] == pytest.approx([base, 0.1 * base, 0.01 * base])
    log = (straight / "log.txt").read_text()
    assert re.search(r"^epoch 3/3 step 3/3 lr .* eta 0:00 epoch, 0:00 run$", log, re.M) and re.search(r"^finished 13 steps in ", log, re.M)
    last = load(straight / "last.pth")
    assert (last["step"], last["evaluated"], last["loss_steps"]) == (13, 13, 0)
    assert facts(read_run(str(straight)))["steps"] == "13 of 13"


@pytest.mark.parametrize(("what", "after"), [("loss", 24), ("evaluation", 14)])
def test_killed_in_the_last_epoch_it_ends_in_the_same_bits(straight: Path, cfg: Path, tmp_path: Path, what: str, after: int) -> None:
    """In one of its steps, and between its last step and the end of the final evaluation."""
    process = start("--cfg", cfg, *COMMAND, cwd=tmp_path, **fault(tmp_path, what, after=after, how="wait"))
    wait_for(waiting(tmp_path))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder = tmp_path / "output/tiny/default"
    assert what == "loss" or rows(folder)[-1]["epoch"] == 2
    done = run_main("--cfg", cfg, *COMMAND, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"^resumed \S+ at step (\d+)$", done.stdout, re.M)[1]) >= 10
    mine, theirs = load(folder / "last.pth"), load(straight / "last.pth")
    assert differences({k: mine[k] for k in STATE}, {k: theirs[k] for k in STATE}) == []
    assert rows(folder) == rows(straight)


def test_a_finished_run_is_recognised_and_goes_on_for_more(straight: Path, cfg: Path, program) -> None:
    command = ["--cfg", cfg, "--output", straight.parent.parent, *COMMAND]
    again = program(*command)
    assert again.returncode == 0 and "finished already" in again.stdout and "raise --iterations" in again.stdout
    fewer = program(*command, "--iterations", 11)
    assert fewer.returncode == 2 and "TRAIN.ITERATIONS changed from 13 to 11" in fewer.stderr
    more = program(*command, "--iterations", 17)
    assert more.returncode == 0, more.stderr
    assert [(row["epoch"], row["step"]) for row in rows(straight)][2:] == [(3, 13), (3, 15), (4, 17)]
    assert not any("skipped_steps" in row for row in rows(straight)) and load(straight / "last.pth")["step"] == 17


def test_what_does_not_go_together_is_a_sentence(cfg: Path, program) -> None:
    for arguments, words in ((["--iterations", 9, "--epochs", 3], "TRAIN.EPOCHS is 3, but TRAIN.ITERATIONS (9)"),
                             (["--iterations", 9, "--warmup-steps", 9], "TRAIN.WARMUP_STEPS is 9"),
                             (["--iterations", 9, "--warmup-epochs", 2], "a warm-up of 10 steps, but the run has 9"),
                             (["--epochs", 2, "--warmup-steps", 10], "a warm-up of 10 steps, but the run has 10")):
        done = program("--cfg", cfg, *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done


def test_planned_and_swept(cfg: Path, program) -> None:
    done = program("--cfg", cfg, "--plan", "--iterations", 13, "--warmup-steps", 4, "--opts", "PLAN.SECONDS", 0)
    assert done.returncode == 0 and "of 13\n" in done.stdout and "for 2.6 epochs" in done.stdout, done.stdout
    done = program("--cfg", cfg, "--find-lr", "lr.png", "--iterations", 3, "--warmup-steps", 2, "--opts", "FIND_LR.STEPS", 20)
    assert done.returncode == 0 and not done.stderr, done


def test_decays_in_epochs_stay_so() -> None:
    config = get_config(None, ["TRAIN.ITERATIONS", "100", "TRAIN.WARMUP_STEPS", "1", "TRAIN.LR_SCHEDULER.NAME", "step",
                               "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "3"])
    assert list(build_schedule(config, 10, 512).milestones) == [30, 60, 90]
    with pytest.raises(ConfigError, match="TRAIN.ITERATIONS is -1"):
        get_config(None, ["TRAIN.ITERATIONS", "-1"])
