"""A model that --export wrote for timm, read again: its config.json says what a checkpoint would."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from yacs.config import CfgNode

from config import KEYS, RECIPE, lookup
from models.safe_load import FORMAT_KEY, CheckpointError, read_file, weights_file
from utils.checkpoints.file_format import FORMAT, is_own, require_own

_OF_THE_TASK = ("thresholds",)  # what Task.facts tells and Task.load_state_dict takes back
OWN = "recipe"  # key of config.json for what timm has no word for
_FILES_OF_THIS_MACHINE = ("DATA.VAL_PATH", "DATA.VAL_LABELS", "DATA.CLASS_NAMES", "MODEL.CLASS_MAP",
                          "TRAIN.DISTILLATION.TEACHER", "TRAIN.DISTILLATION.WEIGHTS")


def recipe_of(config: CfgNode, step: int | None) -> dict[str, Any]:
    """What stands under ``OWN``: the recipe's values that are not the defaults, without any path, and the step of the weights."""
    values = {key.name: lookup(config, key.name) for key in KEYS if key.scope == RECIPE and key.name not in _FILES_OF_THIS_MACHINE
              and lookup(config, key.name) != key.kind(key.default)}
    return {FORMAT_KEY: FORMAT, "step": step, "config": values}


def read_trained(path: str) -> Any:
    """The content of a file of weights, or of a folder with one; of an export as of a checkpoint that keeps no training state.

    Raises:
        CheckpointError: as ``read_file`` and ``require_own``, or the export's config.json is damaged.
    """
    content = read_file(path)
    if is_own(content):
        return require_own(content, path)
    beside = os.path.join(os.path.dirname(weights_file(path)), "config.json")
    if not weights_file(path).endswith(".safetensors") or not os.path.isfile(beside):
        return content
    try:
        with open(beside, encoding="utf-8") as file:
            described = json.load(file)
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{beside}: damaged, it says nothing of the weights beside it; use another export") from None
    if not isinstance(described, Mapping) or OWN not in described:
        return content  # somebody else's
    own, classes = described[OWN], described.get("label_names")
    if not (isinstance(own, Mapping) and isinstance(own.get(FORMAT_KEY), int) and isinstance(own.get("config"), Mapping)
            and isinstance(own.get("step"), int | None) and isinstance(classes, Sequence) and all(isinstance(c, str) for c in classes)):
        raise CheckpointError(f"{beside}: damaged, it says nothing of the weights beside it; use another export")
    return {FORMAT_KEY: own[FORMAT_KEY], "config": _as_yaml(own["config"]), "classes": list(classes), "data_path": "", "model": content,
            "ema": {}, "step": own["step"] or 0, "best": {}, "task": {key: described[key] for key in _OF_THE_TASK if key in described}}


def _as_yaml(values: Mapping[str, Any]) -> str:
    """Dotted keys as a file of the config's tree has them."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, leaf = str(name).split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return yaml.safe_dump(tree)
