"""Knowledge distillation: a trained teacher, fixed, whose answers a student learns beside the labels.

Hinton et al., "Distilling the Knowledge in a Neural Network" (2015): the teacher's probabilities (soft). Touvron et al., DeiT (ICML
2021): its decision (hard), and a token of its own that learns it, where the model has one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, config_from_text, get_config
from data import preprocessing
from models.safe_load import CheckpointError
from utils.checkpoints.exported import read_trained
from utils.checkpoints.file_format import is_own, task_of
from utils.inference.evaluation_models import Reordered
from utils.inference.trained_model import Trained, load_trained
from utils.runtime.precision import Precision
from utils.tasks.base import Batch, Task


class Teacher(nn.Module):
    """A trained model that looks at the student's images: (B, C, H, W) as the student has them -> logits (B, classes), float32.

    They are normalised as the teacher has it, and resized to its size. It is no module of the student, so that no checkpoint holds it.

    Args:
        own, students: what ``preprocessing`` says of the two.
        micro_batch: images of one forward pass.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, own: dict, students: dict, precision: Precision, micro_batch: int):
        super().__init__()
        self.model, self.size = model.eval().requires_grad_(False), own["input_size"]
        self.precision, self.micro_batch = precision, micro_batch
        mean, std, mean_here, std_here = (torch.tensor(by[key])[:, None, None] for by in (own, students) for key in ("mean", "std"))
        self.register_buffer("scale", std_here / std)
        self.register_buffer("shift", (mean_here - mean) / std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self._logits(part) for part in images.split(self.micro_batch)])

    def _logits(self, images: Tensor) -> Tensor:
        images = images.float() * self.scale + self.shift
        if list(images.shape[2:]) != list(self.size[1:]):
            images = F.interpolate(images, self.size[1:], mode="bicubic", antialias=True)
        with self.precision.autocast():
            return self.model(images).float()


def build_teacher(task: Task, config: CfgNode, classes: Sequence[str], precision: Precision) -> tuple[Teacher, str]:
    """(the teacher of TRAIN.DISTILLATION on the precision's device, a line on it) for data with ``classes``.

    Raises:
        ConfigError: it is no model of timm and no checkpoint, its classes are others, or it does not take such images.
        CheckpointError: its weights cannot be read, fetched or do not fit.
    """
    trained = _trained_teacher(task, config)
    model, own, students = trained.model, preprocessing(trained.config), preprocessing(config)
    order = _order(trained.classes, classes, config)
    if order != list(range(len(trained.classes))):
        model = Reordered(model, order)
    channels, here = own["input_size"][0], students["input_size"][0]
    if channels != here:
        raise ConfigError(f"TRAIN.DISTILLATION.TEACHER {config.TRAIN.DISTILLATION.TEACHER} takes images of {channels} channels, these have "
                          f"{here}; choose another teacher")
    window, window_here = own.get("window"), students.get("window")
    if window is not None and window_here not in (None, window):
        raise ConfigError(f"TRAIN.DISTILLATION.TEACHER {config.TRAIN.DISTILLATION.TEACHER} was trained with DATA.WINDOW {window}, this "
                          f"data has {window_here}; give --opts DATA.WINDOW \"{window}\"")
    teacher = Teacher(model, own, students, precision, config.DATA.BATCH_SIZE).to(precision.device)
    parameters = sum(p.numel() for p in model.parameters())
    return teacher, (f"teacher {config.TRAIN.DISTILLATION.TEACHER}: {parameters / 1e6:.2f} M parameters, on images of "
                     f"{own['input_size'][1]} x {own['input_size'][2]}; {config.TRAIN.DISTILLATION.TYPE} distillation, weight "
                     f"{config.TRAIN.DISTILLATION.ALPHA:g} of the loss")


def _trained_teacher(task: Task, config: CfgNode) -> Trained:
    asked = config.TRAIN.DISTILLATION
    path, weights = os.path.expanduser(asked.TEACHER), os.path.expanduser(asked.WEIGHTS)
    if os.path.exists(path):
        content = read_trained(path)
        if not is_own(content):
            raise ConfigError(f"TRAIN.DISTILLATION.TEACHER is {path}, which holds weights without a config; name the model there as timm "
                              "does, and the file in TRAIN.DISTILLATION.WEIGHTS")
        if task_of(content) != task.name:
            raise ConfigError(f"TRAIN.DISTILLATION.TEACHER is {path}, of TASK {task_of(content)}, and TASK is {task.name}; choose a "
                              "teacher of the same task")
        return load_trained(task, config_from_text(content["config"], ["MODEL.RESUME", path]), content, "TRAIN.DISTILLATION.TEACHER")
    if not timm.is_model(asked.TEACHER):
        raise ConfigError(f"TRAIN.DISTILLATION.TEACHER is {asked.TEACHER}, which is no file and no model of timm; timm.list_models() names "
                          "them")
    described = timm.get_pretrained_cfg(asked.TEACHER)
    size = described.input_size if described is not None else (3, 224, 224)
    opts: list = ["MODEL.TYPE", "timm", "MODEL.NAME", asked.TEACHER, "DATA.IMG_SIZE", list(size[1:])]
    if weights:
        return load_trained(task, get_config(None, [*opts, "MODEL.RESUME", weights]), read_trained(weights), "TRAIN.DISTILLATION.WEIGHTS")
    try:
        return load_trained(task, get_config(None, [*opts, "MODEL.PRETRAINED", "hub"]), None, "TRAIN.DISTILLATION.TEACHER")
    except CheckpointError as error:  # whose remedy is for a student
        told = str(error).replace("--pretrained FILE", "TRAIN.DISTILLATION.WEIGHTS FILE")
        raise CheckpointError(f"TRAIN.DISTILLATION.TEACHER: {told}") from None


def _order(known: Sequence[str], classes: Sequence[str], config: CfgNode) -> list[int]:
    """Which of the teacher's outputs stands for each class: by name, or by place where the teacher's have numbers for names."""
    number = {name: i for i, name in enumerate(known)}
    if set(classes) <= set(known):
        return [number[name] for name in classes]
    if len(known) == len(classes) and list(known) == [str(i) for i in range(len(known))]:
        return list(range(len(known)))
    lacking = [name for name in classes if name not in number]
    raise ConfigError(f"TRAIN.DISTILLATION.TEACHER {config.TRAIN.DISTILLATION.TEACHER} tells {len(known)} classes apart, among which "
                      f"{lacking[0]} is not; choose a teacher of this data's {len(classes)} classes")


def taught_by(teacher: Teacher, transform: Callable[[Batch, int], Batch]) -> Callable[[Batch, int], Batch]:
    """``transform``, which appends to its batch what the teacher says of the images as the student will see them."""
    def taught(batch: Batch, step: int) -> Batch:
        batch = transform(batch, step)
        return *batch, teacher(batch[0])
    return taught


def distillation_loss(outputs: Tensor, teacher: Tensor, config: CfgNode) -> Tensor:
    """The sum over the samples of how far ``outputs`` (B, C) are from the teacher's logits (B, C).

    hard is the cross-entropy with the teacher's decision; soft the Kullback-Leibler divergence of both at TEMPERATURE, times its square,
    which keeps the gradients' size.
    """
    asked = config.TRAIN.DISTILLATION
    if asked.TYPE == "hard":
        return F.cross_entropy(outputs, teacher.argmax(dim=1), reduction="sum")
    at = asked.TEMPERATURE
    return at ** 2 * F.kl_div(F.log_softmax(outputs / at, dim=1), F.log_softmax(teacher / at, dim=1), reduction="sum", log_target=True)
