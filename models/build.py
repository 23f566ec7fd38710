"""``build_model``: from ``MODEL.TYPE`` to the family's model."""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import psutil
import timm
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from config import ConfigError, image_size, input_channels
from models import cpu_bf16, crossformer, cvt, galerkin, mpvit, pvt, pvt_v2, shunted, swin, swin_mlp, swinv2
from models.base import HierarchicalModel
from models.dense import BACKBONE, DenseModel
from models.safe_load import CheckpointError
from models.weights import (
    FilterFn,
    LoadReport,
    check_fits,
    classifier_prefixes,
    fit_pretrained,
    load_pretrained_file,
    read_class_map,
    read_names,
    read_state_dict,
)

# A family's module gives VARIANTS (name -> arguments), build(name, arguments, img_size), checkpoint_filter_fn, NODE_KEYS (config key
# -> argument, which arguments() may adjust), ONLY (keys that take one value) and REQUIRED, the numbers without which a name of one's
# own is no model.
_FAMILIES: dict[str, ModuleType] = {
    "crossformer": crossformer, "swin": swin, "swinv2": swinv2, "swin_mlp": swin_mlp, "cvt": cvt, "shunted": shunted, "mpvit": mpvit,
    "pvt": pvt, "pvt_v2": pvt_v2, "galerkin": galerkin}


def variants(family: str) -> list[str]:
    """Names that ``MODEL.NAME`` can take for a family with a table of its own."""
    return sorted(_FAMILIES[family].VARIANTS)


# Arguments of timm's Swins without which they take one size. Their windows stay whole and shifted in every stage, as in Swin's
# detectors: laid out for 224 pixels the last stage's would cover its map, and never shift.
_ANY_SIZE = dict(strict_img_size=False, always_partition=True)


def build_model(config: CfgNode, num_classes: int | None = None, any_size: bool = False) -> nn.Module:
    """The model that ``config.MODEL`` describes, with fresh weights, on the CPU.

    Args:
        num_classes: outputs of the classifier; None takes ``MODEL.NUM_CLASSES``, or 1000 where that is 0.
        any_size: for images of other sizes than ``DATA.IMG_SIZE``, and of several, as in dense tasks. Ours take them anyway.

    Raises:
        ConfigError: an unknown name, or numbers that make no model.
    """
    classes = num_classes if num_classes is not None else config.MODEL.NUM_CLASSES or 1000
    common = dict(num_classes=classes, drop_rate=config.MODEL.DROP_RATE, drop_path_rate=config.MODEL.DROP_PATH_RATE)
    if any_size and config.MODEL.TYPE in ("swin", "swinv2", "timm"):
        common |= _ANY_SIZE
    if config.MODEL.TYPE == "timm":
        model, _ = _create_timm(config, common)
    else:
        model = _build_family(config, common)
    if config.TRAIN.USE_CHECKPOINT:
        _checkpoint_activations(model, config)
    if config.FUSED_LAYERNORM:
        _fuse_layer_norms(model)
    return swin.attend_in_place(cpu_bf16.replace_layers(model))


def _checkpoint_activations(model: nn.Module, config: CfgNode) -> None:
    unit = config.TRAIN.CHECKPOINT_UNIT
    if isinstance(model, HierarchicalModel):
        model.set_grad_checkpointing(True, unit)
        return
    if unit != "block":
        raise ConfigError(f"TRAIN.CHECKPOINT_UNIT is {unit}, but {config.MODEL.NAME} is timm's own model and only knows its blocks; "
                          "set it to block")
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ConfigError(f"TRAIN.USE_CHECKPOINT is True, but {config.MODEL.NAME} cannot checkpoint activations; "
                          "set it to False") from None


def _filter_fn(model: nn.Module, config: CfgNode) -> FilterFn | None:
    """What turns published names and sizes into the model's own: the family's, or that of the timm model's file."""
    home: Any = _FAMILIES.get(config.MODEL.TYPE) or sys.modules.get(type(model).__module__)
    return getattr(home, "checkpoint_filter_fn", None)


