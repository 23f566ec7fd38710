"""Learning from a teacher: what it sees, what the loss makes of it, and that no checkpoint holds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import differences, load
from torch import nn

from config import ConfigError, get_config, with_values
from utils.checkpoints.file_format import describe, write_checkpoint
from utils.runtime.precision import Precision
from utils.tasks.build import build_task
from utils.tasks.classification import Classification
from utils.tasks.distillation import Teacher, build_teacher, distillation_loss

CPU = torch.device("cpu")


def asked(*opts: object):
    return get_config(None, ["TRAIN.DISTILLATION.TEACHER", "resnet10t", *(f"TRAIN.DISTILLATION.{o}" if n % 2 == 0 else str(o)
                                                                          for n, o in enumerate(opts))])


def test_losses_are_those_of_the_papers() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    hard = distillation_loss(student, teacher, asked("TYPE", "hard"))
    assert torch.allclose(hard, 6 * F.cross_entropy(student, teacher.argmax(1)))
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    soft = distillation_loss(student, teacher, asked("TYPE", "soft", "TEMPERATURE", 3))
    assert torch.allclose(soft, 9 * (p * (p / q).log()).sum())
    task = Classification(asked("ALPHA", 0.25))
    labels = torch.randint(4, (6,))
    without = task.loss(student, (None, labels))
    assert torch.allclose(task.loss(student, (None, labels, teacher)), 0.75 * without + 0.25 * hard)


def test_a_teacher_sees_the_images_in_its_own_way() -> None:
    own = dict(input_size=[3, 8, 8], mean=[0.5, 0.4, 0.3], std=[0.5, 0.2, 0.1])
    students = dict(input_size=[3, 4, 4], mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    pixels = torch.rand(5, 3, 1, 1).expand(-1, -1, 4, 4)
    normalised = [(pixels - torch.tensor(by["mean"])[:, None, None]) / torch.tensor(by["std"])[:, None, None] for by in (own, students)]
    seen: list[torch.Tensor] = []

    class Sees(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.mean((2, 3))

    logits = Teacher(Sees(), own, students, Precision(CPU), 2)(normalised[1])
    assert [tuple(x.shape) for x in seen] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.allclose(logits, normalised[0].mean((2, 3)), atol=1e-5) and not logits.requires_grad


def test_deits_token_learns_from_the_teacher() -> None:
    opts = ["MODEL.TYPE", "timm", "MODEL.NAME", "deit_tiny_distilled_patch16_224", "DATA.IMG_SIZE", "32"]
    config = get_config(None, [*opts, "TRAIN.DISTILLATION.TEACHER", "resnet10t", "TRAIN.DISTILLATION.ALPHA", "1"])
    task = Classification(config)
    model = task.build_model(config, 4).train()
    batch = (torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.randn(2, 4))
    task.loss(task.forward(model, batch), batch).backward()
    assert float(model.head.weight.grad.abs().sum()) == 0 < float(model.head_dist.weight.grad.abs().sum())
    assert model.eval()(batch[0]).shape == (2, 4)


def test_a_run_learns_from_a_checkpoint_and_keeps_no_teacher(tiny_cfg: Path, tiny_run: Path, images: Path, program) -> None:
    opts = ["--opts", "TRAIN.DISTILLATION.TEACHER", tiny_run, "TRAIN.DISTILLATION.TYPE", "soft", "TRAIN.DISTILLATION.ALPHA", 1,
            "TRAIN.REPORT", "none", "TRAIN.SAVE_EVERY_STEPS", 6]
    done = program("--cfg", tiny_cfg, "--tag", "a", *opts)
    assert done.returncode == 0 and f"teacher {tiny_run}: 0.04 M parameters, on images of 32 x 32; soft distillation" in done.stdout, done
    folder = program.folder / "output/tiny/a"
    end = load(folder / "last.pth")
    plain = load(tiny_run)
    assert end["model"].keys() == plain["model"].keys() and differences(end["model"], plain["model"])
    (folder / "ckpt_00000010.pth").unlink()
    again = program("--cfg", tiny_cfg, "--tag", "a", *opts)
    assert again.returncode == 0 and "at step 6" in again.stdout, again
    assert differences(end["model"], load(folder / "last.pth")["model"]) == []
    assert program("--eval", "--resume", folder / "last.pth").returncode == 0  # for which no teacher is needed


@pytest.mark.parametrize(("teacher", "words"), [("nosuch", "no file and no model of timm"), ("WEIGHTS", "goes with")])
def test_mistakes_are_one_sentence(teacher: str, words: str, tiny_cfg: Path, program) -> None:
    key = "WEIGHTS" if teacher == "WEIGHTS" else "TEACHER"
    done = program("--cfg", tiny_cfg, "--opts", f"TRAIN.DISTILLATION.{key}", teacher)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done


@pytest.mark.parametrize(("opts", "words"), [(["TASK", "simmim", "DATA.MASK_PATCH_SIZE", 8], "teacher of the same task"),
                                             (["DATA.WINDOW", [0, 4095]], "DATA.WINDOW [0.0, 4095.0]")])
def test_a_teacher_of_another_task_or_other_levels_is_refused(opts: list, words: str, tmp_path: Path) -> None:
    config = get_config(None, ["DATA.IMG_SIZE", 32, "MODEL.TYPE", "crossformer"])
    own = get_config(None, ["DATA.IMG_SIZE", 32, "MODEL.TYPE", "crossformer", *opts])
    model = build_task(own).build_model(own, 2)
    content = describe(own.dump(), ["a", "b"], {}, "", {}, 8, 1) | dict(model=model.state_dict(), ema={}, step=1, best={}, optimizer={},
                                                                       scaler={}, loss_sums=[])
    write_checkpoint(str(tmp_path / "teacher.pth"), content)
    config = with_values(config, {"TRAIN.DISTILLATION.TEACHER": str(tmp_path / "teacher.pth"), "DATA.WINDOW": [0, 65535]}, "test")
    with pytest.raises(ConfigError, match=re.escape(words)):
        build_teacher(build_task(config), config, ["a", "b"], Precision(CPU, "fp32"))
