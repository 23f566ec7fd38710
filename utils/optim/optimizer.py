"""Optimizer, learning rate and loss."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.optim import kron
from torch import nn
from yacs.config import CfgNode

from config import ConfigError
from data.messages import Notice
from models.dense import BACKBONE
from models.weights import classifier_prefixes
from utils.optim.freeze import matching_names

# What the optimizer names of NVIDIA apex stand for here, and the torch form that replaces each.
_APEX = {"fused_adam": ("FusedAdam", "adamw"), "fusedadam": ("FusedAdam", "adamw"), "fused_adamw": ("FusedAdam", "adamw"),
         "fused_sgd": ("FusedSGD", "sgd"), "fusedsgd": ("FusedSGD", "sgd"), "fused_lamb": ("FusedLAMB", "lamb"),
         "fusedlamb": ("FusedLAMB", "lamb")}


def apex_class(name: str) -> type | None:
    """NVIDIA apex's fused optimizer of that name; None where that apex is absent.

    The package index holds another project called apex, so a class is asked for, not the package.
    """
    if name.lower() not in _APEX:
        return None
    try:
        import apex.optimizers
        return getattr(apex.optimizers, _APEX[name.lower()][0])
    except (ImportError, AttributeError):
        return None


def apex_notices(config: CfgNode) -> list[str]:
    """A line for each thing asked of apex that torch does instead."""
    lines, name = [], config.TRAIN.OPTIMIZER.NAME.lower()
    if name in _APEX and apex_class(name) is None:
        lines.append(Notice(f"NVIDIA apex is not installed; {_APEX[name][1]} of torch takes the place of {name}"))
    if config.FUSED_LAYERNORM:
        try:
            from apex.normalization import FusedLayerNorm  # noqa: F401
        except ImportError:
            lines.append(Notice("NVIDIA apex is not installed; torch's layer norm takes the place of FUSED_LAYERNORM"))
    return lines


def check_optimizer(config: CfgNode) -> None:
    """Raise ``ConfigError`` unless ``TRAIN.OPTIMIZER.NAME`` is known to torch through timm, or apex's."""
    name, known = config.TRAIN.OPTIMIZER.NAME.lower(), timm.optim.list_optimizers()
    if name == "adahessian":
        raise ConfigError("TRAIN.OPTIMIZER.NAME is adahessian, which needs second derivatives; this trainer computes first ones only")
    if name not in known and name not in _APEX:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ConfigError(f"TRAIN.OPTIMIZER.NAME is {name!r}, which timm does not know"
                          + (f"; did you mean {', '.join(near)}?" if near else "; adamw and sgd are the usual ones"))


def parameter_groups(config: CfgNode, model: nn.Module) -> list[dict]:
    """timm's groups: no decay on 1-D parameters, biases, what the model names and TRAIN.NO_DECAY; ``lr_scale`` under layer decay and of
    a dense model's backbone; of a hybrid such as Muon ``use_fallback`` on what it leaves to AdamW.

    Raises:
        ConfigError: TRAIN.NO_DECAY fits no parameter, or TRAIN.BACKBONE_LR is set and the model has no part of that name.
    """
    train, backbone = config.TRAIN, getattr(model, "backbone", None)
    if train.BACKBONE_LR < 1 and not isinstance(backbone, nn.Module):
        raise ConfigError(f"TRAIN.BACKBONE_LR is {train.BACKBONE_LR:g}, but {config.MODEL.NAME} has no part called backbone, as the models "
                          "of dense tasks have; leave it at 1 (TRAIN.LAYER_DECAY lowers the rates of a classifier's layers)")
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    exempt |= matching_names(config, "TRAIN.NO_DECAY", [name for name, _ in model.named_parameters()])
    common = dict(weight_decay=train.WEIGHT_DECAY, fallback_list=fallback_list(config, model), no_weight_decay_list=exempt)
    if train.LAYER_DECAY < 1:
        groups = timm.optim.param_groups_layer_decay(model, layer_decay=train.LAYER_DECAY, **common)
    else:
        groups = timm.optim.param_groups_weight_decay(model, **common)
    return _slowed(groups, backbone, train.BACKBONE_LR) if train.BACKBONE_LR < 1 else groups


