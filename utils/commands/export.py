"""``--export``: a trained model in the forms that other programs read, each checked against the model itself.

ONNX (FILE.onnx), torch.export (FILE.pt2), and the layout of timm and its hub (a folder, or FILE.safetensors with config.json beside
it). The batch size stays free, the image size is the config's. Each form carries the class names and what an image must go
through first. Models of dense tasks become ONNX alone (export_dense.py).
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, config_from_text, with_values
from data import preprocessing
from models import architecture
from utils.checkpoints.exported import OWN, recipe_of
from utils.commands.export_dense import write_dense_onnx
from utils.commands.outputs import check_outputs
from utils.inference.exporters import (
    LIMIT,
    ExportError,
    Normalised,
    difference,
    explained,
    onnx_runner,
    quiet_exporter,
    require_packages,
    trace,
    trace_onnx,
)
from utils.inference.trained_model import Trained, open_trained
from utils.runtime.files import TEMPORARY, move_file, open_atomically, replace_file
from utils.tasks.build import build_task
from utils.tasks.dense import DenseTask

_CHECKED = (1, 2, 5)  # batch sizes
_HUB_CONFIG = "config.json"

_FORMS = "give FILE.onnx, FILE.pt2, or a folder (ending in /) or FILE.safetensors for timm's layout"


def export_run(config: CfgNode, content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Write EXPORT.FILE.

    Raises:
        ConfigError: another suffix, a missing package, no weights, or a place that cannot be written; before anything is built.
        ExportError: the exporter fails, or what it wrote computes something else.
    """
    path = os.path.expanduser(config.EXPORT.FILE)
    write = _FORM[form_of(path)]
    check_outputs(config, _files(path))
    # Neither changes what is computed, and exporters know neither.
    config = config_from_text(config.dump(), ["TRAIN.USE_CHECKPOINT", "False", "FUSED_LAYERNORM", "False"])
    if write is _write_onnx:
        require_packages()
        _require_operator_set(config.EXPORT.OPSET)
    if write is _write_hub:
        _require_folder(path, config)
    task = build_task(config)
    trained = open_trained(task, config, content, "--export")
    config = trained.config
    model = trained.model.requires_grad_(False)
    if isinstance(task, DenseTask):
        logger.info(f"exporting {trained.line()}, {len(trained.classes)} classes")
        with torch.no_grad():
            logger.info(write_dense_onnx(config, trained, task, path))
        return
    if config.EXPORT.PREPROCESS:
        prepare = preprocessing(config)
        model = Normalised(model, prepare["mean"], prepare["std"]).eval()
    logger.info(f"exporting {trained.line()}, {len(trained.classes)} classes")
    with torch.no_grad():
        logger.info(write(config, trained, model, path))


def form_of(path: str) -> str:
    """onnx, pt2, safetensors or folder, by the suffix of ``path``.

    Raises:
        ConfigError: a suffix of something else.
    """
    suffix = os.path.splitext(path)[1].lower()
    if path.endswith(("/", os.sep)) or os.path.isdir(path) or not suffix:
        return "folder"
    if suffix[1:] not in _FORM:
        raise ConfigError(f"EXPORT.FILE is {path}, and {suffix} is no form that a model is exported in; {_FORMS}")
    return suffix[1:]


def _require_operator_set(asked: int, written: int | None = None) -> None:
    """Raise ``ConfigError`` for a set that the packages here do not know, or that the exporter has not ``written``."""
    from onnx.defs import onnx_opset_version
    if asked > onnx_opset_version() or written not in (None, asked):
        raise ConfigError(f"EXPORT.OPSET is {asked}, which the ONNX packages here cannot write; leave it out, the exporter speaks 18")


# --------------------------------------------------------------------------------------------------
# The forms
# --------------------------------------------------------------------------------------------------

def _write_onnx(config: CfgNode, trained: Trained, model: nn.Module, path: str) -> str:
    with explained(config, "torch.onnx"):
        program = trace_onnx(model, _example(config, 2), config.EXPORT.OPSET)
        _require_operator_set(config.EXPORT.OPSET, program.model.opset_imports[""])
        for node in program.model.graph:
            node.metadata_props.clear()  # where in whose sources it comes from
        program.model.metadata_props.update(_description(config, trained))
        with open_atomically(path) as file:
            program.save(file.name, external_data=False)
            worst = _largest_difference(config, model, onnx_runner(file.name), "onnxruntime")
    return f"wrote {path}: ONNX, operator set {config.EXPORT.OPSET}; {_facts(config, path)}; {_verdict(worst, 'onnxruntime')}"


