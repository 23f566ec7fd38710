"""Reading weights that other people saved, without running any of their code, and fitting them to a model.

Published files come as bare state dicts or wrapped (``{"model": ...}``, ``{"state_dict": ...}``, EMA beside it), with
DDP or compile prefixes, and with a pickled yacs ``CfgNode`` or argparse ``Namespace`` next to the tensors. torch's
weights-only reader is the only reader here; those few classes are mapped to inert stand-ins, everything else that is
not plain data is refused. Whose names the tensors bear is ``models.published_names``' matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from config import read_text_file
from models.published_names import Reading, recognise
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


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(k, str) for k in value) \
        and any(isinstance(v, Tensor) for v in value.values())


def unwrap_state_dict(content: Any, path: str) -> dict[str, Tensor]:
    """The state dict in a file's content, prefixes of DDP and torch.compile removed.

    Of several models side by side under names that are nobody's custom (``student``, ``teacher``) the tensors come together, each
    behind its model's name.

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
    if isinstance(state, Mapping) and not _is_state_dict(state):
        models = {name: value for name, value in state.items() if isinstance(name, str) and _is_state_dict(value)}
        state = {f"{model}.{name}": value for model, inner in models.items() for name, value in inner.items()}
    if not _is_state_dict(state):
        raise CheckpointError(f"{path}: holds no model weights (looked for {', '.join(wrappers)}, or tensors by name)")
    cleaned: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        _require_plain(name, tensor, path)
        name = name.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name[len("module."):]
        cleaned[name] = tensor
    return cleaned


_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (*_REAL, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)


