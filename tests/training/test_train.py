"""Whole runs: train, evaluate, fine-tune, measure; what they print and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, differences, environment, load, write_images

from config import get_config
from utils.runtime.precision import choose_precision
from utils.training import loop

TOP1 = re.compile(r"^top1 (\d+\.\d\d)(?: top5 (\d+\.\d\d))? loss (\d+\.\d{4}) \((\d+) of (\d+)\)$", re.M)


@pytest.fixture(scope="module")
def trained(tiny_cfg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight epochs on images whose brightness tells the class; its folder."""
    import main
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    try:
        assert main.main(["--cfg", str(tiny_cfg), "--epochs", "8", "--lr", "0.3", "--opts", "AUG.MIXUP_PROB", "0.2"]) == 0
    finally:
        os.chdir(here)
    return folder / "output/tiny/default"


def test_what_a_run_leaves(trained: Path, images: Path) -> None:
    assert {"config.yaml", "log.txt", "metrics.jsonl", "last.pth", "best.pth"} <= set(os.listdir(trained))
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9)) and [row["step"] for row in rows] == list(range(5, 45, 5))
    assert all({"train_loss", "top1", "top5", "val_loss", "lr", "images_per_s"} <= row.keys() for row in rows)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and max(row["top1"] for row in rows) > 60  # it learns
    last = load(trained / "last.pth")
    assert last["step"] == 40 and last["classes"] == ["a", "b", "c", "d"] and last["data_path"] == str(images)
    assert last["preprocessing"]["input_size"] == [3, 32, 32] and last["global_batch"] == 8
    assert {"python", "torch", "torchvision", "timm"} == set(last["versions"]) and last["scaler"] == {}
    assert yaml.safe_load(last["config"]) == yaml.safe_load((trained / "config.yaml").read_text())
    best = load(trained / "best.pth")
    assert best["best"]["top1"] == max(row["top1"] for row in rows) and best["best"]["step"] == best["step"]
    assert any(name.startswith("events") for name in os.listdir(trained / "tensorboard"))
    log = (trained / "log.txt").read_text()
    assert TOP1.search(log) and "start: scratch" in log and "global batch 8 = 8 images x 1 accumulated x 1 processes" in log
    assert "learning rate 0.3 x 0.015625 = 0.0046875" in log
    line = re.search(r"^epoch 1/8 step 2/5 lr \S+ loss \S+ grad \S+ \d+ images/s data \d+% mem \d+ MiB eta \S+ epoch, \S+ run$", log, re.M)
    assert line, log


def test_evaluation_needs_the_checkpoint_alone(trained: Path, images: Path, tmp_path: Path, program) -> None:
    """In another folder, with the training images gone."""
    moved = tmp_path / "moved.pth"
    shutil.copy(trained / "best.pth", moved)
    hidden = images.parent / "train-away"
    os.rename(images / "train", hidden)
    try:
        done = program("--eval", "--resume", moved)
    finally:
        os.rename(hidden, images / "train")
    assert done.returncode == 0, done.stderr
    top1 = TOP1.findall(done.stdout)
    assert len(top1) == 1 and done.stdout.strip().splitlines()[-1].startswith("top1 ") and top1[0][4] == "19"
    assert "raw top1" in done.stdout.splitlines()[-2]  # the average was on: its line is the last
    assert float(top1[0][0]) == pytest.approx(load(moved)["best"]["top1"], abs=0.01)
    assert not (tmp_path / "output").exists()


def test_evaluation_elsewhere_maps_classes_by_name(trained: Path, images: Path, program) -> None:
    subset = program.folder / "subset"
    (subset / "val").mkdir(parents=True)
    for name in "db":
        shutil.copytree(images / "val" / name, subset / "val" / name)
    whole = program("--eval", "--resume", trained / "best.pth")
    part = program("--eval", "--resume", trained / "best.pth", "--data-path", subset)
    assert part.returncode == 0 and TOP1.search(part.stdout)[5] == "9"
    assert int(TOP1.search(part.stdout)[4]) <= int(TOP1.search(whole.stdout)[4])
    os.rename(subset / "val/d", subset / "val/z")
    wrong = program("--eval", "--resume", trained / "best.pth", "--data-path", subset)
    assert wrong.returncode == 3 and "class 'z' is unknown" in wrong.stderr
    gone = program("--eval", "--resume", trained / "best.pth", "--data-path", subset / "no")
    assert gone.returncode == 3 and "no such data folder" in gone.stderr


