"""``--export FILE.onnx`` of dense tasks: at one image size, checked against the model itself.

Models that give a value to each pixel or query take any number of images and go through torch.export. Detectors find another number of
objects in each image, which torch.export refuses: they are traced by the older exporter (``dynamo=False``), one image at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou
from yacs.config import CfgNode

from config import ConfigError
from models.exported import Exported
from utils.inference.exporters import LIMIT, ExportError, Normalised, difference, explained, onnx_outputs, quiet_exporter, trace_onnx
from utils.inference.trained_model import Trained
from utils.runtime.files import open_atomically
from utils.tasks.base import Task

_CHECKED = (1, 2, 5)  # batch sizes; of a detector so many images
_SAME_BOX = 0.99  # overlap of two boxes that differ by rounding alone


def write_dense_onnx(config: CfgNode, trained: Trained, task: Task, path: str) -> str:
    """Write EXPORT.FILE; a line to tell.

    Raises:
        ConfigError: another form than ONNX, or an operator set that the exporter of detectors does not speak.
        ExportError: the exporter fails, or what it wrote computes something else.
    """
    if not path.lower().endswith(".onnx"):
        raise ConfigError(f"EXPORT.FILE is {path}, and a model of TASK {config.TASK} is exported as ONNX alone; give FILE.onnx")
    exported, prepare = Exported(trained.model), task.preprocessing(config)
    names, size = exported.names, [-(-side // trained.model.stride) * trained.model.stride for side in task.input_size(config)]
    model = (Normalised(exported, prepare["mean"], prepare["std"]) if config.EXPORT.PREPROCESS else exported).eval()
    with explained(config, "torch.onnx"), open_atomically(path) as file:
        if exported.detects:
            _trace(model, _images(config, size, 1), file.name, names, config.EXPORT.OPSET)
        else:
            trace_onnx(model, _images(config, size, 2), config.EXPORT.OPSET, names).save(file.name, external_data=False)
        _describe(file.name, _description(config, trained, prepare, size, names))
        again = onnx_outputs(file.name)
        verdict = _check_found(config, model, again, size) if exported.detects else _check_maps(config, model, again, size)
    kind = "pixels, uint8" if config.EXPORT.PREPROCESS else "normalised, float32"
    return (f"wrote {path}: ONNX, operator set {config.EXPORT.OPSET}; {os.path.getsize(path) / 2**20:.1f} MiB; takes "
            f"({1 if exported.detects else 'N'}, 3, {size[0]}, {size[1]}), {kind}; gives {', '.join(names)}; {verdict}")


def _trace(model: nn.Module, images: Tensor, path: str, names: list[str], opset: int) -> None:
    with quiet_exporter():
        torch.onnx.export(model, (images,), path, dynamo=False, input_names=["images"], output_names=names, opset_version=opset,
                          dynamic_axes={name: {0: "objects"} for name in names})


def _describe(path: str, description: dict[str, str]) -> None:
    import onnx
    written = onnx.load(path)
    for node in written.graph.node:
        node.ClearField("doc_string")  # where in whose sources it comes from
    onnx.helper.set_model_props(written, description)
    onnx.save(written, path)


def _description(config: CfgNode, trained: Trained, prepare: dict[str, Any], size: list[int], names: list[str]) -> dict[str, str]:
    """What the file carries beside the graph, as JSON texts."""
    normalised = "the model takes uint8 pixels of 0 to 255 and normalises them itself" if config.EXPORT.PREPROCESS else \
        "divide by 255, subtract mean, divide by std"
    steps = (f"resize until the shorter side is {prepare['short_side']} or the longer one {prepare['long_side']} pixels, whichever comes "
             f"first, and the whole fits into {size[0]} x {size[1]}; {normalised}; pad below and to the right "
             + ("with the mean colour" if config.EXPORT.PREPROCESS else "with zeros") + "; RGB, (N, 3, H, W)")
    facts = dict(task=config.TASK, outputs=names, classes=trained.classes, model=dict(name=config.MODEL.NAME, step=trained.step),
                 preprocessing=dict(prepare, input_size=[3, *size], steps=steps), **trained.facts)
    return {key: json.dumps(value) for key, value in facts.items()}


def _images(config: CfgNode, size: list[int], count: int) -> Tensor:
    """Noise of coarse and of fine grain, as pixels or normalised."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.randn(count, 3, *(max(1, side // 16) for side in size), generator=generator)
    images = F.interpolate(coarse, size=size, mode="bilinear") + 0.3 * torch.randn(count, 3, *size, generator=generator)
    return (60 * images + 120).clamp(0, 255).byte() if config.EXPORT.PREPROCESS else images


def _check_maps(config: CfgNode, model: nn.Module, again: Callable[[Tensor], list[Tensor]], size: list[int]) -> str:
    worst = 0.0
    for count in _CHECKED:
        images = _images(config, size, count)
        for found, expected in zip(again(images), model(images), strict=True):
            worst = max(worst, _within(config, difference(found, expected)))
    return f"checked by onnxruntime on batches of {_told()}, largest difference {worst:.1e} of the largest logit"


def _check_found(config: CfgNode, model: nn.Module, again: Callable[[Tensor], list[Tensor]], size: list[int]) -> str:
    """Every object must be found by both, at the same place and of the same class; order does not count, since scores may be equal."""
    worst, objects = 0.0, 0
    for seed in _CHECKED:
        images = _images(config, size, seed)[:1]
        (boxes, scores, labels, *masks), expected = again(images), model(images)
        if len(boxes) != len(expected[0]):
            raise ExportError(f"{config.MODEL.NAME} as onnxruntime computes it finds {len(boxes)} objects in noise where the model finds "
                              f"{len(expected[0])}; nothing of it is kept")
        if not len(boxes):
            continue
        overlaps, partner = (box_iou(boxes, expected[0]) * (labels[:, None] == expected[2])).max(dim=1)
        same, last = overlaps >= _SAME_BOX, expected[1].min() + LIMIT * expected[1].max()
        if bool((~same & (scores > last)).any()):  # of those with nearly the lowest score any may be the last that is given
            raise ExportError(f"{config.MODEL.NAME} as onnxruntime computes it finds other objects than the model; nothing of it is kept")
        if not bool(same.any()):
            continue
        worst = max(worst, _within(config, difference(scores[same], expected[1][partner[same]])))
        for found, mask in zip(masks, expected[3:], strict=True):
            _within(config, difference(found[same], mask[partner[same]]) / 10)  # probabilities in a box that rounding has moved
        objects += int(same.sum())
    if not objects:
        return "onnxruntime runs it; on the noise that it was checked with model and export find nothing"
    return f"checked by onnxruntime on {objects} objects found in noise, largest difference {worst:.1e} of the highest score"


def _within(config: CfgNode, found: float) -> float:
    if not found <= LIMIT:  # nor NaN
        raise ExportError(f"{config.MODEL.NAME} as onnxruntime computes it differs by {found:.1e} of the largest value; nothing is kept")
    return found


def _told() -> str:
    return ", ".join(map(str, _CHECKED[:-1])) + f" and {_CHECKED[-1]}"
