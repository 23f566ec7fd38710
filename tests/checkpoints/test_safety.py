"""Nothing that was saved is lost: stops, second runs in a folder, runs started again, weights gone bad, changed recipes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, differences, environment, load, run_main, write_images
from faults import start, wait_for
from PIL import Image

from config import get_config
from data.decoding.pillow import to_rgb
from utils.checkpoints import run_folder
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.run_folder import require_room
from utils.training.resume import choose_start

ENDLESS = ("--epochs", "4000", "--warmup-epochs", "1", "--opts", "SAVE_FREQ", "4000", "TRAIN.EVAL_FREQ", "4000")


@pytest.mark.parametrize(("name", "workers", "group"), [("SIGTERM", 2, True), ("SIGINT", 0, False), ("SIGHUP", 1, True)])
def test_a_signal_saves_and_stops(tiny_cfg: Path, tmp_path: Path, name: str, workers: int, group: bool) -> None:
    """To the whole process group as a terminal or a scheduler sends it, DataLoader workers included."""
    process = start("--cfg", tiny_cfg, "--num-workers", workers, *ENDLESS, cwd=tmp_path)
    folder = tmp_path / "output/tiny/default"
    wait_for(folder / "log.txt", "epoch 2/4000")
    number = getattr(signal, name)
    os.killpg(process.pid, number) if group else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out[-500:], err)
    saved = re.fullmatch(rf"error: stopped by {name}: saved (\S+ckpt_(\d+)\.pth); the same command continues from there\n", err)
    assert saved, err
    step = int(saved[2])
    assert load(folder / "last.pth")["step"] == step > 5
    again = run_main("--cfg", tiny_cfg, "--epochs", step // 5 + 1, "--warmup-epochs", 1, cwd=tmp_path)
    assert again.returncode == 0 and f"at step {step}\n" in again.stdout


def caught(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    mask = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
    return bool(int(mask[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux whether a signal is taken")
@pytest.mark.parametrize(("number", "status", "words"), [(signal.SIGINT, 1, "error: stopped by Ctrl-C; what was saved before is intact\n"),
                                                         (signal.SIGUSR1, 0, "")])
def test_signals_while_modules_are_imported(number: int, status: int, words: str, tmp_path: Path) -> None:
    # Python then leaves the script's folder out of its path. "-u": a process that has imported nothing yet.
    process = start("--print-config", cwd=tmp_path, launcher=("-u",), PYTHONSAFEPATH="1")
    while not caught(process, signal.SIGUSR1):  # the first thing that main.py does
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and err == words and ("EVAL_MODE" in out) == (status == 0)


def test_an_interrupt_that_an_import_swallows_ends_the_program(tmp_path: Path) -> None:
    """Some libraries catch whatever their imports raise, Ctrl-C too, and would leave half of themselves behind."""
    (tmp_path / "sitecustomize.py").write_text("""
