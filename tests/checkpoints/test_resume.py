"""A run that was killed ends in the same bits as one that was not."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import differences, load, run_main, torchrun, write_images
from faults import start

STATE = ("model", "ema", "optimizer", "step", "best", "loss_sums")
TIMES = ("images_per_s", "seconds")


@pytest.fixture(scope="module")
def straight(tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six epochs without a break, saving every third step."""
    folder = tmp_path_factory.mktemp("straight")
    done = run_main("--cfg", tiny_cfg, "--epochs", 6, "--opts", "TRAIN.SAVE_EVERY_STEPS", 3, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "output/tiny/default"


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_ends_in_the_same_bits(straight: Path, tiny_cfg: Path, tmp_path: Path, workers: int) -> None:
    command = ["--cfg", tiny_cfg, "--epochs", "6", "--num-workers", str(workers), "--opts", "TRAIN.SAVE_EVERY_STEPS", "3"]
    folder = tmp_path / "output/tiny/default"
    process = start(*command, cwd=tmp_path)
    deadline = time.time() + 60
    # The eighth step's epoch is the second of five steps: after ckpt 6 or 9 the run is inside an epoch.
    while not any(int(p.stem[5:]) >= 6 for p in folder.glob("ckpt_*.pth")) and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = run_main(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = re.search(r"^resumed (\S+) at step (\d+)$", done.stdout, re.M)
    assert resumed and 6 <= int(resumed[2]) < 30
    assert resumed[0] in (folder / "log.txt").read_text()
    first = re.search(r"^epoch (\d+)/6 step (\d+)/5", done.stdout[resumed.end():], re.M)
    assert (int(first[1]) - 1) * 5 + int(first[2]) > int(resumed[2])  # no step is done again
    mine, theirs = load(folder / "last.pth"), load(straight / "last.pth")
    assert mine["ema"] and mine["step"] == 30
    assert differences({k: mine[k] for k in STATE}, {k: theirs[k] for k in STATE}) == []
    assert rows(folder) == rows(straight)


def test_metrics_after_the_checkpoint_are_cut_off(straight: Path, tmp_path: Path) -> None:
    from utils.loggers.metrics_files import MetricsLog
    (tmp_path / "metrics.jsonl").write_bytes((straight / "metrics.jsonl").read_bytes() + b'{"epoch": 7, "st')
    MetricsLog(str(tmp_path), 12)
    assert [row["step"] for row in rows(tmp_path)] == [5, 10]


def test_damaged_newest_checkpoint_is_passed_over(straight: Path, tiny_cfg: Path, program) -> None:

    folder = program.folder / "output/tiny/default"
    shutil.copytree(straight, folder, symlinks=True)
    steps = sorted(int(p.stem[5:]) for p in folder.glob("ckpt_*.pth"))
    newest = folder / f"ckpt_{steps[-1]:08d}.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, which torch.load does not notice
    newest.write_bytes(content)
    torch.load(newest, weights_only=True)
    done = program("--cfg", tiny_cfg, "--epochs", 6, "--opts", "TRAIN.SAVE_EVERY_STEPS", 3)
    assert done.returncode == 0, done.stderr
    assert f"ckpt_{steps[-1]:08d}.pth: damaged" in done.stdout
    assert f"at step {steps[-2]}\n" in done.stdout
    assert differences(load(folder / "last.pth")["model"], load(straight / "last.pth")["model"]) == []


def test_another_number_of_processes_keeps_the_global_batch(tiny_cfg: Path, program) -> None:
    first = program("--cfg", tiny_cfg, "--epochs", 2, "--batch-size", 8)
    assert first.returncode == 0, first.stderr
    two = torchrun("--cfg", tiny_cfg, "--epochs", 4, "--batch-size", 8, cwd=program.folder)
    assert two.returncode == 0, two.stderr
    assert "global batch of 8 is kept: 4 images x 1 accumulated x 2 processes" in two.stdout
    assert two.stdout.count("resumed ") == 1  # rank 0 alone speaks
    last = load(program.folder / "output/tiny/default/last.pth")
    assert last["step"] == 20 and last["global_batch"] == 8 and len(last["loss_sums"]) == 2
    three = torchrun("--cfg", tiny_cfg, "--epochs", 5, cwd=program.folder, processes=3)
    assert "cannot be shared by 3 processes; start 1, 2, 4, 8 processes" in three.stderr
    back = program("--cfg", tiny_cfg, "--epochs", 5)
    assert back.returncode == 0 and "at step 20" in back.stdout


def test_finished_run_says_so_and_changes_nothing(straight: Path, tiny_cfg: Path, program) -> None:

    folder = program.folder / "output/tiny/default"
    shutil.copytree(straight, folder, symlinks=True)
    done = program("--cfg", tiny_cfg, "--epochs", 6)
    assert done.returncode == 0 and "finished already" in done.stdout and "epoch 6/6" not in done.stdout
    # Another tag is another run only where the folder of this one is what is continued.
    done = program("--cfg", tiny_cfg, "--epochs", 6, "--resume", folder / "last.pth", "--tag", "more")
    assert done.returncode == 0 and "finished already" in done.stdout and "--tag" not in done.stdout.splitlines()[-1]
    named = re.search(r"--pretrained (\S+) in place of --resume", done.stdout)[1]
    assert program("--cfg", tiny_cfg, "--epochs", 1, "--pretrained", named, "--tag", "more").returncode == 0
    assert rows(folder) == rows(straight)


OTHER_RECIPES = {
    "rate": ("--lr", "1e-2"), "optimizer": ("--optim", "sgd"), "size": ("--img-size", "64"), "weights": ("--pretrained", "/no/such.pth"),
    "images": ("--data-path", "other"), "fewer epochs": ("--epochs", "4")}


@pytest.mark.parametrize("change", OTHER_RECIPES)
def test_a_finished_run_is_not_the_result_of_another_recipe(straight: Path, tiny_cfg: Path, program, change: str) -> None:
    """A sweep that forgot --tag would report one result again and again. Its own command is answered as before; what is advised works."""
    folder = program.folder / "output/tiny/default"
    shutil.copytree(straight, folder, symlinks=True)
    write_images(program.folder / "other", "train", dict(a=12, b=10, c=11, d=11))  # as many images, and the classes' names
    write_images(program.folder / "other", "val", dict(a=5, b=5, c=5, d=4))
    command = ("--cfg", tiny_cfg, "--epochs", 6, *OTHER_RECIPES[change])
    refused = program(*command)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused
    assert "--tag" in refused.stderr and "--restart" in refused.stderr and "finished already" not in refused.stdout
    assert rows(folder) == rows(straight)
    if change == "images":
        short = ("--epochs", 1, "--opts", "TRAIN.WARMUP_EPOCHS", 0)
        named = re.search(r"--pretrained (\S+)", refused.stderr)[1]
        assert program(*command, *short, "--tag", "fresh", "--pretrained", named).returncode == 0
        assert program(*command, "--accept-changes").returncode == 0
        again = program(*command, *short, "--restart")
        assert again.returncode == 0 and (folder / "superseded-1").is_dir()


def test_images_changed_under_a_run_are_told(straight: Path, tiny_cfg: Path, images: Path, program) -> None:
    """Two class folders swapped, whose files have the same names: as many steps, the same list."""
    shutil.copytree(straight, program.folder / "output/tiny/default", symlinks=True)
    shutil.copytree(images, "moved")
    moved = ("--cfg", tiny_cfg, "--epochs", 7, "--data-path", "moved")
    assert program(*moved).returncode == 0  # the same images at another place
    for split in ("train", "val"):
        for name, other in (("c", "x"), ("d", "c"), ("x", "d")):
            Path("moved", split, name).rename(Path("moved", split, other))
    more = ("--cfg", tiny_cfg, "--epochs", 8, "--data-path", "moved")
    refused = program(*more)
    assert refused.returncode == 2 and "training images" in refused.stderr and "validation images" in refused.stderr
    assert program(*more, "--accept-changes").returncode == 0


def test_only_the_newest_and_the_best_are_kept(straight: Path) -> None:
    kept = {p.name for p in straight.glob("ckpt_*.pth")}
    best, last = ((straight / name).resolve().name for name in ("best.pth", "last.pth"))
    assert last == "ckpt_00000030.pth" and kept == {best, last, "ckpt_00000027.pth"}
    assert load(straight / "best.pth")["best"]["step"] == load(straight / "best.pth")["step"]
    assert not list(straight.glob(".tmp-*"))