# timm's names of the weights that `--pretrained hub` fetches for the families that are timm's.
_HUB = {"swin_tiny": "swin_tiny_patch4_window7_224", "swin_small": "swin_small_patch4_window7_224",
        "swin_base": "swin_base_patch4_window7_224", "swin_base_384": "swin_base_patch4_window12_384",
        "swin_large": "swin_large_patch4_window7_224"}


def load_pretrained(model: nn.Module, path: str, config: CfgNode) -> LoadReport:
    """Start ``model`` from a file of weights, or with ``hub`` from timm's own, by the rules of its family.

    A model of a dense task starts whole from a checkpoint of such a model, whatever its classes, else its backbone from a classifier's.

    Raises:
        CheckpointError: unreadable, unsafe or other weights, or the hub cannot be reached.
        ConfigError: ``hub`` for a model that timm has no weights of.
    """
    if isinstance(model, DenseModel):
        return _load_dense(model, path, config)
    filter_fn = _filter_fn(model, config)
    class_map = read_class_map(config.MODEL.CLASS_MAP) if config.MODEL.CLASS_MAP else None
    if path == "hub":
        return fit_pretrained(model, _hub_weights(config), "hub", filter_fn, class_map)
    return load_pretrained_file(model, path, filter_fn, class_map)


def _load_dense(model: DenseModel, path: str, config: CfgNode) -> LoadReport:
    """``load_pretrained`` of a model of a dense task."""
    source = _hub_weights(config) if path == "hub" else read_state_dict(path)
    if _head_names(source, model) == _head_names(model.state_dict(), model):
        return fit_pretrained(model, source, path)
    # As a classifier of its own, so that all ways to save one are understood; of another head's checkpoint the backbone is found too.
    classifier = build_model(config, 0, any_size=True)
    report = fit_pretrained(classifier, source, path, _filter_fn(classifier, config))
    own, backbone = classifier.state_dict(), model.backbone.model
    backbone.load_state_dict({name: own[name] for name in backbone.state_dict()})
    report.kept = [f"{BACKBONE}{name}" for name in report.kept if name in backbone.state_dict()]
    report.fresh = sorted({".".join(name.split(".")[:2]) if name.startswith("backbone.") else name.split(".")[0]
                           for name in model.state_dict() if not name.startswith(BACKBONE)})
    return report


def _head_names(names: Iterable[str], model: DenseModel) -> set[str]:
    """Those beside the backbone, and beside what hangs on the classes."""
    return {name for name in names if not name.startswith((BACKBONE, *(f"{module}." for module in model.class_modules)))}


def _hub_weights(config: CfgNode) -> dict[str, Tensor]:
    name = _HUB.get(config.MODEL.NAME, config.MODEL.NAME)
    described = timm.get_pretrained_cfg(name) if timm.is_model(name) and config.MODEL.TYPE in ("timm", "swin", "swinv2", "pvt_v2") else None
    if described is None or not described.has_weights:
        raise ConfigError(f"MODEL.PRETRAINED is hub, but timm has no weights of {config.MODEL.NAME}; give a file")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, a line each
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub's client raises many kinds when it cannot reach its server
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"timm's weights of {name} cannot be fetched from the hub here ({reason}); download them where there is "
                              "a network and give the file with --pretrained FILE") from None


def load_state(model: nn.Module, state: dict[str, Tensor], config: CfgNode, path: str) -> None:
    """Load weights that must fit ``model`` entirely, ours or published ones (whose names the family translates)."""
    own = model.state_dict()
    if isinstance(model, DenseModel):
        if not any(name.startswith(BACKBONE) for name in state):
            raise CheckpointError(f"{path}: holds a backbone at most and no head of TASK {config.TASK}, so it can be trained from "
                                  f"(--pretrained {path}) but not evaluated or predicted with")
        check_fits(model, state, path)
        model.load_state_dict(state)
        return
    if state.keys() != own.keys() or any(own[n].shape != state[n].shape for n in own):
        reading = read_names(state, model, path, _filter_fn(model, config))
        if reading.fresh and not reading.misfits[0]:
            raise CheckpointError(f"{path}: holds no classifier ({reading.fresh[0]}), so it can be trained from (--pretrained {path}) but "
                                  "not evaluated or predicted with")
        state = reading.state
    check_fits(model, state, path)
    model.load_state_dict(state)


