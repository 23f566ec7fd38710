"""Optimizer, learning rate and loss."""

from __future__ import annotations

import difflib
import inspect

import timm.optim
import torch
from torch import nn
from yacs.config import CfgNode

from config import ConfigError
from data.messages import Notice

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
    """timm's groups: no decay on 1-D parameters, biases and what the model names; ``lr_scale`` under layer decay."""
    skip = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if config.TRAIN.LAYER_DECAY < 1:
        return timm.optim.param_groups_layer_decay(
            model, config.TRAIN.WEIGHT_DECAY, no_weight_decay_list=skip, layer_decay=config.TRAIN.LAYER_DECAY)
    return timm.optim.param_groups_weight_decay(model, config.TRAIN.WEIGHT_DECAY, no_weight_decay_list=skip)


def build_optimizer(config: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``TRAIN.OPTIMIZER`` over ``model``'s parameters, in its fused form where torch has one.

    The learning rate is set before every step (``Schedule``); the groups start with ``TRAIN.BASE_LR``.

    Raises:
        ConfigError: an unknown name.
    """
    check_optimizer(config)
    options, groups = config.TRAIN.OPTIMIZER, parameter_groups(config, model)
    name = options.NAME.lower()
    fused = apex_class(name)
    if fused is not None:
        if name in ("fused_sgd", "fusedsgd"):
            return fused(groups, lr=config.TRAIN.BASE_LR, momentum=options.MOMENTUM, nesterov=True)
        return fused(groups, lr=config.TRAIN.BASE_LR, eps=options.EPS or 1e-8, betas=tuple(options.BETAS or (0.9, 0.999))[:2])
    name = _APEX[name][1] if name in _APEX else name
    try:
        accepted = inspect.signature(timm.optim.get_optimizer_class(name, bind_defaults=False)).parameters
        extra: dict = {}
        if options.BETAS is not None and "betas" in accepted:
            extra["betas"] = tuple(options.BETAS)
        if options.EPS is not None and "eps" in accepted:
            extra["eps"] = options.EPS
        if "fused" in accepted and next(model.parameters()).device.type in ("cpu", "cuda"):
            extra["fused"] = True
        if "nesterov" in accepted and not options.MOMENTUM:
            extra["nesterov"] = False  # which needs a momentum
        optimizer = timm.optim.create_optimizer_v2(groups, opt=name, lr=config.TRAIN.BASE_LR, weight_decay=config.TRAIN.WEIGHT_DECAY,
                                                   momentum=options.MOMENTUM, **extra)
    except (AssertionError, ImportError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise ConfigError(f"TRAIN.OPTIMIZER.NAME {name} cannot be made here ({reason}); adamw and sgd always can") from None
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults.get("fused") and options.MOMENTUM:
        # Left to itself torch allocates them in the first step, and leaves them as they are found where that step is skipped.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``found_inf``, a flag on the device, has the optimizer leave a step out: torch's fused ones read it."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)) and bool(optimizer.defaults.get("fused"))
