"""What a user types and what the program answers: help, old flags, and mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, write_images

import main
from config import ConfigError


def test_help_lists_flags_in_groups_and_every_key() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), "--help"], env=environment(), capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0
    for word in ("weights and runs:", "understood from other trainers:", "--accumulation_steps", "TRAIN.LR_SCHEDULER.WARMUP_PREFIX",
                 "exit status"):
        assert word in done.stdout


def test_no_flag_beats_the_yaml_unless_given() -> None:
    assert main.parse([]) == (None, [], [])
    cfg, opts, advice = main.parse(["--cfg", "a.yaml", "--opts", "TAG", "x", "--epochs", "3", "--disable_amp", "--tag", "y"])
    assert (cfg, advice) == ("a.yaml", [])
    assert opts == ["TAG", "x", "TAG", "y", "TRAIN.EPOCHS", "3", "AMP_ENABLE", "False"]


@pytest.mark.parametrize("flags", [
    "--batch-size 8 --data-path x --resume r --pretrained p --accumulation-steps 2 --use-checkpoint --disable_amp --output o --tag t "
    "--eval --throughput --optim sgd",
    "--img_size 96 --num_workers 1 --epochs 30 --lr 1e-3 --min_lr 1e-6 --warmup_lr 1e-7 --warmup_epochs 2 --weight_decay 0.1 "
    "--data-set imagenet",
])
def test_flags_of_the_old_trainers(flags: str) -> None:
    from config import get_config
    _, opts, advice = main.parse(flags.split())
    get_config(None, opts)
    assert advice == []


@pytest.mark.parametrize("flags", ["--amp-opt-level O1", "--zip", "--cache-mode part", "--local_rank 3", "--local-rank 3",
                                   "--fused_window_process", "--fused_layernorm"])
def test_old_flags_are_accepted_with_one_line_of_advice(flags: str) -> None:
    from config import get_config
    _, opts, advice = main.parse(flags.split())
    get_config(None, opts)
    assert len(advice) == 1 and advice[0].startswith("notice: --")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--epoch", "3"], ["unknown flag --epoch", "--epochs"]),
    (["--batchsize=8"], ["unknown flag --batchsize", "--batch-size"]),
    (["stray"], ["unexpected argument stray"]),
    (["--epochs"], ["expected one argument"]),
])
def test_unknown_flags_name_the_nearest(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        main.parse(arguments)
    assert all(word in str(caught.value) for word in words)


def test_mistakes_are_one_sentence_with_their_status(tiny_cfg: Path, images: Path, program) -> None:
    """Every row: arguments, status, words. Nothing may be left in the output folder but what a run leaves."""
    here = program.folder
    write_images(here / "flat", "train", {"a": 2})
    (here / "flat/val").mkdir()
    write_images(here / "noval", "train", {"a": 2, "b": 2})
    write_images(here / "deep/imagenet", "train", {"a": 2})
    write_images(here / "deep/imagenet", "val", {"a": 2})
    write_images(here / "strange", "train", {"a": 9, "b": 9})
    write_images(here / "strange", "val", {"a": 2, "z": 2})
    write_images(here / "classes", "", {"a": 2, "b": 2})
    (here / "empty").mkdir()
    (here / "bytes.pth").write_bytes(b"not a checkpoint at all")
    (here / "nothing.pth").write_bytes(b"")
    (here / "file").write_text("")
    cfg = ["--cfg", tiny_cfg]
    rows = [
        ([*cfg, "--data-path", here / "absent"], 3, ["absent: no such data folder", "--data-path"]),
        ([*cfg, "--data-path", here / "empty"], 3, ["empty: holds no train/ folder", "the folder is empty"]),
        ([*cfg, "--data-path", here / "file"], 3, ["is a file"]),
        ([*cfg, "--data-path", here / "flat"], 3, ["flat/val: holds no class folders"]),
        ([*cfg, "--data-path", here / "noval"], 3, ["holds no val/ or validation/ folder"]),
        ([*cfg, "--data-path", here / "deep"], 3, ["holds no train/ folder", "deep/imagenet holds them"]),
        ([*cfg, "--data-path", images / "val"], 3, ["this looks like one split", str(images)]),
        ([*cfg, "--data-path", here / "classes"], 3, ["classes without a split"]),
        ([*cfg, "--data-path", here / "strange"], 3, ["class 'z' is unknown to the training classes"]),
        ([*cfg, "--opts", "MODEL.NUM_CLASSES", 7], 2, ["MODEL.NUM_CLASSES is 7", "has 4 classes"]),
        ([*cfg, "--accumulation-steps", 9], 2, ["longer than an epoch", "at most 6"]),
        ([*cfg, "--device", "cuda:3"], 2, ["DEVICE is cuda:3"] if not _cuda() else []),
        ([*cfg, "--device", "tpu"], 2, ["choose auto, cpu, cuda"]),
        ([*cfg, "--optim", "adamx"], 2, ["TRAIN.OPTIMIZER.NAME is 'adamx'", "did you mean adam"]),
        ([*cfg, "--output", here / "file"], 2, ["cannot be written", "--output"]),
        ([*cfg, "--resume", here / "absent.pth"], 3, ["absent.pth: no such checkpoint file"]),
        ([*cfg, "--resume", here / "nothing.pth"], 3, ["is empty"]),
        ([*cfg, "--resume", here / "bytes.pth"], 3, ["damaged or not a checkpoint"]),
        ([*cfg, "--pretrained", here / "bytes.pth"], 3, ["damaged or not a checkpoint"]),
        ([*cfg, "--resume", here / "empty"], 3, ["is a folder"]),
        ([*cfg, "--opts", "AUG.AUTO_AUGMENT", "nonsense"], 2, ["AUG.AUTO_AUGMENT"]),
        ([*cfg, "--opts", "MODEL.TYPE", "timm", "MODEL.NAME", "resnet81"], 2, ["no model of timm", "resnet"]),
        (["--eval"], 2, ["--eval needs weights", "--resume FILE"]),
        (["--cfg", here / "absent.yaml"], 2, ["no such configuration file"]),
        ([], 2, ["DATA.DATA_PATH is empty", "--data-path"]),
    ]
    for arguments, status, words in rows:
        done = program(*arguments)
        assert done.returncode == status, (arguments, done)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), (arguments, done.stderr)
        assert all(word in lines[0] for word in words), (arguments, lines)
    assert not list(here.rglob("*.tmp*")) and not list(here.rglob("ckpt_*"))


def test_missing_gpu_and_sizes_a_model_cannot_take(tiny_cfg: Path, program) -> None:
    done = program("--cfg", tiny_cfg, "--opts", "MODEL.TYPE", "timm", "MODEL.NAME", "levit_128s", "DATA.IMG_SIZE", 100)
    assert done.returncode == 2 and "levit_128s" in done.stderr and "IMG_SIZE" in done.stderr
    if not _cuda():
        done = program("--cfg", tiny_cfg, "--device", "cuda")
        assert done.returncode == 2 and "finds no CUDA GPU" in done.stderr


def _cuda() -> bool:
    import torch
    return torch.cuda.is_available()