def _write_pt2(config: CfgNode, trained: Trained, model: nn.Module, path: str) -> str:
    with explained(config, "torch.export"):
        program = trace(model, _example(config, 2))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        described = {f"{key}.json": text for key, text in _description(config, trained).items()}
        with open_atomically(path) as file:
            with quiet_exporter():
                torch.export.save(program, file, extra_files=described)
            file.flush()
            with open(file.name, "rb") as written, quiet_exporter():
                again = torch.export.load(written).module()
            worst = _largest_difference(config, model, again, "torch.export")
    return f"wrote {path}: torch.export; {_facts(config, path)}; {_verdict(worst, 'torch.export.load')}"


def _write_hub(config: CfgNode, trained: Trained, model: nn.Module, path: str) -> str:
    folder, file = _hub_place(path)
    name, arguments = architecture(config, len(trained.classes))
    os.makedirs(folder, exist_ok=True)
    # Modules may share a tensor, which the format does not know.
    state = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in model.state_dict().items()}
    content = json.dumps(_hub_config(config, trained, name, arguments), indent=2)
    with _removed_if_empty(folder), tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as scratch, explained(config, "timm"):
        replace_file(os.path.join(scratch, file), safetensors_bytes(state, dict(format="pt")))
        replace_file(os.path.join(scratch, _HUB_CONFIG), content.encode())
        again = timm.create_model(f"local-dir:{scratch}", pretrained=True).eval()
        worst = _largest_difference(config, model, again, "timm")
        for written in (file, _HUB_CONFIG):
            move_file(os.path.join(scratch, written), os.path.join(folder, written))
    return (f"wrote {os.path.join(folder, '')} ({file}, config.json): timm's {name}; {_facts(config, os.path.join(folder, file))}; "
            f"{_verdict(worst, 'timm')}")


_FORM: dict[str, Callable[[CfgNode, Trained, nn.Module, str], str]] = {
    "onnx": _write_onnx, "pt2": _write_pt2, "safetensors": _write_hub, "folder": _write_hub}


def _files(path: str) -> list[tuple[str, str]]:
    """(key, path) of what is written; the folder alone where there is none yet."""
    if _FORM[form_of(path)] is not _write_hub:
        return [("EXPORT.FILE", path)]
    folder, file = _hub_place(path)
    return [("EXPORT.FILE", os.path.join(folder, name) if os.path.isdir(folder) else folder)
            for name in ((file, _HUB_CONFIG) if os.path.isdir(folder) else (file,))]


def _hub_place(path: str) -> tuple[str, str]:
    """(folder, name of the weights in it)"""
    if form_of(path) == "folder":
        return path.rstrip("/" + os.sep) or path, "model.safetensors"
    return os.path.dirname(path) or ".", os.path.basename(path)


@contextlib.contextmanager
def _removed_if_empty(folder: str) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            os.rmdir(folder)


def _require_folder(path: str, config: CfgNode) -> None:
    if config.EXPORT.PREPROCESS:
        raise ConfigError("EXPORT.PREPROCESS is for FILE.onnx and FILE.pt2; timm's layout says in config.json how to normalise")
    folder, file = _hub_place(path)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"EXPORT.FILE is {path}; it is to be a folder, and {folder} is none; {_FORMS}")
    there = {os.path.basename(name) for name in glob.glob(os.path.join(glob.escape(folder), "*"))}
    others = {name for name in there - {file} if name.endswith(".safetensors") or (name == _HUB_CONFIG and file not in there)}
    if others:
        raise ConfigError(f"{folder}: holds {min(others)} of something else, and timm reads one model a folder; give a folder of its own")


