"""What a task is to the rest of the program: all that loop, engine, checkpoints, plan and fit know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from config import KEY, ConfigError, image_size, input_channels
from data import Loaders, build_loaders, preprocessing
from data.build import build_prediction_loader
from data.layouts.input_paths import InputImages
from data.loading.loader import ImageLoader
from data.loading.trial_batch import trial_images
from models import build_model, check_input_size
from utils.checkpoints.file_format import is_own
from utils.evaluation.metrics import Evaluation, Metric
from utils.inference.outputs import PredictionFormat
from utils.inference.trained_model import Trained
from utils.runtime.precision import Precision
from utils.visualization.batch_grid import lines_of
from utils.visualization.drawing import to_image

Batch = Any  # what the task's loaders yield; a tuple that begins with images (B, 3, H, W) unless the task says otherwise


class Evaluator(Protocol):
    """Gathers an evaluation batch by batch."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a batch, on the device, without waiting for it."""

    def result(self) -> Evaluation:
        """The figures over all ranks; every rank must ask."""


class PredictionLog(Protocol):
    """Keeps what a model predicted on every image of an evaluation."""

    def __call__(self, outputs: Any, batch: Batch) -> None:
        """Take in a batch, on the device, without waiting for it."""

    def write(self, folder: str) -> None:
        """Write all ranks' predictions into a run's ``folder``; every rank must call it. Raises ``OSError``."""


class EvaluationReport:
    """What --eval says and writes beside the metrics; as it stands, nothing.

    Attributes:
        tells_mistakes: it writes the table of mistakes that PREDICT.CSV asks for.
    """

    tells_mistakes = False

    def __init__(self, task: Task):
        self.task = task

    def classes_wanted(self, content: Any) -> Any:
        """The ``classes`` for the loaders of data that the weights in ``content`` are evaluated on."""
        return content["classes"] if is_own(content) else None

    def begin(self, loaders: Loaders) -> list[str]:
        """The loaders are open: lines to tell. Raises ``ConfigError`` or ``DataError`` for data that cannot be reported on so."""
        return []

    def record(self, outputs: Any, batch: Batch) -> None:
        """Take in a batch, on the device, without waiting for it."""

    def lines(self, result: Evaluation, raw: Sequence[Evaluation]) -> list[str]:
        """What is told at the end, the figure that counts last; every rank must ask.

        Args:
            result: of the weights that count, ``raw`` of those beside them.
        """
        return [*(f"raw {other.line}" for other in raw), result.line]

    def write(self) -> list[str]:
        """Write the files that were asked for; a line on each. Rank 0's business; raises ``OSError``."""
        return []


