"""Kills at the worst moments, damaged files, numbers that are not finite: what is saved stays good, and the run goes on."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, differences, load, run_main
from faults import ends, fault, start, wait_for, waiting

from models.safe_load import CheckpointError, read_file
from utils.checkpoints.file_format import write_checkpoint
from utils.runtime.precision import Precision
from utils.tasks.classification import Classification

RUN = "output/tiny/default"
OFTEN = ("--opts", "TRAIN.SAVE_EVERY_STEPS", "3")
ENDLESS = ("--epochs", "4000", "--warmup-epochs", "1")
STATE = ("model", "ema", "optimizer", "step", "best", "loss_sums", "loss_steps", "skipped", "evaluated")


@pytest.fixture(scope="module")
def straight(tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs without a break."""
    folder = tmp_path_factory.mktemp("straight")
    assert run_main("--cfg", tiny_cfg, "--epochs", 3, *OFTEN, cwd=folder).returncode == 0
    return folder / RUN


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "seconds")} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file() and not path.name.startswith(".lock")}


def same(a: Path, b: Path) -> list[str]:
    first, second = load(a / "last.pth"), load(b / "last.pth")
    return differences({k: first[k] for k in STATE}, {k: second[k] for k in STATE}) + differences(rows(a), rows(b), "metrics")


# --------------------------------------------------------------------------------------------------
# Killed at the worst moment
# --------------------------------------------------------------------------------------------------

# Calls: .job, config.yaml and sources.json sync twice and move once each, history.jsonl syncs once; the checkpoint of step 3 syncs
# file and folder, then the link's folder, and moves twice. So the first two wait inside the checkpoint of step 5 before the first
# evaluation; the last in the one after it, when the line of metrics is written already, and its table has moved.
@pytest.mark.parametrize(("call", "after", "step"), [("fsync", 10, 3), ("replace", 5, 3), ("replace", 8, 5)])
def test_killed_inside_a_save(straight: Path, tiny_cfg: Path, tmp_path: Path, call: str, after: int, step: int) -> None:
    command, folder = ["--cfg", tiny_cfg, "--epochs", 3, *OFTEN], tmp_path / RUN
    process = start(*command, cwd=tmp_path, **fault(tmp_path, call, after=after, how="wait"))
    wait_for(waiting(tmp_path))
    os.killpg(process.pid, signal.SIGKILL)
    ends([process])
    assert list(folder.glob(".tmp-*")) and max(int(p.stem[5:]) for p in folder.glob("ckpt_*.pth")) == step
    assert load(folder / "last.pth")["step"] == step and (folder / "metrics.jsonl").exists() == (step == 5)
    done = run_main(*command, cwd=tmp_path)
    assert done.returncode == 0 and f"at step {step}\n" in done.stdout and not list(folder.glob(".tmp-*"))
    assert same(folder, straight) == []


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_ended_during_an_evaluation(straight: Path, tiny_cfg: Path, tmp_path: Path, how: str) -> None:
    """The evaluation is done again, the training steps before it are not; here the last one of the run."""
    command, folder = ["--cfg", tiny_cfg, "--epochs", 3, *OFTEN], tmp_path / RUN
    # Raw and averaged weights, three batches an evaluation: the 14th call is in the middle of the third.
    process = start(*command, cwd=tmp_path, **fault(tmp_path, "evaluation", after=14, how="wait" if how == "SIGKILL" else "slow"))
    wait_for(waiting(tmp_path))
    process.send_signal(getattr(signal, how))
    status, _, err = ends([process])[0]
    if how == "SIGTERM":
        assert status == 75 and re.search(r"saved \S+ckpt_00000015\.pth", err), err
    assert len(rows(folder)) == 2
    done = run_main(*command, cwd=tmp_path)
    assert done.returncode == 0 and "at step 15\n" in done.stdout and "epoch 3/3 step" not in done.stdout
    assert same(folder, straight) == []
    again = run_main(*command, cwd=tmp_path)
    assert again.returncode == 0 and "finished already" in again.stdout