import importlib.abc, os, signal, sys, time
class Swallows(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except BaseException:
                raise AttributeError("half a module") from None
sys.meta_path.insert(0, Swallows())
""")
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), "--eval", "--resume", "no.pth"], cwd=tmp_path, timeout=60,
                          env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: stopped by Ctrl-C; what was saved before is intact\n"


def test_sigusr1_saves_and_goes_on(tiny_cfg: Path, tmp_path: Path) -> None:
    process = start("--cfg", tiny_cfg, *ENDLESS, cwd=tmp_path)
    folder = tmp_path / "output/tiny/default"
    while not caught(process, signal.SIGUSR1):
        time.sleep(0.001)
    process.send_signal(signal.SIGUSR1)  # nothing to save yet
    wait_for(folder / "log.txt", "epoch 2/4000")
    process.send_signal(signal.SIGUSR1)
    deadline = time.time() + 30
    while not list(folder.glob("ckpt_*.pth")) and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None and list(folder.glob("ckpt_*.pth"))
    second = run_main("--cfg", tiny_cfg, *ENDLESS, cwd=tmp_path)  # meanwhile: a second run in the same folder
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"another run is writing here (process {process.pid} on {socket.gethostname()})" in second.stderr
    process.kill()
    process.communicate()
    # The lock of the dead is no lock.
    freed = run_main("--cfg", tiny_cfg, "--epochs", 1, "--warmup-epochs", 0, "--accept-changes", cwd=tmp_path)
    assert freed.returncode == 0, freed.stderr


def test_a_run_begun_anew_is_not_taken_for_the_old_one(tiny_cfg: Path, program) -> None:
    folder = program.folder / "output/tiny/default"
    assert program("--cfg", tiny_cfg, "--epochs", 3).returncode == 0
    old = load(folder / "last.pth")
    again = program("--cfg", tiny_cfg, "--epochs", 1, "--seed", 7, "--opts", "TRAIN.AUTO_RESUME", "False")
    assert again.returncode == 0 and "what an earlier run left here is moved to" in again.stdout
    assert load(folder / "last.pth")["step"] == 5 and [p.name for p in folder.glob("ckpt_*.pth")] == ["ckpt_00000005.pth"]
    kept = load(folder / "superseded-1/ckpt_00000015.pth")
    assert differences(kept["model"], old["model"]) == []
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [5]
    on = program("--cfg", tiny_cfg, "--epochs", 2, "--seed", 7)
    assert "at step 5\n" in on.stdout and load(folder / "last.pth")["step"] == 10


def test_links_are_mended_after_a_kill_between_them_and_the_file(tiny_cfg: Path, program) -> None:
    folder = program.folder / "output/tiny/default"
    assert program("--cfg", tiny_cfg, "--epochs", 1).returncode == 0
    for name in ("best.pth", "last.pth"):
        (folder / name).unlink()
    done = program("--cfg", tiny_cfg, "--epochs", 1)
    assert done.returncode == 0 and "finished already" in done.stdout
    assert (folder / "best.pth").resolve() == (folder / "last.pth").resolve() == (folder / "ckpt_00000005.pth").resolve()


def test_the_file_that_resume_names_is_not_deleted(tiny_cfg: Path, program) -> None:
    assert program("--cfg", tiny_cfg, "--epochs", 1, "--tag", "a").returncode == 0
    shutil.copytree("output/tiny/a", "output/tiny/b", symlinks=True)
    source = "output/tiny/b/ckpt_00000005.pth"
    for _ in range(2):
        done = program("--cfg", tiny_cfg, "--epochs", 6, "--tag", "b", "--resume", source)
        assert done.returncode == 0, done.stderr
    assert Path(source).exists()


def test_another_optimizer_is_refused_and_new_numbers_hold(tiny_cfg: Path, program) -> None:
    assert program("--cfg", tiny_cfg, "--epochs", 1).returncode == 0
    for name in ("sgd", "lion", "lamb"):
        done = program("--cfg", tiny_cfg, "--epochs", 2, "--optim", name)
        assert done.returncode == 3 and "AdamW" in done.stderr and done.stderr.count("\n") == 1
        assert "--tag" in done.stderr and "--pretrained" in done.stderr
    asked = program("--cfg", tiny_cfg, "--epochs", 2, "--weight-decay", 0.3, "--seed", 4)
    assert asked.returncode == 2 and asked.stderr.count("\n") == 1 and "--accept-changes" in asked.stderr
    assert "SEED changed from 0 to 4; TRAIN.WEIGHT_DECAY changed from 0.05 to 0.3; go on" in asked.stderr
    assert load(program.folder / "output/tiny/default/last.pth")["step"] == 5
    done = program("--cfg", tiny_cfg, "--epochs", 2, "--weight-decay", 0.3, "--accept-changes")
    assert done.returncode == 0 and "notice: TRAIN.WEIGHT_DECAY changed from 0.05 to 0.3 since" in done.stdout
    last = load(program.folder / "output/tiny/default/last.pth")
    assert sorted(g["weight_decay"] for g in last["optimizer"]["param_groups"]) == [0, 0.3]


def test_weights_gone_bad_never_replace_good_ones(tiny_cfg: Path, program) -> None:
    """The last update of an epoch breaks them: its loss was still finite."""
    folder = program.folder / "output/tiny/default"
    assert program("--cfg", tiny_cfg, "--epochs", 1).returncode == 0
    broken = program("--cfg", tiny_cfg, "--epochs", 9, "--lr", 1000, "--warmup-epochs", 0, "--opts", "TRAIN.LR_BATCH", 1,
                     "TRAIN.CLIP_GRAD", 0, "TRAIN.ACCEPT_CHANGES", True)
    assert broken.returncode == 4 and broken.stderr.count("\n") == 1, broken.stderr
    assert "rollback 1 of 1" in broken.stdout  # tried once from the good one, and led to the same
    for path in folder.glob("*.pth"):
        assert all(torch.isfinite(t).all() for t in load(path)["model"].values())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))
    assert program("--cfg", tiny_cfg, "--epochs", 2, "--accept-changes").returncode == 0  # what is there can be used


def test_a_checkpoint_of_bad_weights_is_passed_over(tiny_cfg: Path, program) -> None:
    from utils.checkpoints.file_format import write_checkpoint
    folder = program.folder / "output/tiny/default"
    assert program("--cfg", tiny_cfg, "--epochs", 2).returncode == 0
    content = load(folder / "last.pth")
    content["model"]["norm.weight"][0] = float("nan")
    write_checkpoint(str(folder / "ckpt_00000010.pth"), content)
    done = program("--cfg", tiny_cfg, "--epochs", 2)
    assert done.returncode == 0 and "norm.weight holds NaN" in done.stdout and "at step 5\n" in done.stdout


def test_mistakes_leave_no_folder(tiny_cfg: Path, program) -> None:
    for arguments in (["--data-path", "nowhere"], ["--opts", "MODEL.NUM_CLASSES", 9], ["--accumulation-steps", 99],
                      ["--pretrained", "absent.pth"], ["--tag", "../../x"], ["--tag", ""], ["--opts", "TRAIN.FREEZE", "[nothing]"]):
        done = program("--cfg", tiny_cfg, *arguments)
        assert done.returncode in (2, 3) and done.stderr.count("\n") == 1, (arguments, done)
        assert not (program.folder / "output").exists(), arguments


def limit_files(process: subprocess.Popen[str], size: int) -> None:
    """The largest file that the running program may write from now on, as a full disk or a quota would have it."""
    import resource
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_full_disk_keeps_what_was_saved_and_training_goes_on(tiny_cfg: Path, tmp_path: Path) -> None:
    """Checkpoints, log, metrics and TensorBoard fail, each is told once; with room again nothing is missing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    process = start("--cfg", tiny_cfg, "--epochs", 4000, "--warmup-epochs", 1, "--opts", "TRAIN.SAVE_EVERY_STEPS", 7, cwd=tmp_path)
    folder = tmp_path / "output/tiny/default"
    wait_for(folder / "log.txt", "epoch 4/4000")
    limit_files(process, 1)
    said = ""
    while "epoch 40/4000" not in said:
        said += process.stdout.readline()
    for what in ("was not saved", "log.txt: cannot be written", "metrics.jsonl: cannot be written"):
        assert what in said, said[-1000:]
    for name in ("log.txt", "steps.jsonl", "metrics.jsonl", "events.out"):
        assert len(re.findall(rf"{name}\S*: cannot be written", said)) == 1, name
    kept = sorted(int(path.stem[5:]) for path in folder.glob("ckpt_*.pth"))
    assert kept and kept[-1] < 100 and not list(folder.glob(".tmp-*"))  # from before; nothing half-written
    assert all(load(path)["step"] for path in folder.glob("*.pth"))
    limit_files(process, 1 << 40)
    deadline = time.time() + 60
    while '"epoch": 42,' not in (folder / "metrics.jsonl").read_text():
        assert time.time() < deadline
        process.stdout.readline()  # a full pipe would stop it
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    rows = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1))  # the lines that could not be written then are there now
    logged = [int(number) for number in re.findall(r"^epoch (\d+)/4000 step 5/5 ", (folder / "log.txt").read_text(), re.M)]
    assert logged in (rows, [*rows, len(rows) + 1])  # the stop may come before an epoch's evaluation
    assert [row.split(",")[0] for row in (folder / "metrics.csv").read_text().splitlines()] == ["epoch", *map(str, rows)]
    steps = [json.loads(line)["step"] for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)) >= 2 * len(rows) and "Traceback" not in said + out + err
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert len(board.Scalars("val/top1")) == len(rows)


