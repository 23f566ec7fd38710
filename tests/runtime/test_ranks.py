"""A process of a job that dies, fails, hangs or holds something else ends the job, soon, and by name."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, differences, load, run_main, write_images
from faults import TORCHRUN, ends, fault, pair, start, wait_for

from utils.runtime.provenance import program_digest

RUN = "output/tiny/default"
LONG = ("--batch-size", "4", "--epochs", "4000", "--warmup-epochs", "1")
RARELY = ("--opts", "SAVE_FREQ", "4000", "TRAIN.EVAL_FREQ", "4000")


def errors(results: list[tuple[int, str, str]]) -> list[str]:
    return [line for _, _, err in results for line in err.splitlines() if line.startswith("error")]


@pytest.mark.parametrize(("what", "rank", "after", "phase"), [
    ("loader", 1, 14, "waiting for data"), ("loss", 1, 12, "training"), ("evaluation", 1, 0, "evaluating")])
def test_a_rank_that_fails_ends_the_job_and_says_where(tiny_cfg: Path, tmp_path: Path, what: str, rank: int, after: int,
                                                       phase: str) -> None:
    begun = time.time()
    results = ends(pair("--cfg", tiny_cfg, "--batch-size", 4, cwd=tmp_path, **fault(tmp_path, what, rank=rank, after=after)))
    assert time.time() - begun < 50 and all(status for status, *_ in results)
    said = errors(results)
    assert len(said) == 1 and re.match(rf"error \(rank {rank}, {phase}.*, step \d+\): unexpected ValueError", said[0]), said


def test_a_save_that_fails_on_rank_0_ends_the_job(tiny_cfg: Path, tmp_path: Path) -> None:
    results = ends(pair("--cfg", tiny_cfg, "--batch-size", 4, "--epochs", 40, cwd=tmp_path, **fault(tmp_path, "save", rank=0)))
    assert all(status for status, *_ in results)
    assert re.match(r"error \(rank 0, .*\): unexpected ValueError", errors(results)[0]), results


def test_a_rank_that_hangs_is_named(tiny_cfg: Path, tmp_path: Path) -> None:
    pid, log = pair("--cfg", tiny_cfg, *LONG, *RARELY, "DIST_TIMEOUT", "0.05", cwd=tmp_path), tmp_path / RUN / "log.txt"
    wait_for(log, "epoch 2/4000")
    pid[1].send_signal(signal.SIGSTOP)
    begun = time.time()
    status, _, err = ends(pid[:1])[0]
    pid[1].kill()
    ends(pid[1:])
    assert status == 1 and time.time() - begun < 30
    assert re.search(r"^error \(rank 0\): no progress for 0.05 minutes: rank 1 \(\w.*, step \d+\) no longer responds; the others wait", err,
                     re.M), err


def test_a_loader_that_hangs_is_named(tiny_cfg: Path, tmp_path: Path) -> None:
    """The process still gives signs of life, but gets no further."""
    results = ends(pair("--cfg", tiny_cfg, *LONG, *RARELY, "DIST_TIMEOUT", "0.05", cwd=tmp_path,
                        **fault(tmp_path, "loader", rank=1, after=21, how="wait")))
    assert [status for status, *_ in results] == [1, 1]
    said = errors(results)
    assert len(said) == 1
    assert re.search(r"rank 1 \(waiting for data, step \d+\) gets no further; the others wait \(training\)", said[0]), said


def test_ranks_with_other_images_or_another_config_are_told_at_the_start(tiny_cfg: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "other")
    (tmp_path / "other/train/a/0.jpg").rename(tmp_path / "other/train/a/00.jpg")
    command = ["--cfg", tiny_cfg, "--batch-size", 4]
    for extra, words in ((["--data-path", tmp_path / "other"], "rank 1 does not have rank 0's training images (44)"),
                         (["--lr", "0.1"], "rank 1 does not have rank 0's config key TRAIN.BASE_LR (0.05 and 0.1)")):
        results = ends(pair(*command, cwd=tmp_path, second=(*command, *extra)))
        assert [status for status, *_ in results] == [2, 2]
        assert words in results[0][2] and not (tmp_path / "output").exists(), results[0][2]


def test_slurm_tasks_are_ranks(tiny_cfg: Path, tmp_path: Path) -> None:
    """``srun -n 2 python main.py`` sets these; a batch or interactive shell of one task does not start a group."""
    names = dict(RANK="SLURM_PROCID", WORLD_SIZE="SLURM_STEP_NUM_TASKS", MASTER_ADDR="SLURM_LAUNCH_NODE_IPADDR")
    results = ends(pair("--cfg", tiny_cfg, "--batch-size", 4, "--epochs", 1, cwd=tmp_path, names=names, SLURM_JOB_ID="7"))
    assert [status for status, *_ in results] == [0, 0], results
    assert "global batch 8 = 4 images x 1 accumulated x 2 processes" in results[0][1] and results[1][1] == ""
    alone = run_main("--cfg", tiny_cfg, "--tag", "shell", "--epochs", 1, cwd=tmp_path, SLURM_PROCID="0", SLURM_NTASKS="8")
    assert alone.returncode == 0 and "x 1 processes" in alone.stdout


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "torchrun killed"])
def test_two_ranks_with_loading_processes_save_when_stopped(tiny_cfg: Path, tmp_path: Path, how: str) -> None:
    launcher = start("--cfg", tiny_cfg, *LONG, "--num-workers", 1, *RARELY, cwd=tmp_path, launcher=TORCHRUN, CUDA_VISIBLE_DEVICES="")
    folder = tmp_path / RUN
    wait_for(folder / "log.txt", "epoch 3/4000")
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGTERM if "SIGTERM" in how else signal.SIGKILL)
    _, _, err = ends([launcher])[0]
    saved = re.findall(r"stopped by SIGTERM: saved \S+ckpt_(\d+)\.pth; the same command continues from there", err)
    assert len(saved) == 1, err
    assert load(folder / "last.pth")["step"] == int(saved[0]) > 10
    deadline = time.time() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in ranks) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)  # nobody is left behind
    assert not list(folder.glob(".tmp-*"))


def test_a_killed_rank_is_started_anew_by_torchrun_and_ends_in_the_same_bits(tiny_cfg: Path, tmp_path: Path) -> None:
    recipe = ["--cfg", tiny_cfg, "--batch-size", 4, "--epochs", 12, "--opts", "TRAIN.SAVE_EVERY_STEPS", 3]
    launcher = start(*recipe, cwd=tmp_path, launcher=(*TORCHRUN, "--max-restarts", "1"), CUDA_VISIBLE_DEVICES="")
    log = tmp_path / RUN / "log.txt"
    wait_for(log, "epoch 2/12")
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    status, out, err = ends([launcher], 90)[0]
    assert status == 0, err
    assert out.count("start: scratch") == 1 and re.search(r"^resumed \S+ at step [1-9]\d*$", out, re.M) and "finished 12 epochs" in out
    straight = ends(pair(*recipe, "TAG", "straight", cwd=tmp_path))
    assert straight[0][0] == 0, straight
    mine, theirs = load(tmp_path / RUN / "last.pth"), load(tmp_path / "output/tiny/straight/last.pth")
    keys = ("model", "ema", "optimizer", "step", "best", "loss_sums")
    assert mine["step"] == 60 and differences({k: mine[k] for k in keys}, {k: theirs[k] for k in keys}) == []


def test_an_odd_number_of_images_and_a_rank_without_any(tmp_path: Path, tiny_cfg: Path) -> None:
    write_images(tmp_path / "odd", "train", dict(a=5, b=4))
    write_images(tmp_path / "odd", "val", dict(a=1))
    results = ends(pair("--cfg", tiny_cfg, "--data-path", tmp_path / "odd", "--batch-size", 2, "--epochs", 1, cwd=tmp_path))
    assert [status for status, *_ in results] == [0, 0], results
    assert re.search(r"^top1 [\d.]+ .*of 1\)$", results[0][1], re.M)


def test_the_programs_digest_covers_every_folder(tmp_path: Path) -> None:
    shutil.copy(ROOT / "main.py", tmp_path)
    for room in ("models", "data", "utils/below/deeper"):
        (tmp_path / room).mkdir(parents=True)
        (tmp_path / room / "part.py").write_text(f"'''{room}'''")
    digests = {program_digest(str(tmp_path))}
    for room in ("models", "data", "utils/below/deeper"):
        (tmp_path / room / "part.py").write_text("'''changed'''")
        digests.add(program_digest(str(tmp_path)))
    (tmp_path / "utils/below/part.py").write_text("'''changed'''")  # the same file in another place
    (tmp_path / "utils/below/deeper/part.py").unlink()
    digests.add(program_digest(str(tmp_path)))
    assert len(digests) == 5