def test_a_signal_during_a_save_waits_for_it(tiny_cfg: Path, tmp_path: Path) -> None:
    """Never two saves at once; and killed a moment later, the last whole checkpoint is the one that counts."""
    process = start("--cfg", tiny_cfg, *ENDLESS, *OFTEN, cwd=tmp_path, **fault(tmp_path, "fsync", after=10, how="slow"))
    wait_for(waiting(tmp_path))
    process.send_signal(signal.SIGTERM)
    status, _, err = ends([process])[0]
    folder = tmp_path / RUN
    assert status == 75, err
    assert load(folder / "last.pth")["step"] == max(int(p.stem[5:]) for p in folder.glob("ckpt_*.pth")) >= 5
    assert not list(folder.glob(".tmp-*"))
    waiting(tmp_path).unlink()
    process = start("--cfg", tiny_cfg, *ENDLESS, *OFTEN, cwd=tmp_path, **fault(tmp_path, "fsync", after=10, how="wait"))
    wait_for(waiting(tmp_path))
    good = load(folder / "last.pth")["step"]
    process.send_signal(signal.SIGTERM)  # the save hangs, as on a dead disk; the scheduler's patience ends
    time.sleep(0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    ends([process])
    read_file(str(folder / "last.pth"))
    assert load(folder / "last.pth")["step"] == good


def test_a_second_interrupt_stops_at_once(tiny_cfg: Path, tmp_path: Path) -> None:
    process = start("--cfg", tiny_cfg, *ENDLESS, *OFTEN, "--num-workers", 1, cwd=tmp_path,
                    **fault(tmp_path, "fsync", after=10, how="wait"))
    wait_for(waiting(tmp_path))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it wants to save
    process.send_signal(signal.SIGINT)
    status, _, err = ends([process], 10)[0]
    assert status == 1 and err == "error: stopped by Ctrl-C; what was saved before is intact\n"
    assert load(tmp_path / RUN / "last.pth")["step"] == 3


def test_a_signal_before_the_first_step_ends_at_once(tiny_cfg: Path, tmp_path: Path) -> None:
    process = start("--cfg", tiny_cfg, cwd=tmp_path, **fault(tmp_path, "index", after=1, how="wait"))  # the first look is for the task
    wait_for(waiting(tmp_path))
    process.send_signal(signal.SIGTERM)
    status, _, err = ends([process], 10)[0]
    assert status == 75 and "stopped by SIGTERM before the first step" in err and err.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_an_error_lets_the_save_under_way_end(tiny_cfg: Path, tmp_path: Path) -> None:
    """The evaluation fails while the checkpoint before it is being written, slowly."""
    slow = fault(tmp_path, "fsync", after=7, how="slow")
    (Path(slow["PYTHONPATH"]) / "sitecustomize.py").open("a").write(
        "\nimport torch\ndef _fails(*a, **k):\n    raise ValueError('injected')\ntorch.Tensor.topk = _fails\n")
    status, _, err = ends([start("--cfg", tiny_cfg, "--epochs", 1, cwd=tmp_path, **slow)])[0]
    assert status == 1 and "unexpected ValueError" in err
    assert load(tmp_path / RUN / "last.pth")["step"] == 5


def test_a_request_to_save_in_an_evaluation_is_kept(tiny_cfg: Path, tmp_path: Path) -> None:
    process = start("--cfg", tiny_cfg, *ENDLESS, "--opts", "SAVE_FREQ", 4000, cwd=tmp_path,
                    **fault(tmp_path, "evaluation", after=15, how="slow"))
    wait_for(waiting(tmp_path))
    process.send_signal(signal.SIGUSR1)
    wait_for(tmp_path / RUN / "ckpt_00000015.pth", seconds=20)
    process.kill()
    ends([process])


def test_kills_at_random_moments(capfd: pytest.CaptureFixture[str]) -> None:
    """The short form of ``scripts/kill_loop.py``."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import kill_loop
    status = kill_loop.main(["--kills", "3", "--workers", "1"])
    assert status == 0, capfd.readouterr().out


def test_the_folder_deleted_under_the_run(tiny_cfg: Path, tmp_path: Path) -> None:
    process = start("--cfg", tiny_cfg, *ENDLESS, *OFTEN, cwd=tmp_path)
    folder = tmp_path / RUN
    wait_for(folder / "log.txt", "epoch 2/4000")
    shutil.rmtree(tmp_path / "output", ignore_errors=True)
    wait_for(folder / "last.pth", seconds=20, words="")
    process.send_signal(signal.SIGTERM)
    assert ends([process])[0][0] == 75
    assert load(folder / "last.pth")["step"] > 5


def test_a_killed_loading_process_is_told_and_nothing_is_lost(tiny_cfg: Path, tmp_path: Path) -> None:
    process = start("--cfg", tiny_cfg, *ENDLESS, "--num-workers", 1, "--opts", "SAVE_FREQ", 4000, "TRAIN.EVAL_FREQ", 4000, cwd=tmp_path)
    wait_for(tmp_path / RUN / "log.txt", "epoch 3/4000")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    status, out, err = ends([process])[0]
    assert status == 1 and "a DataLoader worker was killed" in err and "--shm-size" in err and err.count("\n") == 1, err
    step = int(re.search(r"^saved \S+ckpt_(\d+)\.pth$", out, re.M)[1])
    assert step >= 10 and load(tmp_path / RUN / "last.pth")["step"] == step


# --------------------------------------------------------------------------------------------------
# Damaged and hostile files
# --------------------------------------------------------------------------------------------------

def test_a_truncated_newest_checkpoint_is_passed_over(straight: Path, tiny_cfg: Path, program) -> None:
    folder, command = program.folder / RUN, ["--cfg", tiny_cfg, "--epochs", 3, *OFTEN]
    for size in ("nothing", "half", "all but a byte"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(straight, folder, symlinks=True)
        newest = folder / "ckpt_00000015.pth"
        content = newest.read_bytes()
        newest.write_bytes(content[:{"nothing": 0, "half": len(content) // 2, "all but a byte": -1}[size]])
        done = program(*command)
        assert done.returncode == 0 and done.stdout.count("warning: output") == 1 and "at step 12\n" in done.stdout, (size, done.stdout)
        assert same(folder, straight) == []


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(straight: Path, tiny_cfg: Path, program) -> None:
    folder, command = program.folder / RUN, ["--cfg", tiny_cfg, "--epochs", 3, *OFTEN]
    shutil.copytree(straight, folder, symlinks=True)
    for path in folder.glob("ckpt_*.pth"):
        path.write_bytes(path.read_bytes()[:-100])
    before = contents(folder)
    done = program(*command)
    assert done.returncode == 3 and "--restart" in done.stderr and done.stderr.count("\n") == 1
    assert contents(folder) == before
    again = program(*command, "--restart")
    assert again.returncode == 0 and "moved to" in again.stdout and "start: scratch" in again.stdout
    assert same(folder, straight) == []
    kept = {path.name: path.read_bytes() for path in (folder / "superseded-1").glob("ckpt_*")}
    assert kept == {name: content for name, content in before.items() if name.startswith("ckpt_")}


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(straight: Path, tiny_cfg: Path, program) -> None:
    content = load(straight / "last.pth")
    content["hvt_format"] = 99
    write_checkpoint("newer.pth", content)
    done = program("--cfg", tiny_cfg, "--resume", "newer.pth")
    assert done.returncode == 3 and "newer version of this program (format 99)" in done.stderr


def test_a_checkpoint_of_the_first_version_goes_on(straight: Path, tiny_cfg: Path, program) -> None:
    """Its files knew nothing of skipped steps and pending evaluations."""
    shutil.copytree(straight, program.folder / RUN, symlinks=True)
    content = load(straight / "last.pth")
    for key in ("skipped", "loss_steps", "rollbacks", "evaluated"):
        del content[key]
    write_checkpoint(str(program.folder / RUN / "ckpt_00000015.pth"), content)
    done = program("--cfg", tiny_cfg, "--epochs", 4, *OFTEN)
    assert done.returncode == 0 and "at step 15\n" in done.stdout and [row["epoch"] for row in rows(program.folder / RUN)] == [1, 2, 3, 4]


def test_members_that_claim_more_than_the_file_holds(straight: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(200_000_000))
    assert bomb.stat().st_size < 1_000_000
    with pytest.raises(CheckpointError, match="claim to be larger"):
        read_file(str(bomb))
    for header in (b"\xff" * 7 + b"\x7f", (50_000_000_000).to_bytes(8, "little")):
        (tmp_path / "huge.safetensors").write_bytes(header + b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,399999999996]}}')
        with pytest.raises(CheckpointError, match="huge.safetensors"):
            read_file(str(tmp_path / "huge.safetensors"))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs_instead_of_weights_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    torch.jit.script(model).save("program.pt")
    torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), "program.pt2")
    with pytest.raises(CheckpointError, match="TorchScript") as told:
        read_file("program.pt")
    remedy = re.search(r'python -c "(.*)"$', str(told.value))
    exec(remedy[1])
    assert torch.equal(read_file("weights.pth")["weight"], model.weight)
    with pytest.raises(CheckpointError, match=r"torch\.export"):
        read_file("program.pt2")


def test_control_characters_do_not_reach_the_terminal(images: Path, tiny_cfg: Path, program) -> None:
    shutil.copytree(images, "hostile")
    (Path("hostile") / "val" / "a").rename(Path("hostile") / "val" / "\x1b[2J<img onerror=x>\r")
    done = program("--cfg", tiny_cfg, "--data-path", "hostile")
    assert done.returncode == 3 and "\x1b" not in done.stderr and "\r" not in done.stderr and "<img onerror=x>" in done.stderr


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------

def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tiny_cfg: Path, tmp_path: Path, images: Path) -> None:
    """The model has batch norms, whose statistics the bad forward pass has moved already."""
    recipe = ["--cfg", ROOT / "configs/timm.yaml", "--data-path", images, "--batch-size", 16, "--img-size", 32, "--num-workers", 0,
              "--epochs", 2, "--warmup-epochs", 0, "--opts", "MODEL.NAME", "resnet10t", "TRAIN.EMA_DECAY", 0.5, "TRAIN.SAVE_EVERY_STEPS", 1,
              "TRAIN.KEEP_CHECKPOINTS", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    done = run_main(*recipe, cwd=tmp_path, **fault(tmp_path, "loss", after=1, how="nan"))  # the second step of four
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output/resnet10t/default"
    before, after = load(folder / "ckpt_00000001.pth"), load(folder / "ckpt_00000002.pth")
    weights = [{k: v for k, v in state["model"].items() if "num_batches" not in k} for state in (before, after)]
    assert differences(*weights) == [] and differences(before["optimizer"]["state"], after["optimizer"]["state"]) == []
    assert after["skipped"] == 1 and load(folder / "last.pth")["step"] == 4
    assert "warning: step 2 was skipped" in done.stdout
    evidence = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert len(evidence) == 1 and evidence[0]["step"] == 2
    assert evidence[0]["gradient_norm"] == "nan" and evidence[0]["loss_sum_by_rank"] == ["nan"]
    names = evidence[0]["images_by_rank"][0]
    assert len(names) == 16 and all(Path(name).is_file() for name in names)
    first, second = rows(folder)
    assert first["skipped_steps"] == 1 and "skipped_steps" not in second and 0 < first["train_loss"] < 10


def test_beyond_the_budget_back_to_a_good_checkpoint_and_then_stop(tiny_cfg: Path, tmp_path: Path) -> None:
    budget = ["--opts", "TRAIN.SAVE_EVERY_STEPS", 3, "TRAIN.SKIP_BUDGET", 1, "TRAIN.KEEP_CHECKPOINTS", 0]
    # Five calls for the first epoch's steps, six in its evaluation: steps 8 and 9.
    healed = run_main("--cfg", tiny_cfg, "--epochs", 3, *budget, cwd=tmp_path, **fault(tmp_path, "loss", after=13, how="nan", times=2))
    assert healed.returncode == 0, healed.stderr
    said = r"^warning: .* back to \S+ckpt_(\d+)\.pth, passing over the (\d+) steps since \(rollback 1 of 1\)$"
    assert re.search(said, healed.stdout, re.M), healed.stdout
    good, back, last = (load(tmp_path / RUN / f"ckpt_{step:08d}.pth") for step in (6, 9, 15))
    for part in ("model", "ema"):
        assert differences(good[part], back[part]) == []  # step 7 is undone
    assert differences(good["optimizer"]["state"], back["optimizer"]["state"]) == [] and differences(back["model"], last["model"])
    assert last["step"] == 15 and last["rollbacks"] == 1 and "finished 3 epochs" in healed.stdout
    stopped = run_main("--cfg", tiny_cfg, "--epochs", 9, "--tag", "b", *budget, cwd=tmp_path,
                       **fault(tmp_path, "loss", after=17, how="nan", times=99))
    assert stopped.returncode == 4 and stopped.stderr.count("\n") == 1, stopped.stderr
    assert "more than the 1 of TRAIN.SKIP_BUDGET" in stopped.stderr and "lower TRAIN.BASE_LR" in stopped.stderr
    assert "the newest checkpoint is " in stopped.stderr and "nonfinite.jsonl" in stopped.stderr
    for path in (tmp_path / "output/tiny/b").glob("*.pth"):
        assert all(torch.isfinite(t).all() for t in load(path)["model"].values())


def test_fp16_overflow_lowers_the_scale_and_moves_nothing_else(tiny_cfg: Path, program, monkeypatch) -> None:
    """On the CPU with gradients of fp32 and a scale that overflows even those: the run is that without scaling, bit for bit."""
    loss = Classification.loss
    monkeypatch.setattr(Classification, "loss", lambda task, outputs, batch: 8 * loss(task, outputs, batch))
    assert program("--cfg", tiny_cfg, "--tag", "plain").returncode == 0
    built = Precision.__post_init__

    def scaled(precision: Precision, start: float = 2.0 ** 127) -> None:
        built(precision)
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=10_000)
    monkeypatch.setattr(Precision, "__post_init__", scaled)
    done = program("--cfg", tiny_cfg, "--tag", "scaled")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stderr
    plain, other = (load(program.folder / f"output/tiny/{tag}/last.pth") for tag in ("plain", "scaled"))
    assert other["scaler"]["scale"] < 2.0 ** 127 and other["step"] == plain["step"] and other["skipped"] == 0
    # The scale is a power of two: dividing by it again loses nothing.
    assert differences(plain["model"], other["model"]) == []


def test_fp16_that_overflows_at_every_scale_stops_with_advice(tiny_cfg: Path, program, monkeypatch) -> None:
    from torch import nn

    built = Precision.__post_init__

    def scaled(precision: Precision) -> None:
        built(precision)
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(Precision, "__post_init__", scaled)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("inf")))
    done = program("--cfg", tiny_cfg)
    assert done.returncode == 4 and "overflow in fp16 at every loss scale" in done.stderr and "bf16" in done.stderr
    assert done.stderr.count("\n") == 1