def test_a_last_save_that_fails_is_told_by_the_exit_status(tiny_cfg: Path, tmp_path: Path) -> None:
    process = start("--cfg", tiny_cfg, *ENDLESS, "TRAIN.BACKGROUND_SAVE", False, cwd=tmp_path)
    folder = tmp_path / "output/tiny/default"
    wait_for(folder / "log.txt", "epoch 2/4000")
    process.send_signal(signal.SIGUSR1)
    wait_for(folder / "last.pth")
    limit_files(process, 200_000)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("\n") == 1, err
    assert "was not saved" in err and f"the newest checkpoint is {Path('output/tiny/default') / 'ckpt_'}" in err
    assert load(folder / "last.pth")["step"] > 0 and not list(folder.glob(".tmp-*"))


def test_room_is_looked_at_before_the_run(tiny_cfg: Path, tmp_path: Path, program) -> None:
    command = f"ulimit -f 300; exec '{sys.executable}' '{ROOT / 'main.py'}' --cfg '{tiny_cfg}'"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and re.search(r"a checkpoint takes 1\.\d MiB, but only 0\.3 MiB can be written there", done.stderr)
    assert done.stderr.count("\n") == 1 and not (tmp_path / "output").exists()
    tight = program("--cfg", tiny_cfg, "--opts", "TRAIN.CHECKPOINT_BUDGET", "1MB")
    assert tight.returncode == 2 and "give at least 4MiB" in tight.stderr
    kept = program("--cfg", tiny_cfg, "--epochs", 5, "--opts", "TRAIN.CHECKPOINT_BUDGET", "4.4MB", "TRAIN.KEEP_CHECKPOINTS", 0,
                   "TRAIN.SAVE_EVERY_STEPS", 2)
    assert kept.returncode == 0, kept.stderr
    files = list((program.folder / "output/tiny/default").glob("ckpt_*.pth"))
    assert 2 <= len(files) <= 5 and sum(path.stat().st_size for path in files) <= 4_400_000
    best = load(program.folder / "output/tiny/default/best.pth")
    assert best["best"]["step"] == best["step"]