def test_evaluation_of_published_weights_needs_their_config(trained: Path, tiny_cfg: Path, program) -> None:
    state = load(trained / "best.pth")["ema"]
    torch.save({"model": state}, "official.pth")
    done = program("--eval", "--cfg", tiny_cfg, "--resume", "official.pth")
    ours = program("--eval", "--resume", trained / "best.pth")
    assert done.returncode == 0 and TOP1.findall(done.stdout) == TOP1.findall(ours.stdout)
    bare = program("--eval", "--resume", "official.pth")
    assert bare.returncode == 2 and "add --cfg" in bare.stderr
    train = program("--cfg", tiny_cfg, "--resume", "official.pth")
    assert train.returncode == 3 and "--pretrained official.pth" in train.stderr
    other = program("--eval", "--cfg", tiny_cfg, "--resume", "official.pth", "--opts", "MODEL.CROS.EMBED_DIM", 32)
    assert other.returncode == 3 and "does not fit this model" in other.stderr


def test_evaluation_without_resume_takes_the_runs_best(trained: Path, tiny_cfg: Path, program) -> None:
    done = program("--eval", "--cfg", tiny_cfg, "--output", trained.parent.parent)
    assert done.returncode == 0 and "best.pth" in done.stdout and TOP1.search(done.stdout)


def test_precedence_is_printed(trained: Path, tiny_cfg: Path, program) -> None:
    start = re.compile(r"^start: (\S+) ?(\S*) \(", re.M)
    pretrained = ["--pretrained", trained / "best.pth"]
    first = program("--cfg", tiny_cfg, *pretrained, "--epochs", 1, "--tag", "x")
    assert start.search(first.stdout).groups() == ("pretrained", str(trained / "best.pth"))
    assert "tensors kept" in first.stdout
    again = program("--cfg", tiny_cfg, *pretrained, "--resume", trained / "last.pth", "--epochs", 2, "--tag", "x")
    assert start.search(again.stdout)[1] == "auto-resume" and "at step 5\n" in again.stdout
    given = program("--cfg", tiny_cfg, *pretrained, "--resume", trained / "last.pth", "--epochs", 9, "--tag", "y", "--accept-changes")
    assert start.search(given.stdout)[1] == "resume" and f"resumed {trained / 'last.pth'} at step 40\n" in given.stdout
    off = program("--cfg", tiny_cfg, "--epochs", 1, "--tag", "x", "--opts", "TRAIN.AUTO_RESUME", "False")
    assert start.search(off.stdout)[1] == "scratch"


def test_resume_alone_continues_the_run(trained: Path, program) -> None:
    """No --cfg: the checkpoint knows its config and its data."""
    shutil.copytree(trained, program.folder / "output/tiny/default", symlinks=True)
    done = program("--resume", "output/tiny/default/last.pth", "--epochs", 9)
    assert done.returncode == 0, done.stderr
    assert "at step 40" in done.stdout and "epoch 9/9 step 5/5" in done.stdout


def test_fine_tuning_replaces_the_head_and_resume_refuses(trained: Path, tiny_cfg: Path, program) -> None:
    write_images(program.folder / "other", "train", dict(p=10, q=10))
    write_images(program.folder / "other", "val", dict(p=3, q=3))
    arguments = ["--cfg", tiny_cfg, "--data-path", "other", "--epochs", 1, "--opts", "TRAIN.EMA_DECAY", 0]
    done = program(*arguments, "--pretrained", trained / "best.pth")
    assert done.returncode == 0, done.stderr
    assert "head replaced by a fresh one" in done.stdout
    assert TOP1.search(done.stdout)[2] is None  # top-5 of two classes
    refused = program(*arguments, "--resume", trained / "best.pth", "--tag", "r")
    assert refused.returncode == 2 and f"--pretrained {trained / 'best.pth'}" in refused.stderr
    assert "4 classes" in refused.stderr and refused.stderr.count("\n") == 1


def test_another_model_is_refused_with_the_first_mismatches(trained: Path, tiny_cfg: Path, program) -> None:
    for flag in ("--resume", "--pretrained"):
        done = program("--cfg", tiny_cfg, flag, trained / "best.pth", "--tag", flag[2:], "--epochs", 9,
                       "--opts", "MODEL.CROS.EMBED_DIM", 32)
        assert done.returncode == 3 and "patch_embed.projs.0.weight is [8, 3, 4, 4], the model's [16, 3, 4, 4]" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "pvt_v2_b0"])
def test_any_timm_model_trains(images: Path, program, name: str) -> None:
    done = program("--cfg", ROOT / "configs/timm.yaml", "--data-path", images, "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 16,
                   "--img-size", 64, "--num-workers", 0, "--opts", "MODEL.NAME", name)
    assert done.returncode == 0, done.stderr
    assert TOP1.search(done.stdout)
    assert program("--eval", "--resume", f"output/{name}/default/last.pth").returncode == 0


