"""The mean of several checkpoints' weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from config import FOUND_IN_DATA, config_from_text, lookup
from models.safe_load import FORMAT_KEY, CheckpointError
from models.weights import check_finite
from utils.checkpoints.exported import read_trained
from utils.checkpoints.file_format import is_own

_DESCRIPTION = (FORMAT_KEY, "config", "classes", "preprocessing", "data_path", "versions", "git_commit")  # what is kept of the first file
# What must be alike, beside classes and the weights' names and shapes.
_ALIKE = ("MODEL.TYPE", "MODEL.NAME", "DATA.IMG_SIZE", "DATA.MEAN", "DATA.STD", "DATA.INTERPOLATION", "DATA.FIT", "TEST.CROP", "TASK",
          *FOUND_IN_DATA)


def averaged(paths: Sequence[str], weights: str = "auto") -> dict[str, Any]:
    """The content of a checkpoint, without training state, whose weights are the mean of those in ``paths``, each weighing the same.

    Means are taken in double precision, of batch norms' statistics too; whole numbers, which count steps, are the largest. Files are
    read one after the other.

    Args:
        weights: raw, ema, or auto: a run's own average where it kept one.

    Raises:
        CheckpointError: a file is none of this program, or of another model, other classes or another preparation of images.
    """
    first: dict[str, Any] = {}
    sums: dict[str, Tensor] = {}
    for path in paths:
        content = read_trained(path)
        if not is_own(content):
            raise CheckpointError(f"{path}: holds weights but says nothing of them; only checkpoints of this program are averaged")
        state = _chosen(content, weights, path)
        check_finite(state, path)
        if not first:
            first = content
            sums = {name: t.double() if t.is_floating_point() else t.clone() for name, t in state.items()}
            kinds = {name: t.dtype for name, t in state.items()}
            continue
        _require_alike(first, content, sums, state, paths[0], path)
        for name, tensor in state.items():
            sums[name] = sums[name] + tensor.double() if tensor.is_floating_point() else torch.maximum(sums[name], tensor)
    mean = {name: (t / len(paths)).to(kinds[name]) if kinds[name].is_floating_point else t for name, t in sums.items()}
    kept = {key: first[key] for key in _DESCRIPTION if key in first}
    return dict(kept, model=mean, ema={}, step=first["step"], best={}, averaged=len(paths))


def _chosen(content: dict[str, Any], weights: str, path: str) -> dict[str, Tensor]:
    if weights == "ema" and not content["ema"]:
        raise CheckpointError(f"{path} holds no average of weights of its run; leave --weights out")
    return content["model"] if weights == "raw" or not content["ema"] else content["ema"]


def _require_alike(first: dict[str, Any], content: dict[str, Any], sums: dict[str, Tensor], state: dict[str, Tensor], path: str,
                   other: str) -> None:
    differing = [name for name in sums.keys() | state.keys() if name not in sums or name not in state
                 or sums[name].shape != state[name].shape]
    if differing:
        raise CheckpointError(f"{other}: is of another model than {path} ({min(differing)} differs); only one model is averaged")
    if content["classes"] != first["classes"]:
        raise CheckpointError(f"{other}: has other classes than {path}; only weights of one list of classes are averaged")
    ours, theirs = (config_from_text(c["config"]) for c in (first, content))
    for key in dict.fromkeys(_ALIKE):
        if lookup(ours, key) != lookup(theirs, key):
            raise CheckpointError(f"{other}: {key} is {lookup(theirs, key)}, in {path} it is {lookup(ours, key)}; weights of one model and "
                                  "one way to prepare images alone are averaged")
