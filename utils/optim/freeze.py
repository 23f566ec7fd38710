"""Training a part of a model: parameters that stay as they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn
from yacs.config import CfgNode

from config import ConfigError, lookup
from models.weights import classifier_prefixes


def matching_names(config: CfgNode, key: str, names: Sequence[str]) -> set[str]:
    """Those of a model's parameters ``names`` that the patterns under ``key`` fit: whole names, or the parts before a dot.

    Raises:
        ConfigError: a pattern fits none.
    """
    found: set[str] = set()
    for pattern in lookup(config, key):
        matched = {name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern + ".")}
        if not matched:
            raise ConfigError(f"{key}: {pattern!r} fits no parameter of {config.MODEL.NAME}; its names begin with "
                              f"{', '.join(dict.fromkeys(name.split('.')[0] for name in names))}")
        found |= matched
    return found


def freeze(model: nn.Module, config: CfgNode) -> list[nn.Module]:
    """Fix what ``TRAIN.FREEZE`` and ``TRAIN.LINEAR_PROBE`` name.

    Returns:
        The modules that hold nothing but fixed parameters; kept in evaluation mode they neither drop anything nor move
        batch-norm statistics.

    Raises:
        ConfigError: a pattern fits no parameter, or nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = matching_names(config, "TRAIN.FREEZE", names)
    if config.TRAIN.LINEAR_PROBE:
        heads = tuple(prefix + "." for prefix in classifier_prefixes(model))
        frozen |= {name for name in names if not name.startswith(heads)}
    if len(frozen) == len(names):
        raise ConfigError(f"TRAIN.FREEZE leaves nothing of {config.MODEL.NAME} to train")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if config.TRAIN.LINEAR_PROBE:
        heads = classifier_prefixes(model)
        return [module for name, module in model.named_modules() if name and not any(
            name == head or name.startswith(head + ".") or head.startswith(name + ".") for head in heads)]
    return [module for module in model.modules()
            if (own := list(module.parameters())) and not any(p.requires_grad for p in own)]