@pytest.mark.parametrize(("keep", "words"), [(2, []), (4, ["50 MiB are free", "will take 60 MiB"]), (0, ["will take 1010 MiB"])])
def test_a_disk_that_older_checkpoints_must_leave_is_told(keep: int, words: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: 50 << 20)
    lines: list[str] = []
    config = get_config(None, ["TRAIN.KEEP_CHECKPOINTS", str(keep), "SAVE_FREQ", "3"])
    require_room(config, str(tmp_path), 10 << 20, 300, SimpleNamespace(info=lines.append, warning=lines.append))
    assert len(lines) == bool(words) and all(word in lines[0] for word in words)


@pytest.mark.parametrize("how", ["closed", "full", "ascii"])
def test_odd_standard_outputs(tiny_cfg: Path, tmp_path: Path, how: str) -> None:
    redirect = {"closed": ">&-", "full": "> /dev/full", "ascii": ""}[how]
    extra = {"PYTHONIOENCODING": "ascii"} if how == "ascii" else {}
    command = f"exec '{sys.executable}' '{ROOT / 'main.py'}' --cfg '{tiny_cfg}' --epochs 1 --output 'pü' {redirect}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(**extra), capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "finished 1 epochs" in (tmp_path / "pü/tiny/default/log.txt").read_text()
    if how == "ascii":
        assert "checkpoints in p\\xfc/tiny" in done.stdout


def test_ranks_that_would_start_apart_are_told(tiny_cfg: Path, monkeypatch, tmp_path: Path) -> None:
    import logging

    from config import get_config
    from models.safe_load import CheckpointError
    from utils.checkpoints import folder as checkpoint
    from utils.runtime import distributed
    config = get_config(str(tiny_cfg))
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, 5])
    with pytest.raises(CheckpointError, match=r"different steps \(None, 5, by rank\)"):
        choose_start(config, None, str(tmp_path), logging.getLogger("x"))
    # Rank 1 of a machine that does not see what rank 0 continues from.
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(checkpoint, "gather_objects", lambda value: ["ckpt_00000005.pth", value])
    monkeypatch.setattr(CheckpointFolder.read_patiently, "__defaults__", (0.1,))
    with pytest.raises(CheckpointError, match="rank 0 continues from it, but it is not here"):
        choose_start(config, None, str(tmp_path), logging.getLogger("x"))


