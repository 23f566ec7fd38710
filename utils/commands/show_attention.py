"""--show-attention: draw which tokens of an image a CrossFormer's token attends to."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from config import ConfigError, image_size, input_channels
from data import DataError, preprocessing
from data.decoding.pillow import Reading, decode
from data.layouts.input_paths import InputImages
from data.transforms.build import build_eval_transform
from data.transforms.pipeline import EvalPipeline
from models import build_model, check_input_size, load_state
from models.crossformer import CrossFormer
from models.weights import check_finite, unwrap_state_dict
from utils.checkpoints.file_format import is_own, with_found
from utils.commands.outputs import check_outputs
from utils.inference.trained_model import chosen_state, load_trained, weights_to_evaluate
from utils.runtime import distributed
from utils.tasks.build import build_task
from utils.tasks.dense import DenseTask
from utils.visualization.attention_map import KINDS, attended, chosen, page, token_count
from utils.visualization.drawing import require_png, save, to_image


def show_attention(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Draw the attention on the image SHOW.ATTENTION; computed on the CPU, it is one image.

    Raises:
        ConfigError: another family, a token outside the image, or no place for the picture.
        DataError: the image cannot be read.
    """
    if config.MODEL.TYPE != "crossformer":
        raise ConfigError(f"--show-attention draws the attention of CrossFormer and CrossFormer++; MODEL.TYPE is {config.MODEL.TYPE}, "
                          "whose attention has no such groups")
    path = require_png(config.SHOW.FILE, "SHOW.FILE")
    check_outputs(config, [("SHOW.FILE", path)])
    task = build_task(config)
    if not isinstance(task, DenseTask):
        _point(config, *image_size(config))  # before anything is read
    if not distributed.is_main():
        return
    data = _bytes(os.path.expanduser(config.SHOW.ATTENTION))  # first: without it nothing is worth while
    weights, content = weights_to_evaluate(config, content, "--show-attention")
    config = with_found(config, content, weights)
    looked_at = _by_dense(task, config, content) if isinstance(task, DenseTask) else _by_classifier(config, weights, content, data)
    model, image, prepare, said, size = looked_at
    point = _point(config, *size)
    found = attended(model, image, point)
    title = f"{os.path.basename(config.SHOW.ATTENTION)}: {said}"
    shown = chosen(found)
    save(page(to_image(image[0], prepare["mean"], prepare["std"]), shown, len(model.layers), point, title,
              f"{config.MODEL.NAME}, weights {os.path.basename(weights)}; last block of each kind in a stage, mean of its heads"), path)
    for item in shown:
        top = int(item.weights.argmax())
        logger.info(f"stage {item.stage + 1} block {item.block + 1} ({KINDS[item.far]}): token {item.token[0]},{item.token[1]} of the map "
                    f"attends to {token_count(item)}, most to {item.cells[top][0]},{item.cells[top][1]} "
                    f"({100 * item.weights[top]:.1f} %)")
    logger.info(f"wrote {path}: attention of the token at {point[0]},{point[1]} (y,x in pixels)")


# Of an image: the CrossFormer, what it is given (1, C, H, W), how that was prepared, what is said of the image, and (height, width) without
# what it is padded with.
LookedAt = tuple[CrossFormer, Tensor, Mapping[str, Any], str, tuple[int, int]]


def _by_classifier(config: CfgNode, weights: str, content: Any, data: bytes) -> LookedAt:
    picture = _decoded(data, os.path.expanduser(config.SHOW.ATTENTION), config)
    model, prepare = _load(config, weights, content), preprocessing(config)
    image = (build_eval_transform(prepare)(picture) if isinstance(picture, Image.Image) else picture)[None]
    best = (model(image).sigmoid() if config.TASK == "multilabel" else model(image).softmax(-1))[0]
    predicted = int(best.argmax())
    name = content["classes"][predicted] if is_own(content) else f"class {predicted}"
    return model, image, prepare, f"predicted {name} ({100 * float(best[predicted]):.1f} %)", image_size(config)


@torch.inference_mode()
def _by_dense(task: DenseTask, config: CfgNode, content: Any) -> LookedAt:
    """By the backbone of a model for detection or segmentation, on the image as that is given it."""
    file, device = os.path.expanduser(config.SHOW.ATTENTION), torch.device("cpu")
    trained = load_trained(task, config, content, "--show-attention")
    loader, _ = task.prediction_loader(trained.config, InputImages([file], {}), device, trained.published)
    with contextlib.closing(loader):
        batch = task.to_device(next(iter(loader)), device)
        if int(batch.numbers[0]) < 0:
            raise DataError(f"{file}: not a readable image ({loader.failures[0].reason})")
    told = task.prediction_format(trained.config, trained).tell(task.forward(trained.model, batch))[0]["text"]
    height, width = batch.sizes[0].tolist()
    return trained.model.backbone.model, batch.images[:1], task.preprocessing(trained.config), told, (height, width)


def _load(config: CfgNode, path: str, content: Any) -> CrossFormer:
    own = is_own(content)
    state = chosen_state(config, content, path)[0] if own else unwrap_state_dict(content, path)
    classes = content["classes"] if own else state.get("head.bias")
    model = build_model(config, None if classes is None else len(classes))
    check_input_size(model, config)
    check_finite(state, path)
    load_state(model, state, config, path)
    return model.eval().requires_grad_(False)


def _point(config: CfgNode, height: int, width: int) -> tuple[int, int]:
    """SHOW.TOKEN as (y, x), or the centre."""
    text = config.SHOW.TOKEN
    if not text:
        return height // 2, width // 2
    try:
        y, x = (int(part) for part in text.strip("()[] ").split(","))
    except ValueError:
        raise ConfigError(f"SHOW.TOKEN is {text!r}; give y,x in pixels of the model's input, such as {height // 2},{width // 2}") from None
    if not (0 <= y < height and 0 <= x < width):
        raise ConfigError(f"SHOW.TOKEN is {text}; it lies outside the model's input of {height} x {width} pixels")
    return y, x


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _decoded(data: bytes, path: str, config: CfgNode) -> Image.Image | torch.Tensor:
    """The image, or of other channels than RGB what evaluation makes of it, (C, H, W)."""
    if input_channels(config) != 3:
        images = InputImages([path], {})
        images.configure(Reading.of(config), config.DATA.READ_PATIENCE)
        return EvalPipeline(build_eval_transform(preprocessing(config)), on_device=False)(images, 0)
    return decode(data, path, Reading.of(config))