class Task(Protocol):
    """A task as a config asks for it. What stands here with a body fits batches of ``(images, targets)`` tensors, a row a sample.

    Attributes:
        name: as the config key TASK has it.
        metrics: what an evaluation gives, in the order in which it is told.
        best: the metric that decides which checkpoint is the best.
        tie_break: the metric that decides between evaluations that are equal in that.
        smoothing: label smoothing that the targets of a transformed batch hold.
        usual_classes: of its best-known data, for measuring without data.
        one_size: every batch of a run has images of the same size.
        pretrains: its models are to start others from, and answer nothing by themselves.
    """

    smoothing: float = 0.0
    name: str
    metrics: Sequence[Metric]
    best: Metric
    tie_break: Metric | None = None
    usual_classes = 1000
    one_size = True
    pretrains = False

    def __init__(self, config: CfgNode):
        """Raises ``ConfigError`` for keys that do not go with this task."""

    def beats(self, values: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than the best one so far, which is empty before the first."""
        value, than = values[self.best.name], best.get(self.best.name)
        same = value == than or (value != value and than is not None and than != than)  # or both are no number
        tied = self.tie_break is not None and same and self.tie_break.name in best
        return self.tie_break.better(values[self.tie_break.name], best[self.tie_break.name]) if tied else self.best.better(value, than)

    # What is trained on what

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1, **options: Any) -> Loaders:
        """The data; arguments as of ``data.build_loaders``."""
        return build_loaders(config, rank, world_size, **options)

    def build_model(self, config: CfgNode, num_classes: int | None = None) -> nn.Module:
        """The model for data with ``num_classes`` classes; None: as many as the config or the variant says."""
        return build_model(config, num_classes)

    def check_input_size(self, model: nn.Module, config: CfgNode) -> None:
        """Raise ``ConfigError`` unless the model takes images as training has them."""
        check_input_size(model, config)

    def input_size(self, config: CfgNode) -> tuple[int, int]:
        """(height, width) in pixels of the images in a training batch, the largest where they vary."""
        return image_size(config)

    def preprocessing(self, config: CfgNode) -> dict[str, Any]:
        """How evaluation prepares an image, as plain data that a checkpoint carries; ``mean`` and ``std`` among it."""
        return preprocessing(config)

    def batch_transform(self, config: CfgNode, num_classes: int, rank: int) -> Callable[[Batch, int], Batch]:
        """What happens to a step's batch on the device, from the batch and the step's number (mixup); it may change the batch in place."""
        return lambda batch, step: batch

    def taught(self, config: CfgNode, transform: Callable[[Batch, int], Batch],
               precision: Precision) -> tuple[Callable[[Batch, int], Batch], list[str]]:
        """(``transform`` with a teacher's answers in its batches where the config names one, lines to tell)."""
        if config.TRAIN.DISTILLATION.TEACHER:
            raise ConfigError(f"TRAIN.DISTILLATION.TEACHER is not supported for TASK {self.name}")
        return transform, []

    # A batch

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        return tuple(part.to(device, non_blocking=True) for part in batch)

    def begin_step(self, batch: Batch, world_size: int) -> None:
        """Called with the batch of a step before its micro-batches, by each of the ``world_size`` processes that share the step."""

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        """A step's batch as micro-batches; the same number of them on every rank."""
        return list(zip(*(part.tensor_split(parts) for part in batch), strict=True))

    def least_images(self, config: CfgNode) -> int:
        """The fewest images that a micro-batch of training can have."""
        return 1

    def images(self, batch: Batch) -> Tensor:
        """The images (B, 3, H, W) of a batch."""
        return batch[0]

    def targets(self, batch: Batch) -> Any:
        """What an evaluator compares outputs with."""
        return batch[1]

    def synthetic_batch(self, config: CfgNode, images: int, num_classes: int, device: torch.device, generator: torch.Generator) -> Batch:
        """Noise of the config's size with targets as training has them, for measuring speed and memory."""
        ...

    def next_images(self, config: CfgNode, images: int, device: torch.device) -> Any:
        """Noise as images of the batch after this one, prepared on ``device`` as training prepares it meanwhile: for its memory."""
        return trial_images(config, images, device)

    # Training and evaluation

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The outputs for a batch; called under autocast, in training and in evaluation."""
        return model(self.images(batch))

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The sum of the losses of a batch's samples, each of weight 1, in full precision; the step's mean is over all its samples."""
        ...

    def evaluator(self, device: torch.device) -> Evaluator:
        ...

    def prediction_log(self, loaders: Loaders) -> PredictionLog | None:
        """What keeps the predictions of every validation image for the run's folder; None where nothing is kept."""
        return None

    # What a checkpoint keeps of a task, and an export tells

    def state_dict(self) -> dict[str, Any]:
        """What evaluations have found that predictions need, as plain data; as it stands, nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept; empty for one of a version or a task that keeps nothing."""

    def facts(self, classes: Sequence[str]) -> dict[str, Any]:
        """What those who use an exported model of these ``classes`` must know beside their names, as plain data."""
        return {}

    # What commands show of the data and of a trained model

    def shown_batch(self, config: CfgNode, batch: Batch, classes: Sequence[str],
                    most: int) -> tuple[list[Image.Image], list[list[tuple[str, str]]], str]:
        """(pictures of one size of the first images of a training batch, ``most`` at most; what is written below each, as
        ``utils.visualization.batch_grid.sheet`` has it; how they were made, in a line)."""
        prepare, aug = self.preprocessing(config), config.AUG
        tiles = [to_image(image, prepare["mean"], prepare["std"]) for image in self.images(batch)[:most]]
        mixed = f"mixup {aug.MIXUP:g}, cutmix {aug.CUTMIX:g}, probability {aug.MIXUP_PROB:g}" if aug.MIXUP_PROB else "no mixup"
        return tiles, lines_of(self.targets(batch)[:most].cpu(), self.smoothing, classes), (
            f"policy {aug.AUTO_AUGMENT or 'none'}; scale {aug.SCALE[0]:g} to {aug.SCALE[1]:g}; erasing {aug.REPROB:g}; {mixed}; "
            f"label smoothing {config.MODEL.LABEL_SMOOTHING:g}; seed {config.SEED}")

    def evaluation_report(self, config: CfgNode) -> EvaluationReport:
        """What --eval says and writes; raises ``ConfigError`` for keys that do not go with the task, before anything is read."""
        return EvaluationReport(self)

    def evaluated_model(self, config: CfgNode, model: nn.Module, names: Sequence[str], classes: Sequence[str]) -> nn.Module:
        """``model``, whose outputs stand for ``names``, as --eval looks at it on data with ``classes``."""
        return model

    def prediction_loader(self, config: CfgNode, images: InputImages, device: torch.device,
                          published: bool) -> tuple[ImageLoader, list[str]]:
        """(loader of images without labels, notices); arguments as of ``data.build.build_prediction_loader``."""
        return build_prediction_loader(config, images, device, published)

    def numbers(self, batch: Batch) -> Tensor:
        """The images' numbers (B,) in a batch of ``prediction_loader``, -1 in rows that count for nothing; on the CPU."""
        return batch[1].cpu()

    def prediction_format(self, config: CfgNode, trained: Trained) -> PredictionFormat:
        """How --predict tells a model's outputs; raises ``ConfigError`` where the task has no predictions to tell."""
        raise ConfigError(f"--predict is not supported for TASK {self.name}")


def chosen_metric(config: CfgNode, known: Mapping[str, Metric], otherwise: str) -> Metric:
    """The metric of TRAIN.BEST_METRIC among those a task has, by the key's words.

    Raises:
        ConfigError: the task has no such metric.
    """
    name = otherwise if config.TRAIN.BEST_METRIC == "auto" else config.TRAIN.BEST_METRIC
    if name not in known:
        raise ConfigError(f"TRAIN.BEST_METRIC is {name!r}, which TASK {config.TASK} does not have; choose from "
                          f"{', '.join(word for word in known if word in KEY['TRAIN.BEST_METRIC'].choices)}")
    return known[name]


def noise(config: CfgNode, images: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Synthetic images (B, C, H, W) of the config's size; the same on every device."""
    return torch.randn(images, input_channels(config), *image_size(config), generator=generator).to(device)