def _require_plain(name: str, tensor: Tensor, path: str) -> None:
    """Raise ``CheckpointError`` for a tensor that no weights of a model can be copied from as they are."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{path}: {name} is not a plain dense tensor")
    if tensor.dtype not in _NUMBERS:
        raise CheckpointError(f"{path}: {name} is of {str(tensor.dtype).removeprefix('torch.')}; save the weights as float32 or bfloat16 "
                              "numbers, as they were before they were packed")


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
    renamed: list[str] = field(default_factory=list)    # of those kept: another name in the file than the model's
    replaced: list[str] = field(default_factory=list)   # the model keeps its fresh tensor (classifier)
    fresh: list[str] = field(default_factory=list)      # likewise, because the file has nothing for it
    adapted: list[str] = field(default_factory=list)    # reshaped to fit (input channels, position tables)
    mapped: list[str] = field(default_factory=list)     # classifier rows picked by a class map
    skipped: list[str] = field(default_factory=list)    # in the file, known to be derived or of no use, left out
    prefix: str = ""                                    # taken off the file's names
    spelling: str = ""                                  # whose names they were

    def summary(self, path: str) -> str:
        line = f"pretrained {path}: {len(self.kept)} tensors kept"
        for names, what in ((self.renamed, "of them renamed"), (self.adapted, "resized"), (self.skipped, "skipped")):
            if names:
                line += f", {len(names)} {what} ({_some(names)})"
        if self.mapped:
            line += f", head mapped ({', '.join(self.mapped)})"
        if self.replaced:
            line += f", head replaced by a fresh one ({', '.join(self.replaced)})"
        if self.fresh:
            line += f", fresh because the file has none: {', '.join(self.fresh)}"
        return line + (f"; names under {self.prefix}" if self.prefix else "") + (f"; {self.spelling}" if self.spelling else "")


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def check_fits(model: nn.Module, state: Mapping[str, Tensor], path: str, may_miss: tuple[str, ...] = ()) -> None:
    """Raise ``CheckpointError`` naming the first tensors that are missing, unexpected, of another shape or of whole or complex numbers."""
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.startswith(may_miss or ("\0",))]
    unexpected = [name for name in state if name not in own]
    shapes = [f"{name} is {list(state[name].shape)}, the model's {list(own[name].shape)}"
              for name in own if name in state and own[name].shape != state[name].shape]
    kinds = [f"{name} is of {str(state[name].dtype).removeprefix('torch.')}" for name in own
             if name in state and own[name].is_floating_point() and state[name].dtype not in _REAL]
    problems = [f"{len(names)} {what} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
                for what, names in (("of another shape", shapes), ("not of real numbers", kinds), ("missing", missing),
                                    ("unexpected", unexpected)) if names]
    if problems:
        raise CheckpointError(f"{path}: does not fit this model: {', '.join(problems)}; "
                              "check MODEL.TYPE, MODEL.NAME and the sizes against the file")


def check_finite(state: Mapping[str, Tensor], path: str) -> None:
    """Raise ``CheckpointError`` naming the first tensor that is not plain or holds NaN or infinity."""
    for name, tensor in state.items():
        _require_plain(name, tensor, path)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of the classifier's modules, as timm's description of the model gives them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


_LARGEST_MAP, _LONGEST_ROW = 1 << 24, 18  # bytes of a class map, digits of a row's number


def read_class_map(path: str) -> list[int]:
    """Rows of a larger classifier, one number a line, in the order of the classes that are kept.

    Raises:
        CheckpointError: unreadable, or a line is no row number; names the line.
    """
    try:
        lines = read_text_file(path, _LARGEST_MAP).split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: the class map cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not line.strip().isdecimal() or len(line.strip()) > _LONGEST_ROW:
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
    reading = read_names(source, model, path, filter_fn)
    state, own, heads = dict(reading.state), model.state_dict(), classifier_prefixes(model)
    check_finite(state, path)
    report = LoadReport(fresh=list(reading.fresh), prefix=reading.prefix, spelling=reading.spelling)
    if class_map and reading.fresh:
        raise CheckpointError(f"{path}: holds no classifier ({reading.fresh[0]}) that MODEL.CLASS_MAP could pick rows of; leave it empty")
    if class_map:
        _pick_classes(state, own, heads, class_map, path, report)
    origin = {id(tensor): name for name, tensor in reading.source.items()}
    for name in list(state):
        before = reading.source.get(name)
        is_head = any(name.startswith(head + ".") for head in heads)
        if is_head and (name not in own or own[name].shape != state[name].shape):
            if name in own:
                report.replaced.append(f"{name} {list(state[name].shape)} -> {list(own[name].shape)}")
            del state[name]
        elif name in own and own[name].shape != state[name].shape and _is_input_weight(own[name], state[name]):
            from timm.models import adapt_input_conv
            state[name] = adapt_input_conv(own[name].shape[1], state[name])
            report.adapted.append(name)
        elif name in own and before is not None and before.shape != state[name].shape and id(state[name]) not in origin and not is_head:
            report.adapted.append(name)
        else:
            report.kept.append(name)
            if origin.get(id(state[name])) not in (None, name):
                report.renamed.append(name)
    # A head of which one tensor was replaced is replaced whole.
    if report.replaced:
        for name in [n for n in state if any(n.startswith(head + ".") for head in heads)]:
            state.pop(name)
            for names in (report.kept, report.renamed):
                if name in names:
                    names.remove(name)
    absent = tuple(h + "." for h in heads)
    check_fits(model, state, path, may_miss=(*(absent if report.replaced else ()), *report.fresh))
    model.load_state_dict({name: state.get(name, own[name]) for name in own})
    derived = [name for name in reading.source if name not in own and name not in reading.state and _derived(name)]
    report.skipped = [*derived, *reading.left_out]
    return report


def _derived(name: str) -> bool:
    """Names of masks, indices and offset tables that trainers saved with the weights."""
    return name.endswith(("attn_mask", "relative_position_index", "relative_coords_table", "attn.biases"))


def read_names(source: dict[str, Tensor], model: nn.Module, path: str, filter_fn: FilterFn | None) -> Reading:
    """``source`` by the model's names and sizes, as far as it can be understood.

    Raises:
        CheckpointError: it is no file of this model.
    """
    def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state if filter_fn is None else filter_fn(state, model)

    def fits(own: Tensor, loaded: Tensor) -> bool:
        return own.shape == loaded.shape or _is_input_weight(own, loaded)

    return recognise(source, model.state_dict(), classifier_prefixes(model), translate, fits, path)


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
