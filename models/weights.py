"""Reading weights that other people saved, without running any of their code, and fitting them to a model.

Published files come as bare state dicts or wrapped (``{"model": ...}``, ``{"state_dict": ...}``, EMA beside it), with
DDP or compile prefixes, and with a pickled yacs ``CfgNode`` or argparse ``Namespace`` next to the tensors. torch's
weights-only reader is the only reader here; those few classes are mapped to inert stand-ins, everything else that is
not plain data is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.safe_load import FORMAT_KEY, CheckpointError, read_file

# A family's translation of published names and sizes to the model's own.
FilterFn = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]

# --------------------------------------------------------------------------------------------------
# From a file's content to a state dict
# --------------------------------------------------------------------------------------------------

# In the order tried. timm evaluates the average where its file holds one; the DeiT lineage (PVT, Shunted, MPViT)
# publishes the figures of the raw weights and keeps an average beside them.
_WRAPPERS = ("state_dict_ema", "model", "state_dict", "model_ema", "ema", "module", "net")
# Of this program's own checkpoints the average is evaluated where there is one; an empty "ema" means none.
_OWN_WRAPPERS = ("ema", "model")


_PREFIXES = ("module.", "_orig_mod.")


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(k, str) for k in value) \
        and any(isinstance(v, Tensor) for v in value.values())


def unwrap_state_dict(content: Any, path: str) -> dict[str, Tensor]:
    """The state dict in a file's content, prefixes of DDP and torch.compile removed.

    Raises:
        CheckpointError: there is none, or a tensor in it is sparse, quantised or otherwise not plain.
    """
    state = content
    wrappers = _OWN_WRAPPERS if isinstance(content, Mapping) and FORMAT_KEY in content else _WRAPPERS
    for _ in range(3):  # {"state_dict": {"model": {...}}} has been seen
        if not isinstance(state, Mapping):
            break
        inner = next((state[name] for name in wrappers if isinstance(state.get(name), Mapping) and state[name]), None)
        if inner is None:
            break
        state = inner
    if not _is_state_dict(state):
        raise CheckpointError(f"{path}: holds no model weights (looked for {', '.join(wrappers)}, or tensors by name)")
    cleaned: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is not a plain dense tensor")
        stripped = True
        while stripped:
            stripped = False
            for prefix in _PREFIXES:
                if name.startswith(prefix):
                    name, stripped = name[len(prefix):], True
        cleaned[name] = tensor
    return cleaned


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The model weights in a file, whoever wrote it."""
    return unwrap_state_dict(read_file(path), os.fspath(path))


# --------------------------------------------------------------------------------------------------
# Fitting weights to a model
# --------------------------------------------------------------------------------------------------

@dataclass
class LoadReport:
    """What became of each tensor of a file."""

    kept: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)   # the model keeps its fresh tensor (classifier)
    adapted: list[str] = field(default_factory=list)    # reshaped to fit (input channels, position tables)
    mapped: list[str] = field(default_factory=list)     # classifier rows picked by a class map
    skipped: list[str] = field(default_factory=list)    # in the file, known to be derived or of no use, left out

    def summary(self, path: str) -> str:
        line = f"pretrained {path}: {len(self.kept)} tensors kept"
        if self.adapted:
            line += f", {len(self.adapted)} resized ({', '.join(self.adapted[:4])}{', ...' if len(self.adapted) > 4 else ''})"
        if self.mapped:
            line += f", head mapped ({', '.join(self.mapped)})"
        if self.skipped:
            line += f", {len(self.skipped)} skipped ({', '.join(self.skipped[:2])}{', ...' if len(self.skipped) > 2 else ''})"
        if self.replaced:
            line += f", head replaced by a fresh one ({', '.join(self.replaced)})"
        return line


def check_fits(model: nn.Module, state: Mapping[str, Tensor], path: str, may_miss: tuple[str, ...] = ()) -> None:
    """Raise ``CheckpointError`` naming the first tensors that are missing, unexpected or of another shape."""
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.startswith(may_miss or ("\0",))]
    unexpected = [name for name in state if name not in own]
    shapes = [f"{name} is {list(state[name].shape)}, the model's {list(own[name].shape)}"
              for name in own if name in state and own[name].shape != state[name].shape]
    problems = [f"{len(names)} {what} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
                for what, names in (("of another shape", shapes), ("missing", missing), ("unexpected", unexpected)) if names]
    if problems:
        raise CheckpointError(f"{path}: does not fit this model: {', '.join(problems)}; "
                              "check MODEL.TYPE, MODEL.NAME and the sizes against the file")


def check_finite(state: Mapping[str, Tensor], path: str) -> None:
    """Raise ``CheckpointError`` naming the first tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of the classifier's modules, as timm's description of the model gives them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def read_class_map(path: str) -> list[int]:
    """Rows of a larger classifier, one number a line, in the order of the classes that are kept.

    Raises:
        CheckpointError: unreadable, or a line is no row number; names the line.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the class map cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not line.strip().isdecimal():
                raise CheckpointError(f"{path}:{number}: {line.strip()[:40]!r} is no row number")
            rows.append(int(line))
    return rows


