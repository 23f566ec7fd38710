"""What every family shares: the protocol of a timm backbone, written once, and the way into timm's builder.

Shapes: B batch, H W map, C channels. A stage output is a map, channels last (B, H, W, C) inside the models,
(B, C, H, W) where a caller asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models import cpu_bf16 as bf16
from models.cpu_bf16 import Linear
from models.weights import load_pretrained_file


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): a residual branch left out whole, sample by sample, in training.

    What is kept is scaled by 1/(1 - rate). The rate lives in a tensor, unlike in timm's: ``torch.compile`` takes a number for
    a constant and would compile every block anew. It is in no state dict.
    """

    keep: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.drop_prob = rate
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same."""
        if not self.training:
            return x
        return x * self.factor(x)

    def factor(self, x: Tensor) -> Tensor:
        """What each sample of ``x`` (B, ...) is multiplied by: 0 or 1/(1 - rate), (B, 1, ...)."""
        kept = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) < self.keep
        return (kept / self.keep).to(x.dtype)


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """``x + drop_path(branch)``, in one pass over the maps where there is something to drop."""
    if isinstance(drop_path, DropPath) and drop_path.training:
        return torch.addcmul(x, branch, drop_path.factor(branch))
    return x + drop_path(branch)


class Mlp(nn.Module):
    """Two linears with a GELU between. (.., C) -> the same."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *context: Any, unit: str) -> Tensor:
    """``x`` through the blocks of a stage, each called with ``context`` too.

    Args:
        unit: what the backward pass computes again: of a block, whose input alone is kept until then, of a whole stage, or nothing
            ("", see ``HierarchicalModel.recomputed``).
    """
    members = list(blocks)
    if not unit:
        return _in_turn(members, x, *context)
    for part in [members] if unit == "stage" else [[block] for block in members]:
        # A graph of the whole model notes the statistics in its forward pass alone, and takes no such context.
        once = {} if torch.compiler.is_compiling() else dict(context_fn=partial(_recomputation, part))
        x = checkpoint(partial(_in_turn, part), x, *context, use_reentrant=False, **once)
    return x


def _recomputation(blocks: Sequence[nn.Module]) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _statistics_kept(blocks)