def classifier_rows(model: nn.Module, state: dict[str, Tensor], config: CfgNode, path: str) -> int:
    """Classes that published weights for ``model`` tell apart, whatever the model's own number; 0 where they hold no classifier."""
    state = read_names(state, model, path, _filter_fn(model, config)).state
    own, heads = model.state_dict(), tuple(head + "." for head in classifier_prefixes(model))
    rows = [len(state[name]) for name in own if name.startswith(heads) and name in state and own[name].ndim]
    return rows[-1] if rows else 0


def architecture(config: CfgNode, num_classes: int) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of which ``timm.create_model`` makes ``build_model``'s model; rates of training are left out.

    The name is always one that timm knows once this package was imported: a label of the config's own becomes a variant of
    its family with every number given. The arguments are plain values.
    """
    name, kind = config.MODEL.NAME, config.MODEL.TYPE
    if kind == "timm":
        _, arguments = _create_timm(config, dict(num_classes=num_classes))
        return name.partition(".")[0], _plain(arguments)
    family = _FAMILIES[kind]
    with torch.device("meta"):  # only its class is asked for
        parameters = inspect.signature(type(build_model(config, num_classes)).__init__).parameters
    arguments = _node_arguments(family, config)
    if name not in family.VARIANTS:
        name = next(iter(family.VARIANTS))
        arguments = {key: parameters[key].default for key in family.VARIANTS[name] if key in parameters} | arguments
    elif not timm.is_model(name):  # timm's Swin bears other names
        arguments = family.VARIANTS[name] | arguments
    if "img_size" in parameters:
        arguments["img_size"] = image_size(config)
    arguments = {key: value for key, value in arguments.items() if value is not None and key not in ("drop_rate", "drop_path_rate")}
    return _HUB.get(name, name), _plain(dict(arguments, num_classes=num_classes))


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}


def check_input_size(model: nn.Module, config: CfgNode) -> None:
    """Raise ``ConfigError`` unless the model takes images of ``DATA.IMG_SIZE``.

    A copy without storage runs one image, which costs next to nothing; only if that fails (some layers do not trace so)
    is the model itself tried.
    """
    (height, width), channels = image_size(config), input_channels(config)
    memo = {id(t): torch.nn.Parameter(torch.empty_like(t, device="meta"), requires_grad=False) for t in model.parameters()}
    memo |= {id(t): torch.empty_like(t, device="meta") for t in model.buffers()}
    try:
        copy.deepcopy(model, memo).eval()(torch.empty(1, channels, height, width, device="meta"))
        return
    except Exception:  # whatever a model raises, the real one decides
        pass
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, channels, height, width))
    except (RuntimeError, ValueError, ArithmeticError, AssertionError, TypeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(f"MODEL.NAME {config.MODEL.NAME} does not take images of {height} x {width} ({reason}); "
                          "change DATA.IMG_SIZE (--img-size)") from None
    finally:
        model.train(training)


def _build_family(config: CfgNode, common: dict[str, Any]) -> nn.Module:
    family, name, node = _FAMILIES[config.MODEL.TYPE], config.MODEL.NAME, config.MODEL[config.MODEL.TYPE.upper()]
    key = f"MODEL.{config.MODEL.TYPE.upper()}"
    for leaf, accepted in family.ONLY.items():
        if node[leaf] is not None and node[leaf] != accepted:
            raise ConfigError(f"{key}.{leaf} is {node[leaf]}; only {accepted} is supported here, no published model uses another")
    from_node = _node_arguments(family, config)
    if name not in family.VARIANTS:
        # A label, as in the repositories' files: the node's numbers make the model.
        missing = [f"{key}.{leaf}" for leaf in family.REQUIRED if node[leaf] is None]
        if missing:
            near = difflib.get_close_matches(name, family.VARIANTS, n=1)
            raise ConfigError(f"MODEL.NAME {name!r} is no {config.MODEL.TYPE} variant ({', '.join(sorted(family.VARIANTS))})"
                              + (f"; did you mean {near[0]}?" if near else "")
                              + f"; a name of your own needs {', '.join(missing)}")
    build = partial(family.build, name, dict(family.VARIANTS.get(name, {}), **from_node, **common), image_size(config))
    if from_node or max(image_size(config)) > LARGE_IMAGE:
        leaves = {argument: f"{key}.{leaf}" for leaf, argument in family.NODE_KEYS.items()}
        _require_possible(build, name, leaves)
    return build()


LARGE_IMAGE = 1024  # pixels a side; for larger ones the tables of positions may not fit into memory


def _require_possible(build: Callable[[], nn.Module], name: str, keys: dict[str, str]) -> None:
    """Try numbers of the user's own on tensors without storage, before memory is taken for them.

    Args:
        keys: config key of each argument, for the message.

    Raises:
        ConfigError: they make no model, or one that is larger than this machine's memory.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = build()
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["these sizes make no model"])[0]
        named = re.sub(rf"\b({'|'.join(keys)})\b", lambda found: keys[found[0]], reason)
        raise ConfigError(f"MODEL.NAME {name}: {named}") from None
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(f"MODEL.NAME {name}: its weights take {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB of memory are free; "
                          "give smaller numbers, or a smaller DATA.IMG_SIZE")