def load_pretrained_file(model: nn.Module, path: str,
                         filter_fn: FilterFn | None = None, class_map: list[int] | None = None) -> LoadReport:
    """Start ``model`` from the weights in ``path``; every other tensor than classifier and input must fit exactly.

    The classifier is replaced by the model's fresh one where the class counts differ (and left out where the model
    has none); the first convolution is adapted to another number of input channels.

    Args:
        filter_fn: the family's translation of published names and sizes.
        class_map: rows to pick from a larger classifier (``read_class_map``); without it such a head is replaced.

    Raises:
        CheckpointError: unreadable, unsafe, or not this model's weights; names the first tensors.
    """
    path = os.fspath(path)
    return fit_pretrained(model, read_state_dict(path), path, filter_fn, class_map)


def fit_pretrained(model: nn.Module, source: dict[str, Tensor], path: str,
                   filter_fn: FilterFn | None = None, class_map: list[int] | None = None) -> LoadReport:
    """``load_pretrained_file`` of weights that are already read; ``path`` is what messages call them."""
    state = translate(source, model, path, filter_fn)
    check_finite(state, path)
    own, report = model.state_dict(), LoadReport()
    heads = classifier_prefixes(model)
    if class_map:
        _pick_classes(state, own, heads, class_map, path, report)
    for name in list(state):
        is_head = any(name == head or name.startswith(head + ".") for head in heads)
        if is_head and (name not in own or own[name].shape != state[name].shape):
            if name in own:
                report.replaced.append(f"{name} {list(state[name].shape)} -> {list(own[name].shape)}")
            del state[name]
        elif name in own and own[name].shape != state[name].shape and _is_input_weight(own[name], state[name]):
            from timm.models import adapt_input_conv
            state[name] = adapt_input_conv(own[name].shape[1], state[name])
            report.adapted.append(name)
        elif name in own and name in source and source[name].shape != state[name].shape and not is_head:
            report.adapted.append(name)
        else:
            report.kept.append(name)
    # A head of which one tensor was replaced is replaced whole.
    if report.replaced:
        for name in [n for n in state if any(n.startswith(head + ".") for head in heads)]:
            state.pop(name)
            report.kept.remove(name)
    absent = () if any(n.startswith(tuple(h + "." for h in heads)) for n in state) else tuple(h + "." for h in heads)
    pruned = getattr(model, "num_classes", None) == 0
    check_fits(model, state, path, may_miss=absent if report.replaced or pruned else ())
    model.load_state_dict({name: state.get(name, own[name]) for name in own})
    # A filter may rename; what it drops is what the state dict lacks under any name and shape.
    if filter_fn and len(source) > len(state) + len(report.replaced):
        report.skipped = [name for name in source if name not in own and name not in state and _derived(name)]
    return report


def _derived(name: str) -> bool:
    """Names of masks, indices and offset tables that trainers saved with the weights."""
    return name.endswith(("attn_mask", "relative_position_index", "attn.biases"))


def translate(source: dict[str, Tensor], model: nn.Module, path: str,
              filter_fn: FilterFn | None) -> dict[str, Tensor]:
    """``source`` in the model's names and sizes.

    Raises:
        CheckpointError: the translation does not understand the file.
    """
    if filter_fn is None:
        return dict(source)
    try:
        return filter_fn(dict(source), model)
    except (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a file of this model ({type(error).__name__}: {str(error)[:80]}); "
                              "check MODEL.TYPE and MODEL.NAME") from None


def _pick_classes(state: dict[str, Tensor], own: Mapping[str, Tensor], heads: tuple[str, ...], class_map: list[int], path: str,
                  report: LoadReport) -> None:
    """Replace the classifier's rows in ``state`` by those that the map names, in place."""
    for name in [n for n in state if n in own and any(n.startswith(head + ".") for head in heads)]:
        rows, wanted = state[name].shape[0], own[name].shape[0]
        if rows == wanted:
            continue
        if len(class_map) != wanted or max(class_map) >= rows:
            raise CheckpointError(f"{path}: MODEL.CLASS_MAP names {len(class_map)} rows up to {max(class_map)}, but the model has "
                                  f"{wanted} classes and the file's head {rows} rows")
        state[name] = state[name].index_select(0, torch.tensor(class_map))
        report.mapped.append(f"{name} {rows} -> {wanted} rows")


def _is_input_weight(own: Tensor, loaded: Tensor) -> bool:
    """A convolution over image channels: same kernels and outputs, only the input channels differ, from 3."""
    return own.ndim == 4 and loaded.ndim == 4 and loaded.shape[1] == 3 and own.shape[0] == loaded.shape[0] \
        and own.shape[2:] == loaded.shape[2:]
