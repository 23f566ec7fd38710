"""What every family shares: the protocol of a timm backbone, written once, and the way into timm's builder.

Shapes: B batch, H W map, C channels. A stage output is a map, channels last (B, H, W, C) inside the models,
(B, C, H, W) where a caller asks for it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models import cpu_bf16
from models.checkpointing import run_blocks
from models.layers import make_head
from models.weights import FilterFn, load_pretrained_file


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


class Stage(nn.Module):
    """Blocks, and the merging of tokens that leads to the next stage, in Swin's layout."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        if downsample is not None:
            self.downsample = downsample


class MergingModel(HierarchicalModel):
    """Base of models in Swin's layout: ``patch_embed``, ``pos_drop``, then ``layers``, each a ``Stage``, whose output is taken before the
    merging."""

    patch_embed: nn.Module
    pos_drop: nn.Module
    layers: nn.ModuleList

    def place(self, tokens: Tensor) -> Tensor:
        """What comes between the embedding of patches and the first block, (B, H/patch, W/patch, C) -> the same."""
        return self.pos_drop(tokens)

    def forward_stages(self, x: Tensor, last: int) -> list[Tensor]:
        """(B, 3, H, W) -> outputs of stages 0..last, (B, H/patch, W/patch, C) first (rounded up), each before its merging."""
        return self.run_stages(self.place(self.patch_embed(x)), last)

    def run_stages(self, x: Tensor, last: int) -> list[Tensor]:
        """As ``forward_stages``, from the first block's tokens."""
        outputs: list[Tensor] = []
        for index, stage in enumerate(self.layers[:last + 1]):
            if index:
                x = self.layers[index - 1].downsample(x)
            x = run_blocks(stage.blocks, x, unit=self.recomputed)
            outputs.append(x)
        return outputs

    def stage_modules(self) -> nn.ModuleList:
        return self.layers

    def drop_after_stage(self, index: int) -> None:
        if hasattr(self.layers[index], "downsample"):
            del self.layers[index].downsample

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^patch_embed|^absolute_pos_embed",
            blocks=r"^layers\.(\d+)" if coarse else [
                (r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))])


def check_stages(depths: Sequence[int], **per_stage: Sequence[Any]) -> None:
    """Raise ``ValueError`` unless every argument has an entry for each stage."""
    for name, value in per_stage.items():
        if len(value) != len(depths):
            raise ValueError(f"{name} has {len(value)} entries for {len(depths)} stages (depths {list(depths)})")


def check_heads(widths: Sequence[int], num_heads: Sequence[int], least: int = 1) -> None:
    """Raise ``ValueError`` unless the heads of every stage share its width in equal parts of at least ``least`` channels."""
    for width, heads in zip(widths, num_heads, strict=True):
        if width % heads or width // heads < least:
            raise ValueError(f"num_heads is {list(num_heads)}: a stage of width {width} cannot have {heads} heads; the width "
                             "must be a multiple of the heads" + (f" and at least {least} times as many" if least > 1 else ""))


def check_mlps(widths: Sequence[int], **ratios: Sequence[float]) -> None:
    """Raise ``ValueError`` unless every stage's MLP has a hidden channel; ``ratios``: one argument, hidden width over width a stage."""
    for name, values in ratios.items():
        for width, ratio in zip(widths, values, strict=True):
            if int(width * ratio) < 1:
                raise ValueError(f"{name} is {list(values)}: {ratio} times a width of {width} leaves no hidden channel; raise it")


def check_doubling(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], mlp_ratio: float = 4.0, **_: Any) -> None:
    """The checks above for a model whose width doubles from stage to stage, from the arguments it is made of."""
    widths = [embed_dim * 2**stage for stage in range(len(depths))]
    check_stages(depths, num_heads=num_heads)
    check_heads(widths, num_heads)
    check_mlps(widths, mlp_ratio=[mlp_ratio] * len(depths))


def default_cfg(**overrides: Any) -> dict[str, Any]:
    """timm's description of a model's input and classifier; ImageNet at 224 unless overridden."""
    return dict(dict(
        url="", num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=224 / 256, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, fixed_input_size=False, classifier="head", first_conv="",
    ), **overrides)


def create(model_cls: type[nn.Module], variant: str, pretrained: bool, variant_kwargs: Mapping[str, Any],
           filter_fn: FilterFn | None, **kwargs: Any) -> nn.Module:
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

    def build(**model_args: Any) -> nn.Module:
        model = cpu_bf16.replace_layers(model_cls(**model_args))
        # timm calls this for a named file (custom_load).
        model.load_pretrained = partial(load_pretrained_file, model, filter_fn=filter_fn)
        return model

    return build_model_with_cfg(
        build, variant, pretrained, pretrained_cfg_overlay=overlay, pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"), **model_args)


def register_variants(module: str, model_cls: type[nn.Module], variants: Mapping[str, Mapping[str, Any]], filter_fn: FilterFn | None = None,
                      cfg: Mapping[str, Any] | None = None, cfgs: Mapping[str, Mapping[str, Any]] | None = None,
                      descriptions: Mapping[str, str] | None = None) -> Callable[[str, dict[str, Any], tuple[int, int]], nn.Module]:
    """Register every variant of a family with timm, as a function of the variant's name in the family's module.

    Args:
        module: ``__name__`` of the family's module.
        variants: arguments of ``model_cls`` by variant.
        filter_fn: the family's ``checkpoint_filter_fn``.
        cfg: what the family's ``default_cfg`` overrides.
        cfgs: what a variant's overrides beside, by variant.
        descriptions: docstrings of the functions, by variant.

    Returns:
        ``build(name, kwargs, img_size)``: a variant, or under any other name the model of ``kwargs`` alone. ``img_size`` (height,
        width) goes to a class that takes it.
    """
    home, cfg, cfgs = sys.modules[module], cfg or {}, cfgs or {}
    home.default_cfgs = generate_default_cfgs({name: default_cfg(**{**cfg, **cfgs.get(name, {})}) for name in variants})
    for variant in variants:
        setattr(home, variant, _register(module, model_cls, variant, variants[variant], filter_fn, (descriptions or {}).get(variant)))
    takes_size = "img_size" in inspect.signature(model_cls).parameters

    def build(name: str, kwargs: dict[str, Any], img_size: tuple[int, int]) -> nn.Module:
        kwargs = dict(kwargs, img_size=img_size) if takes_size else kwargs
        if name in variants:
            return timm.create_model(name, **kwargs)
        return create(model_cls, name, False, kwargs, filter_fn, pretrained_cfg=default_cfg(**cfg))
    return build


def _register(module: str, model_cls: type[nn.Module], variant: str, variant_kwargs: Mapping[str, Any], filter_fn: FilterFn | None,
              description: str | None) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(model_cls, variant, pretrained, variant_kwargs, filter_fn, **kwargs)

    # timm lists a model under its function's name and module, and looks there for its default_cfgs.
    entry_point.__module__, entry_point.__name__, entry_point.__qualname__ = module, variant, variant
    entry_point.__doc__ = description
    return register_model(entry_point)