def _node_arguments(family: ModuleType, config: CfgNode) -> dict[str, Any]:
    """The model's arguments that the family's config node sets."""
    node = config.MODEL[config.MODEL.TYPE.upper()]
    arguments = {argument: node[key] for key, argument in family.NODE_KEYS.items() if node[key] is not None}
    if input_channels(config) != 3:
        arguments["in_chans"] = input_channels(config)
    return family.arguments(arguments) if hasattr(family, "arguments") else arguments


def _create_timm(config: CfgNode, common: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model, and those of the arguments that it takes."""
    name = config.MODEL.NAME
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ConfigError(f"MODEL.NAME {name!r} is no model of timm {timm.__version__}"
                          + (f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() names them"))
    size, kept = image_size(config), dict(num_classes=common["num_classes"])
    if input_channels(config) != 3:
        common, kept = dict(common, in_chans=input_channels(config)), dict(kept, in_chans=input_channels(config))
    sized = common
    common = {key: value for key, value in common.items() if key not in _ANY_SIZE}
    attempts: list[dict[str, Any]] = [dict(sized, img_size=size), dict(common, img_size=size), common,
                                      {k: v for k, v in common.items() if k != "drop_path_rate"}, kept]
    # Some models take no img_size (any size works), some no drop path; timm says so by TypeError only.
    for kwargs in attempts:
        try:
            return timm.create_model(name, pretrained=False, **kwargs), kwargs
        except TypeError as error:
            if "unexpected keyword" not in str(error) and "got multiple values" not in str(error):
                raise
        except (ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"MODEL.NAME {name} cannot be built for DATA.IMG_SIZE {config.DATA.IMG_SIZE}: {error}") from None
    raise ConfigError(f"MODEL.NAME {name} takes none of the usual arguments of a timm classifier; choose another model")


def _fuse_layer_norms(model: nn.Module) -> None:
    """Swap layer norms for NVIDIA apex's when that apex is installed; names and weights stay."""
    try:
        from apex.normalization import FusedLayerNorm
    except ImportError:
        return  # main.py has told the user (utils.optim.apex_notices)
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if type(child) in (nn.LayerNorm, cpu_bf16.LayerNorm, cpu_bf16.LayerNormForProducts):
                fused = FusedLayerNorm(child.normalized_shape, eps=child.eps, elementwise_affine=child.elementwise_affine)
                fused.load_state_dict(child.state_dict())
                setattr(module, child_name, fused)