def _slowed(groups: list[dict], part: nn.Module, factor: float) -> list[dict]:
    """``groups`` with the parameters of ``part`` apart, at ``factor`` times the rates that they had."""
    own, parted = {id(p) for p in part.parameters()}, []
    for group in groups:
        for inside, scale in ((True, factor), (False, 1.0)):
            if chosen := [p for p in group["params"] if (id(p) in own) == inside]:
                parted.append({**group, "params": chosen, "lr_scale": scale * group.get("lr_scale", 1.0)})
    return parted


def layer_rates(optimizer: torch.optim.Optimizer, model: nn.Module, peak: float) -> list[str]:
    """A line for each rate where there are several, lowest first: ``learning rate 1.2e-05 (x 0.024): patch_embed, pos_embed``."""
    names, scales = {id(p): name for name, p in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        scales.setdefault(group.get("lr_scale", 1.0), []).extend(names[id(p)] for p in group["params"])
    if len(scales) < 2:
        return []
    parts = {scale: {name.split(".")[0] for name in of_scale} for scale, of_scale in scales.items()}
    if len(set().union(*parts.values())) < sum(map(len, parts.values())):  # parts of several rates: their layers
        parts = {scale: {re.match(_LAYER, name.removeprefix(BACKBONE))[0] for name in of_scale} for scale, of_scale in scales.items()}
    return [f"learning rate {peak * scale:.3g} (x {scale:.3g}): {', '.join(sorted(of_scale, key=_by_number))}"
            for scale, of_scale in sorted(parts.items())]


_LAYER = r".*?\bblocks\.\d+|\w+\.\d+|\w+"  # of a parameter's name: layers.2.blocks.0, block1.0 or patch_embed


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    return [(not word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in name.split(".")]


def _is_hybrid(name: str) -> bool:
    """Whether timm's optimizer of that name treats matrices in one way and all other parameters in another."""
    return name.lower() in timm.optim.list_optimizers("*muon*")


def fallback_list(config: CfgNode, model: nn.Module) -> list[str]:
    """Parameters, or patterns of their names, that Muon leaves to AdamW beside the 1-D ones, as its author advises.

    Muon is for matrices that map hidden features to hidden features: not for what embeds the image (convolutions on pixels and patch
    embeddings), tables and tokens, which no layer multiplies by, nor the classifier. TRAIN.OPTIMIZER.ARGS may name others.
    """
    if not _is_hybrid(config.TRAIN.OPTIMIZER.NAME):
        return []
    if "fallback_list" in config.TRAIN.OPTIMIZER.ARGS:
        return config.TRAIN.OPTIMIZER.ARGS["fallback_list"]
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    ends = tuple(f"{name}." for name in (*((first,) if isinstance(first, str) else first), *classifier_prefixes(model)))
    matrices = {id(p) for module in model.modules() for p in module.parameters(recurse=False)
                if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention))}
    return [name for name, p in model.named_parameters() if id(p) not in matrices or name.startswith(ends) or "patch_embed" in name]