def test_what_one_command_asked_is_not_in_the_checkpoint_it_left(tiny_cfg: Path, program) -> None:
    """--restart and --accept-changes are of the moment: --resume alone must not do them again."""
    folder = program.folder / "output/tiny/default"
    assert program("--cfg", tiny_cfg, "--epochs", 2, "--restart", "--accept-changes").returncode == 0
    changed = program("--resume", folder / "ckpt_00000005.pth", "--epochs", 3, "--lr", 0.01)
    assert changed.returncode == 2 and "--accept-changes" in changed.stderr
    on = program("--resume", folder / "ckpt_00000005.pth", "--epochs", 3)
    assert on.returncode == 0 and "at step 10\n" in on.stdout and not list(folder.glob("superseded*"))


def test_a_restart_under_a_launcher_is_obeyed_once(tiny_cfg: Path, program, monkeypatch) -> None:
    folder, command = program.folder / "output/tiny/default", ["--cfg", tiny_cfg, "--epochs", 2]
    assert program(*command).returncode == 0
    # The job dies before it has started again and is started again: what is there is not its own.
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = program(*command, "--restart")
    assert again.returncode == 0 and "start: scratch" in again.stdout and len(list(folder.glob("superseded-1/ckpt_*"))) == 2
    again = program(*command, "--restart")  # and once more, now its own
    assert again.returncode == 0 and "finished already" in again.stdout and not (folder / "superseded-2").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert "start: scratch" in program(*command, "--restart").stdout  # a person who says it again means it


def test_another_runs_checkpoint_does_not_mix_with_what_the_folder_holds(tiny_cfg: Path, program) -> None:
    for tag, epochs in (("a", 1), ("b", 2)):
        assert program("--cfg", tiny_cfg, "--tag", tag, "--epochs", epochs).returncode == 0
    a = program.folder / "output/tiny/a"
    before = {path.name: path.read_bytes() for path in a.iterdir() if path.name in ("ckpt_00000005.pth", "metrics.jsonl")}
    done = program("--cfg", tiny_cfg, "--tag", "a", "--restart", "--resume", "output/tiny/b/ckpt_00000010.pth", "--epochs", 3)
    assert done.returncode == 0, done.stderr
    kept = a / "superseded-1"
    assert {name: (kept / name).read_bytes() for name in before} == before and (kept / "tensorboard").is_dir()
    assert [json.loads(line)["epoch"] for line in (a / "metrics.jsonl").read_text().splitlines()] == [3]
    assert load(a / "best.pth")["step"] == 15  # the best of what this folder holds


def test_room_is_not_made_in_vain(tiny_cfg: Path, tmp_path: Path, monkeypatch) -> None:
    from utils.checkpoints import folder as checkpoint
    files = CheckpointFolder(str(tmp_path), keep=0)
    content = {"step": 1, "model": {"w": torch.zeros(1000)}}
    for step in range(1, 9):
        files.save({**content, "step": step}, best=step == 2)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 10)  # deleting does not help: a snapshot, or another job's appetite
    with pytest.raises(OSError, match="no room|No space"):
        CheckpointFolder(str(tmp_path), keep=0).save({**content, "step": 9, "model": {"w": torch.zeros(100_000)}}, best=False)
    assert files.steps() == [8, 7, 6, 5, 4, 3, 2, 1]
    small = CheckpointFolder(str(tmp_path), keep=0, budget=5 * (tmp_path / "ckpt_00000001.pth").stat().st_size)
    monkeypatch.undo()
    small.save({**content, "step": 10}, best=False)
    assert 10 in files.steps() and {2, 8} <= set(files.steps()) and 1 not in files.steps()


def test_choice_is_by_step_whatever_the_clock_said(tmp_path: Path) -> None:
    for step, age in ((5, 0), (100, 1000), (20, 500)):
        path = tmp_path / f"ckpt_{step:08d}.pth"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age, time.time() - age))
    (tmp_path / "ckpt_7.pth.bak").write_bytes(b"x")
    assert CheckpointFolder(str(tmp_path)).steps() == [100, 20, 5]


def test_strange_images_have_a_defined_result(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB"
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = bytes(range(256))
    assert to_rgb(palette).mode == "RGB"


def test_links_and_pipes_among_the_images(tmp_path: Path) -> None:
    from data.sources.folder import scan_folder
    write_images(tmp_path, "train", {"a": 2})
    (tmp_path / "train/a/self").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/a/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    assert len(scan_folder(str(tmp_path / "train"))) == 2