@pytest.mark.parametrize(("able", "name"), [
    ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32"), ({}, "fp32")])
def test_auto_is_bf16_only_where_the_cpu_computes_it(able: dict[str, bool], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert choose_precision(get_config(str(ROOT / "configs/quickstart.yaml")), torch.device("cpu")).name == name


def test_precisions_on_a_cpu(tiny_cfg: Path, program) -> None:
    plain = program("--cfg", tiny_cfg, "--tag", "fp32", "--device", "cpu")
    disabled = program("--cfg", tiny_cfg, "--tag", "off", "--precision", "bf16", "--disable_amp", "--device", "cpu")
    o0 = program("--cfg", tiny_cfg, "--tag", "o0", "--precision", "bf16", "--amp-opt-level", "O0", "--device", "cpu")
    fp16 = program("--cfg", tiny_cfg, "--tag", "fp16", "--precision", "fp16", "--device", "cpu")
    bf16 = program("--cfg", tiny_cfg, "--tag", "bf16", "--precision", "bf16", "--device", "cpu")
    assert "on cpu in fp32" in disabled.stdout and "on cpu in fp32" in o0.stdout and "on cpu in bf16" in bf16.stdout
    assert "notice: --amp-opt-level" in o0.stdout
    assert fp16.stdout.count("notice: fp16 training is not supported on cpu; computing in fp32") == 1
    states = {tag: load(program.folder / f"output/tiny/{tag}/last.pth")["model"] for tag in ("fp32", "off", "fp16", "bf16")}
    assert plain.returncode == 0 and differences(states["fp32"], states["off"]) == differences(states["fp32"], states["fp16"]) == []
    flat = {tag: torch.cat([t.flatten() for t in state.values()]) for tag, state in states.items()}
    assert 0 < (flat["bf16"] - flat["fp32"]).norm() / flat["fp32"].norm() < 0.05  # the same curve, in fewer digits


def test_activation_checkpointing_trains_the_same(tiny_cfg: Path, program) -> None:
    assert program("--cfg", tiny_cfg, "--tag", "plain").returncode == 0
    assert program("--cfg", tiny_cfg, "--tag", "saving", "--use-checkpoint").returncode == 0
    a, b = (load(program.folder / f"output/tiny/{tag}/last.pth")["model"] for tag in ("plain", "saving"))
    assert differences(a, b) == []


def test_same_seed_same_run_other_seed_another(tiny_cfg: Path, program) -> None:
    for tag, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert program("--cfg", tiny_cfg, "--tag", tag, "--seed", seed, "--epochs", 1).returncode == 0
    a, b, c = (load(program.folder / f"output/tiny/{tag}/last.pth") for tag in "abc")
    assert differences(a["model"], b["model"]) == [] and differences(a["optimizer"], b["optimizer"]) == []
    assert differences(a["model"], c["model"])


def test_a_hopeless_learning_rate_stops_with_a_verdict(tiny_cfg: Path, program) -> None:
    done = program("--cfg", tiny_cfg, "--lr", 1000, "--epochs", 30, "--warmup-epochs", 0, "--opts", "TRAIN.LR_BATCH", 0,
                   "TRAIN.CLIP_GRAD", 0, "TRAIN.OPTIMIZER.NAME", "sgd")
    assert done.returncode == 4, done.stdout
    assert re.search(r"error: .* were not finite .* more than the 10 of TRAIN.SKIP_BUDGET; lower TRAIN.BASE_LR", done.stderr)
    assert done.stderr.count("\n") == 1
    for path in (program.folder / "output/tiny/default").glob("*.pth"):
        assert all(torch.isfinite(t).all() for t in load(path)["model"].values())  # what was saved is sound


def test_out_of_memory_advises_what_the_command_takes(trained: Path, tiny_cfg: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.")

    monkeypatch.setattr("utils.commands.evaluate.evaluate", refuse)
    monkeypatch.setattr("utils.training.engine.backward", refuse)
    rows = {"TEST.BATCH_SIZE 8": ("--eval", "--resume", trained / "best.pth"), "--fit": ("--cfg", tiny_cfg, "--tag", "oom")}
    for words, arguments in rows.items():
        done = program(*arguments)
        assert done.returncode == 1 and done.stderr.startswith("error: out of memory; ") and words in done.stderr, done
        assert ("--fit" in done.stderr) == (words == "--fit")
    monkeypatch.undo()


def test_a_rate_is_for_the_images_that_there_are(tiny_cfg: Path, program) -> None:
    done = program("--cfg", tiny_cfg, "--batch-size", 4096, "--epochs", 1, "--opts", "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.REPORT", "none")
    assert done.returncode == 0 and "of which the data fills 44; learning rate 0.05 x 0.0859375 = 0.00429688" in done.stdout, done
    row = json.loads((program.folder / "output/tiny/default/steps.jsonl").read_text().splitlines()[0])
    assert row["lr"] == pytest.approx(0.05 * 44 / 512)


def test_patience_ends_a_run_early_and_a_continued_one_where_it_would_have_ended(
        tiny_cfg: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    opts = ["TRAIN.PATIENCE", 2, "TRAIN.BEST_METRIC", "loss", "TRAIN.LAYER_DECAY", 0.8, "TRAIN.EMA_DECAY", 0, "AUG.AUTO_AUGMENT", "none",
            "TRAIN.REPORT", "none"]
    run = ["--cfg", tiny_cfg, "--epochs", 30, "--lr", 3, "--opts", *opts]
    done = program(*run)
    folder = program.folder / "output/tiny/default"
    end = load(folder / "last.pth")
    last, best = end["step"] // 5, end["best"]["epoch"]
    assert done.returncode == 0 and last - best == 2 < last < 20, done
    assert f"ended early, after epoch {last} of 30: 2 epochs (TRAIN.PATIENCE)" in done.stdout and f"with --epochs {last}" in done.stdout
    assert f"finished {last} epochs" in done.stdout and (folder / "predictions.npz").exists()
    # layer decay says its rates
    assert "learning rate 0.0192 (x 0.41): patch_embed\n" in done.stdout and "(x 0.64): layers.1.blocks.0\n" in done.stdout
    again = program(*run)
    assert again.returncode == 0 and "finished already" in again.stdout and "raise TRAIN.PATIENCE" in again.stdout, again
    for path in folder.glob("ckpt_*.pth"):
        if load(path)["step"] > end["best"]["step"]:
            path.unlink()

    def die(run: loop.Run, row: dict, *_: object) -> None:
        run.saver.wait()
        raise RuntimeError("cut off before the last evaluation")

    evaluate = loop.evaluate_epoch
    monkeypatch.setattr(loop, "evaluate_epoch", lambda run, row, *rest: (die if row["epoch"] == last else evaluate)(run, row, *rest))
    assert program(*run).returncode == 1 and load(folder / "last.pth")["step"] == end["step"]
    monkeypatch.undo()
    assert program(*run).returncode == 0
    assert differences(end["model"], load(folder / "last.pth")["model"]) == [] and load(folder / "last.pth")["step"] == end["step"]


def test_throughput_needs_no_data(program) -> None:
    done = program("--throughput", "--batch-size", 2, "--img-size", 64, "--device", "cpu", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 3
    for line, what in zip(lines, ("forward", "training"), strict=False):
        assert re.fullmatch(rf"throughput {what}: \d+\.\d images/s \(batch 2, .* median of \d+, fp32 on cpu\)", line)
    assert re.fullmatch(r"memory of a training step: peak \d+ MiB; weights \d+, optimizer \d+, activations \d+, gradients \d+ MiB",
                        lines[2])


def test_odd_places_and_names(tiny_cfg: Path, images: Path, program) -> None:
    strange = program.folder / "o u t @%ü"
    link = program.folder / "link to images"
    link.symlink_to(images)
    done = program("--cfg", tiny_cfg, "--output", f"{strange}/", "--tag=-t ü", "--data-path", f"{link}/", "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert (strange / "tiny/-t ü/last.pth").exists()
    assert program("--eval", "--resume", strange / "tiny/-t ü/last.pth").returncode == 0


def test_closed_output_does_not_stop_a_run(tiny_cfg: Path, tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{ROOT / 'main.py'}' --cfg '{tiny_cfg}' | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    log = (tmp_path / "output/tiny/default/log.txt").read_text()
    assert "finished 2 epochs" in log and load(tmp_path / "output/tiny/default/last.pth")["step"] == 10


def test_tensorboard_is_a_comfort(tiny_cfg: Path, program, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = program("--cfg", tiny_cfg, "--epochs", 1)
    assert done.returncode == 0 and not (program.folder / "output/tiny/default/tensorboard").exists()


def test_quick_start_config_writes_the_digits_and_trains(program) -> None:
    done = program("--cfg", ROOT / "configs/quickstart.yaml", "--epochs", 1, "--warmup-epochs", 0.5, "--num-workers", 0)
    assert done.returncode == 0, done.stderr
    assert "wrote scikit-learn's 1,797 digits to datasets/digits" in done.stdout
    assert (program.folder / "datasets/digits/train/7").is_dir() and TOP1.search(done.stdout)[5] == "360"
    # A recipe with everything switched on.
    config = yaml.safe_load((program.folder / "output/crossformer_digits/default/config.yaml").read_text())
    assert config["AUG"]["AUTO_AUGMENT"].startswith("rand-") and min(
        config["AUG"]["MIXUP"], config["AUG"]["CUTMIX"], config["AUG"]["REPROB"], config["MODEL"]["DROP_PATH_RATE"],
        config["MODEL"]["LABEL_SMOOTHING"], config["TRAIN"]["WARMUP_EPOCHS"]) > 0