def _hub_config(config: CfgNode, trained: Trained, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What timm keeps beside weights."""
    prepare, own = preprocessing(config), dict(getattr(trained.model, "pretrained_cfg", None) or {})
    known = ("fixed_input_size", "classifier", *(["first_conv"] if prepare["input_size"][0] == 3 else []))  # timm would adapt it again
    kept = {key: own[key] for key in known if own.get(key) not in (None, "")}
    window = dict(window=prepare.pop("window")) if "window" in prepare else {}  # timm knows no such field of pretrained_cfg
    interpolation = "bicubic" if prepare["interpolation"] == "random" else prepare["interpolation"]
    described = {label: words for label, words in zip(trained.classes, trained.descriptions, strict=True) if words}
    return dict(
        architecture=name, num_classes=len(trained.classes), num_features=getattr(trained.model, "num_features", None),
        model_args={key: value for key, value in arguments.items() if key != "num_classes"},  # transformers gives it itself
        label_names=trained.classes, **trained.facts, **window,
        **(dict(label_descriptions=described) if described else {}),
        pretrained_cfg=dict(kept, **dict(prepare, interpolation=interpolation), num_classes=len(trained.classes), custom_load=False),
        **{OWN: recipe_of(_pixels_as_evaluated(config, trained), trained.step)})


def _pixels_as_evaluated(config: CfgNode, trained: Trained) -> CfgNode:
    """Published weights are evaluated on Pillow's pixels; as an export they no longer count as published."""
    if not trained.published or config.DATA.DECODER in ("fast", "pillow"):
        return config
    return with_values(config, {"DATA.DECODER": "pillow"}, "export")


def _description(config: CfgNode, trained: Trained) -> dict[str, str]:
    """What ONNX and pt2 files carry beside the graph, as JSON texts."""
    prepare = preprocessing(config)
    resize = dict(squash="resize to the input's size, whatever the shape", border="resize until the whole image fits in, pad with the mean "
                  "colour").get(prepare["crop_mode"], "resize and crop")
    channels = prepare["input_size"][0]
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels") + f", (N, {channels}, H, W)"
    if config.EXPORT.PREPROCESS:
        steps = f"{resize}; the model takes uint8 pixels of 0 to 255 in {colours}, and normalises them itself"
    else:
        steps = f"{resize}, divide by 255, subtract mean, divide by std; {colours}, float32"
    if "window" in prepare:
        steps = f"images of more than 8 bits a channel: from {prepare['window']} to 0 and 255, clipped and rounded; {steps}"
    facts = dict(classes=trained.classes, preprocessing=dict(prepare, steps=steps), model=dict(name=config.MODEL.NAME, step=trained.step),
                 **trained.facts)
    if any(trained.descriptions):
        facts["descriptions"] = trained.descriptions
    return {key: json.dumps(value) for key, value in facts.items()}


# --------------------------------------------------------------------------------------------------
# Checking
# --------------------------------------------------------------------------------------------------

def _example(config: CfgNode, batch: int) -> Tensor:
    """Noise like images: uint8 pixels, or what normalisation makes of them."""
    channels, height, width = preprocessing(config)["input_size"]
    generator = torch.Generator().manual_seed(batch)
    if config.EXPORT.PREPROCESS:
        return torch.randint(0, 256, (batch, channels, height, width), generator=generator, dtype=torch.uint8)
    return torch.randn(batch, channels, height, width, generator=generator)


def _largest_difference(config: CfgNode, model: nn.Module, again: Callable[[Tensor], Tensor], what: str) -> float:
    """Over the largest logit, on batches of several sizes.

    Raises:
        ExportError: beyond what rounding explains.
    """
    worst = 0.0
    for batch in _CHECKED:
        images = _example(config, batch)
        expected = model(images)
        found = difference(again(images), expected)
        if not found <= LIMIT:  # nor NaN
            raise ExportError(f"{config.MODEL.NAME} as {what} computes it differs by {found:.1e} of the largest logit on a batch of "
                              f"{batch}; nothing of it is kept; another form may do")
        worst = max(worst, found)
    return worst


def _verdict(worst: float, by: str) -> str:
    sizes = ", ".join(map(str, _CHECKED[:-1])) + f" and {_CHECKED[-1]}"
    return f"checked by {by} on batches of {sizes}, largest difference {worst:.1e} of the largest logit"


def _facts(config: CfgNode, path: str) -> str:
    channels, height, width = preprocessing(config)["input_size"]
    kind = "pixels, uint8" if config.EXPORT.PREPROCESS else "normalised, float32"
    return f"{os.path.getsize(path) / 2**20:.1f} MiB; takes (N, {channels}, {height}, {width}), {kind}"
