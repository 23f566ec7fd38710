"""Layers that several families share, and how linears start.

Shapes: B batch, H W map, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath as TimmDropPath
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.cpu_bf16 import LayerNormForProducts, Linear, compute_dtype
from models.gpu import layer_norm as gpu_norm
from models.gpu import linear as gpu_linear
from models.ops import pad_to_even, pad_to_multiple


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): a residual branch left out whole, sample by sample, in training.

    Samples that keep it have it scaled by 1/(1 - rate). The rate lives in a tensor, unlike in timm's: ``torch.compile`` takes a number for
    a constant and would compile every block again. It is in no state dict.
    """

    keep: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.drop_prob = rate
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """For libraries that build models without storage and load state dicts into them (transformers); timm's name for it."""
        self.keep.fill_(1.0 - self.drop_prob)

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
    """``x + drop_path(branch)``, in one pass over the maps where there is something to drop. ``drop_path`` may be timm's."""
    drops = isinstance(drop_path, (DropPath, TimmDropPath)) and drop_path.training
    if drops and x.is_cuda and not torch.compiler.is_compiling():
        return AddScaled.apply(x, branch, kept_samples(drop_path.drop_prob, branch))
    if drops and isinstance(drop_path, DropPath):
        return torch.addcmul(x, branch, drop_path.factor(branch))
    return x + drop_path(branch)


def kept_samples(rate: float, x: Tensor) -> Tensor:
    """``DropPath.factor`` in fp32, in two launches on a GPU, where it takes four."""
    return torch.empty(len(x), *(1,) * (x.ndim - 1), device=x.device).bernoulli_(1.0 - rate).div_(1.0 - rate)


def norm_and_skip(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(x)`` for a residual branch, and ``x`` for the skip beside it: on CUDA one operation, so that one pass adds their gradients."""
    return gpu_norm.norm_and_skip(norm, x) if gpu_norm.fuses(norm, x) and not is_hooked(norm) else (norm(x), x)


def add_branch_and_norm(x: Tensor, branch: Tensor, drop_path: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``norm`` of ``add_branch(x, branch, drop_path)`` for the next branch, and that sum itself; on CUDA one pass each way."""
    known = isinstance(drop_path, (DropPath, TimmDropPath, nn.Identity)) and not is_hooked(norm)
    if known and gpu_norm.fuses(norm, x) and gpu_norm.adds(x, branch):
        drops = drop_path.training and not isinstance(drop_path, nn.Identity)
        return gpu_norm.add_and_norm(norm, x, branch, kept_samples(drop_path.drop_prob, branch) if drops else None)
    x = add_branch(x, branch, drop_path)
    return norm(x), x


class AddScaled(torch.autograd.Function):
    """x + factor * branch, for a ``factor`` (B, 1, ...) without gradient and a branch in a type of its own: one pass forward and one back.

    By itself autocast copies the branch to the residual's fp32 first, and its gradient back afterwards: on a GPU, which converts while it
    reads and writes, that is 28 bytes a number instead of 16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = branch.dtype
        with torch.autocast(x.device.type, enabled=False):
            return torch.addcmul(x, branch, factor, out=torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        factor, = ctx.saved_tensors
        to_branch = torch.mul(grad, factor, out=torch.empty_like(grad, dtype=ctx.dtype)) if ctx.needs_input_grad[1] else None
        return grad, to_branch, None


class Mlp(nn.Module):
    """Two linears with a GELU between. (.., C) -> the same."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.fc1) is type(self.fc2) is Linear and not (self.training and self.drop.p):
            parameters = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
            if gpu_linear.applies(x, *parameters) and not any(map(is_hooked, self.children())):
                return gpu_linear.mlp(x, *parameters, compute_dtype(x))
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody waits for the module to be called: pruning, activation statistics, explanations."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)


def init_linear(module: nn.Module) -> None:
    """Linears normal(0, 0.02), biases 0; all else keeps torch's default, which for norms is 1 and 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_head(width: int, num_classes: int) -> nn.Module:
    """The classifier, initialised as ``init_linear`` does, or nothing for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    init_linear(head)
    return head


class PatchEmbed(nn.Module):
    """Swin's linear embedding of patches, and a norm. (B, 3, H, W) -> (B, H/patch, W/patch, C), rounded up."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, norm: bool = True):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to_multiple(x, self.patch_size)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Swin's merging: 2x2 tokens side by side, down the columns first, norm, linear. (B, H, W, C) -> (B, H/2, W/2, 2C), rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = LayerNormForProducts(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_even(x)
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))