def build_optimizer(config: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``TRAIN.OPTIMIZER`` over ``model``'s parameters, in its fused form where torch has one.

    The learning rate is set before every step (``Schedule``); the groups start with ``TRAIN.BASE_LR``.

    Raises:
        ConfigError: an unknown name, or arguments that it does not take.
    """
    check_optimizer(config)
    options = config.TRAIN.OPTIMIZER
    name = options.NAME.lower()
    fused = apex_class(name)
    if fused is not None:
        groups, given = parameter_groups(config, model), dict(options.ARGS)
        if name in ("fused_sgd", "fusedsgd"):
            return fused(groups, lr=config.TRAIN.BASE_LR, **dict(momentum=options.MOMENTUM, nesterov=True) | given)
        usual = dict(eps=options.EPS or 1e-8, betas=tuple(options.BETAS or (0.9, 0.999))[:2])
        return fused(groups, lr=config.TRAIN.BASE_LR, **usual | given)
    name = _APEX[name][1] if name in _APEX else name
    try:
        device = next(model.parameters()).device
        arguments = _arguments(config, name, device)
        create = functools.partial(timm.optim.create_optimizer_v2, opt=name, lr=config.TRAIN.BASE_LR,
                                   weight_decay=config.TRAIN.WEIGHT_DECAY, **arguments)
        if options.ARGS:
            _take_a_step(create, device)
        optimizer = create(parameter_groups(config, model))
    except ConfigError:
        raise
    except (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        wrong = " with TRAIN.OPTIMIZER.ARGS" if options.ARGS else ""
        raise ConfigError(f"TRAIN.OPTIMIZER.NAME {name} cannot be made here{wrong} ({reason}); adamw and sgd always can") from None
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("fused") and optimizer.defaults["momentum"]:
        # Left to itself torch allocates them in the first step, and leaves them as they are found where that step is skipped.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    if isinstance(optimizer, kron.Kron):
        _run_as_written(optimizer)
    return optimizer


_OTHER_KEYS = {"lr": "TRAIN.BASE_LR", "weight_decay": "TRAIN.WEIGHT_DECAY", "params": "TRAIN.FREEZE", "layer_decay": "TRAIN.LAYER_DECAY"}


def _arguments(config: CfgNode, name: str, device: torch.device) -> dict[str, Any]:
    """What timm is given for the optimizer ``name`` beside groups, rate and decay.

    Raises:
        ConfigError: TRAIN.OPTIMIZER.ARGS holds what the optimizer does not take, or what another key says.
    """
    options = config.TRAIN.OPTIMIZER
    kind = timm.optim.get_optimizer_class(name, bind_defaults=False)
    accepted = inspect.signature(kind).parameters
    extra: dict[str, Any] = dict(momentum=options.MOMENTUM)
    if options.BETAS is not None and "betas" in accepted:
        extra["betas"] = tuple(options.BETAS)
    if options.EPS is not None and "eps" in accepted:
        extra["eps"] = options.EPS
    if "fused" in accepted and device.type in ("cpu", "cuda") and has_fused_form(kind, device):
        extra["fused"] = True
    if "deterministic" in accepted:
        extra["deterministic"] = True  # Kron's noise: alike on all processes, and after a restart
    for key, value in options.ARGS.items():
        if key == "fallback_list" and _is_hybrid(name):
            continue  # of parameter_groups
        if key in _OTHER_KEYS:
            raise ConfigError(f"TRAIN.OPTIMIZER.ARGS: {key} is the key {_OTHER_KEYS[key]}")
        if key not in accepted:
            known = sorted({*accepted} - {*_OTHER_KEYS} | ({"fallback_list"} if _is_hybrid(name) else set()))
            raise ConfigError(f"TRAIN.OPTIMIZER.ARGS: {name} takes no {key}; it takes {', '.join(known)}")
        extra[key] = tuple(value) if isinstance(value, list) else value
    if "nesterov" in accepted and not extra["momentum"]:
        extra["nesterov"] = False  # which needs a momentum
    return extra


@functools.cache
def has_fused_form(kind: type[torch.optim.Optimizer], device: torch.device) -> bool:
    """Whether torch's optimizer ``kind`` has a fused form on ``device``. Some accept ``fused=True`` and refuse it in their first step
    (Adagrad on CUDA, up to torch 2.11 at least), so one is taken, of a single number."""
    number = nn.Parameter(torch.zeros(1, device=device))
    number.grad = torch.zeros_like(number)
    try:
        kind([number], lr=0.1, fused=True).step()
    except RuntimeError:
        return False
    return True


def _take_a_step(create: Callable[..., torch.optim.Optimizer], device: torch.device) -> None:
    """Raise what the optimizer raises for its arguments, some of which it looks at in its first step only."""
    matrix = nn.Parameter(torch.eye(8, device=device))
    matrix.grad = torch.eye(8, device=device)
    optimizer = create([matrix])
    if not isinstance(optimizer, kron.Kron):
        optimizer.step()


def _run_as_written(optimizer: kron.Kron) -> None:
    """Let Kron compute as it is written: it has torch.compile make a program for every shape of a parameter, minutes on a CPU.

    Raises:
        ConfigError: without opt_einsum its products of many factors take gigabytes for the smallest models.
    """
    if not kron.has_opt_einsum:
        raise ConfigError("TRAIN.OPTIMIZER.NAME kron needs the package opt_einsum, which is not installed here; pip install opt_einsum")
    for name in ("_calc_A_and_conjB", "_q_terms", "_precond_grad", "_balance_Q"):
        setattr(optimizer, name, getattr(kron, name))


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``found_inf``, a flag on the device, has the optimizer leave a step out: torch's fused ones read it."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)) and bool(optimizer.defaults.get("fused"))
