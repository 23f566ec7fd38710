"""A trained model as prediction and export use it: from a checkpoint of ours alone, or from published weights and their config."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, config_from_text
from data.layouts.splits import read_class_names
from models import classifier_rows, load_pretrained, load_state
from models.weights import check_finite, unwrap_state_dict
from utils.checkpoints.exported import read_trained
from utils.checkpoints.file_format import is_own, task_of, task_state, with_found
from utils.checkpoints.run_folder import run_folder
from utils.runtime import distributed

if TYPE_CHECKING:
    from utils.tasks.base import Task

_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Trained:
    """A model and what its outputs mean.

    Attributes:
        config: with what its run found in its data.
        model: on the CPU, in evaluation mode.
        path: the file of its weights.
        published: the weights are others', to be evaluated on the pixels that their authors had.
        step: optimizer steps behind the weights; None where the file does not say.
        averaged: the weights are the run's moving average.
        classes: names, in the order of the outputs.
        facts: what the task tells of its outputs beside their names, as plain data (thresholds).
        descriptions: words for names that are WordNet's ids, such as ImageNet's; "" for others.
    """

    config: CfgNode
    model: nn.Module
    path: str
    published: bool
    step: int | None
    averaged: bool
    classes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    descriptions: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "descriptions", describe_classes(self.classes))

    def line(self) -> str:
        """Such as ``best.pth (step 1200, averaged weights)``."""
        told = [*([f"step {self.step}"] if self.step is not None else []), *(["averaged weights"] if self.averaged else [])]
        return self.path + (f" ({', '.join(told)})" if told else "")


def open_trained(task: Task, config: CfgNode, content: Any, command: str) -> Trained:
    """``load_trained`` for a command of one process; raises ``ConfigError`` in several, or where the task trains no classifier."""
    if task.pretrains:
        raise ConfigError(f"{command}: a model of TASK {task.name} has no classes; fine-tune one from it first, with --pretrained "
                          f"{config.MODEL.RESUME or 'FILE'} and the config of a classifier")
    if distributed.world_size() > 1:
        raise ConfigError(f"{command} runs in one process; start it by python main.py, without torchrun")
    return load_trained(task, config, content, command)


def load_trained(task: Task, config: CfgNode, content: Any, command: str) -> Trained:
    """The model with the weights that --eval would evaluate; where a run kept an average, with that.

    Args:
        content: of the file that MODEL.RESUME names, or None.
        command: the flag or key that asks, for messages.

    Raises:
        ConfigError: no weights are named, or the model does not take images of the config's size.
        CheckpointError: the weights do not fit the model, or are not finite.
    """
    if content is None and config.MODEL.PRETRAINED == "hub":
        model = task.build_model(config)
        load_pretrained(model, "hub", config)
        task.check_input_size(model, config)
        names = _published_names(config, model.num_classes)
        return Trained(config, model.eval(), "hub", True, None, False, names, task.facts(names))
    path, content = weights_to_evaluate(config, content, command)
    config = with_found(config, content, path)
    if is_own(content):
        classes, step = content["classes"], content["step"]
        state, averaged = chosen_state(config, content, path)
        task.load_state_dict(task_state(content))
        model = task.build_model(config, len(classes))
    else:
        state, step, averaged = unwrap_state_dict(content, path), None, False
        model = _published_model(task, config, state, path)
        classes = _published_names(config, model.num_classes)
    check_finite(state, path)
    load_state(model, state, config, path)
    task.check_input_size(model, config)
    return Trained(config, model.eval(), path, not is_own(content), step, averaged, list(classes), task.facts(classes))


def chosen_state(config: CfgNode, content: dict[str, Any], path: str) -> tuple[dict[str, Tensor], bool]:
    """(state dict, whether it is the average) of a checkpoint of ours, by TEST.WEIGHTS.

    Raises:
        ConfigError: the average is asked for, and the run kept none.
    """
    if config.TEST.WEIGHTS == "ema" and not content["ema"]:
        raise ConfigError(f"{path} holds no average of weights (its run had TRAIN.EMA_DECAY 0); leave --weights out")
    averaged = bool(content["ema"]) and config.TEST.WEIGHTS != "raw"
    return content["ema" if averaged else "model"], averaged


def _published_model(task: Task, config: CfgNode, state: dict[str, Tensor], path: str) -> nn.Module:
    """With as many outputs as the file's classifier has, unless the config says how many."""
    model = task.build_model(config)
    rows = classifier_rows(model, state, config, path)
    return model if config.MODEL.NUM_CLASSES or rows in (0, model.num_classes) else task.build_model(config, rows)


def _published_names(config: CfgNode, count: int) -> list[str]:
    """Names from DATA.CLASS_NAMES; WordNet's ids where the number of classes is one of ImageNet's; else numbers."""
    if config.DATA.CLASS_NAMES:
        names, _ = read_class_names(os.path.expanduser(config.DATA.CLASS_NAMES))
        if len(names) != count:
            raise ConfigError(f"DATA.CLASS_NAMES: {config.DATA.CLASS_NAMES} names {len(names)} classes, the weights tell {count} apart")
        return names
    from timm.data import ImageNetInfo, infer_imagenet_subset
    subset = infer_imagenet_subset(dict(num_classes=count))
    return list(ImageNetInfo(subset).label_names()) if subset else [str(number) for number in range(count)]


def describe_classes(classes: list[str]) -> list[str]:
    """Words for each class that is a WordNet id (``n01440764``: ``tench, Tinca tinca``), "" for others."""
    if not any(_WORDNET.fullmatch(name) for name in classes):
        return [""] * len(classes)
    from timm.data import ImageNetInfo
    info = ImageNetInfo("imagenet-22k")

    def describe(name: str) -> str:
        try:
            return info.label_name_to_description(name)
        except KeyError:
            return ""

    return [describe(name) for name in classes]


def weights_to_evaluate(config: CfgNode, content: Any, command: str) -> tuple[str, Any]:
    """(path, content) for ``command``: --resume, else the run folder's best, else --pretrained.

    Raises:
        ConfigError: no weights are named, or --pretrained names others than those that the run folder's best began with, or they were
            trained for another task.
    """
    path, content = (config.MODEL.RESUME, content) if content is not None else _weights_without_resume(config, command)
    if is_own(content) and config.TASK not in ("auto", task_of(content)):
        raise ConfigError(f"{path} was trained for TASK {task_of(content)}, and TASK is {config.TASK}; add --opts TASK {task_of(content)}")
    return path, content


def _weights_without_resume(config: CfgNode, command: str) -> tuple[str, Any]:
    best, pretrained = os.path.join(run_folder(config), "best.pth"), config.MODEL.PRETRAINED
    if not os.path.exists(best):
        if not pretrained:
            raise ConfigError(f"{command} needs weights: give --resume FILE (there is no {best})")
        return pretrained, read_trained(pretrained)
    content = read_trained(best)
    if pretrained and is_own(content) and pretrained != config_from_text(content["config"]).MODEL.PRETRAINED:
        raise ConfigError(f"{command} could take {best} of the run so named, or --pretrained {pretrained}; say which by --resume FILE")
    return best, content