@contextlib.contextmanager
def _statistics_kept(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norms of ``blocks`` come out with the running statistics they had: they have counted the batch already."""
    norms = [module for block in blocks for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.data.copy_(values)  # .data: autograd would take it for a change of what it has saved


def _in_turn(blocks: Sequence[nn.Module], x: Tensor, *context: Any) -> Tensor:
    for block in blocks:
        x = block(x, *context)
    return x


class HierarchicalModel(nn.Module):
    """Base of the hierarchical models: stages of blocks, a final norm, pooling and a linear classifier.

    A subclass sets up its modules, calls ``init_protocol`` and gives:

    * ``forward_stages(x, last)``: the list of stage outputs 0..last, each (B, H, W, C), before the final norm;
    * ``norm``: the norm over the last stage's channels;
    * ``head``: the classifier, ``nn.Linear`` or ``nn.Identity``;
    * ``stage_modules()``: the module of each stage, for pruning.
    """

    norm: nn.Module
    head: nn.Module
    pools: tuple[str, ...] = ("avg", "")  # what ``global_pool`` can be, the default first

    def init_protocol(self, num_classes: int, in_chans: int, global_pool: str, drop_rate: float,
                      widths: Sequence[int], reductions: Sequence[int], stage_names: Sequence[str]) -> None:
        """Attributes that timm and its users read. ``widths`` and ``reductions`` are per stage."""
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = widths[-1]
        self.grad_checkpointing, self.checkpoint_unit = False, "block"
        self.output_fmt = "NHWC"
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [dict(num_chs=width, reduction=reduction, module=name)
                             for width, reduction, name in zip(widths, reductions, stage_names, strict=True)]
        self._check_pool(global_pool)

    # -- for subclasses -----------------------------------------------------------------------------

    def forward_stages(self, x: Tensor, last: int) -> list[Tensor]:
        raise NotImplementedError

    def stage_modules(self) -> nn.ModuleList:
        raise NotImplementedError

    # -- timm's protocol ----------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters of two or more dimensions that weight decay must leave alone."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        raise NotImplementedError

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, unit: str = "block") -> None:
        """Compute activations again in the backward pass instead of keeping them; ``unit`` is block or stage: see ``run_blocks``."""
        self.grad_checkpointing, self.checkpoint_unit = enable, unit

    @property
    def recomputed(self) -> str:
        """The ``unit`` for ``run_blocks`` in this forward pass."""
        return self.checkpoint_unit if self.grad_checkpointing and self.training else ""

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of ``num_classes`` outputs; 0 removes it and the pooled features come out."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        reference = next(self.parameters())
        self.head = make_head(self.num_features, num_classes).to(device=reference.device, dtype=reference.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) image to the normed map of the last stage, (B, H/32, W/32, C)."""
        return self.norm(self.forward_stages(x, len(self.feature_info) - 1)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, C) to logits (B, num_classes), or the pooled features (B, C)."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
                              ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs beside the final features.

        Args:
            indices: stages to return; None is all, a number the last so many.
            norm: apply the final norm to the last stage's output, when it is among them.
            stop_early: do not run stages after the last one asked for.
            output_fmt: NCHW or NHWC.
            intermediates_only: leave the final features out.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; choose NCHW or NHWC")
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        final = len(self.feature_info) - 1
        stages = self.forward_stages(x, deepest if stop_early or intermediates_only else final)
        intermediates = []
        for index in take:
            y = self.norm(stages[index]) if norm and index == final else stages[index]
            intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        y = stages[-1]
        return (self.norm(y) if len(stages) == final + 1 else y), intermediates

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Drop the stages after the deepest of ``indices``, and what follows them."""
        take, deepest = feature_take_indices(len(self.feature_info), indices)
        stages = self.stage_modules()
        del stages[deepest + 1:]
        self.drop_after_stage(deepest)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def drop_after_stage(self, index: int) -> None:
        """Hook for modules between stages that pruning leaves without a use."""

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in self.pools:
            raise ValueError(f"global_pool is {global_pool!r}; choose {', '.join(filter(None, self.pools))}, or '' for none")


def make_head(width: int, num_classes: int) -> nn.Module:
    """The classifier: linear with weights normal(0, 0.02) and no bias at first, or nothing for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def default_cfg(**overrides: Any) -> dict[str, Any]:
    """timm's description of a model's input and classifier; ImageNet at 224 unless overridden."""
    return dict(dict(
        url="", num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=224 / 256, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, fixed_input_size=False, classifier="head", first_conv="",
    ), **overrides)


def create(model_cls: type[nn.Module], variant: str, pretrained: bool, variant_kwargs: dict[str, Any],
           filter_fn: Any, **kwargs: Any) -> nn.Module:
    """Build a registered variant through timm, with weights read safely and checked key by key.

    timm alone loads a file without strictness once the class count differs or features are wanted; a file named by
    ``pretrained_cfg_overlay=dict(file=...)`` goes through ``models.weights`` instead, which names every tensor
    that does not fit and adapts only the classifier and the input channels.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if overlay.get("file"):
        overlay["custom_load"] = True
    model_args = dict(variant_kwargs, **{k: v for k, v in kwargs.items() if v is not None})
    out_indices = model_args.pop("out_indices", tuple(range(len(model_args["depths"]))))
    return build_model_with_cfg(
        _with_loader(model_cls, filter_fn), variant, pretrained, pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=filter_fn, feature_cfg=dict(out_indices=out_indices, feature_cls="getter"), **model_args)


def _with_loader(model_cls: type[nn.Module], filter_fn: Any) -> Any:
    def build(**kwargs: Any) -> nn.Module:
        model = bf16.mended(model_cls(**kwargs))
        # timm calls this for a named file (custom_load).
        model.load_pretrained = partial(load_pretrained_file, model, filter_fn=filter_fn)
        return model
    return build
