"""Attention in every form: the same numbers and gradients as the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradients import close, gradients
from torch import Tensor, nn

from models import attention as module
from models.attention import attention, biased_self_attention, cuda_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_a_bias(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (9, 5, 5))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q.float() @ k.float().transpose(-2, -1) * 0.3).softmax(-1) @ v.float()).to(dtype)

    drop = nn.Dropout(0.5).eval()
    limit = 1e-5 if dtype == torch.float32 else 0.03
    assert close(gradients(lambda *t: attention(*t, 0.3, drop), q, k, v), gradients(plain, q, k, v), limit)
    with torch.no_grad():
        assert close([attention(q, k, v, 0.3, drop)], [plain(q, k, v)], limit)
    assert not torch.allclose(attention(q, k, v, 0.3, drop.train()), plain(q, k, v), atol=0.1)


@pytest.mark.parametrize("kind", ["none", "shared", "each"])
@pytest.mark.parametrize(("side", "dtype"), [(4, torch.bfloat16), (7, torch.bfloat16), (12, torch.bfloat16), (7, torch.float32)])
def test_biased_self_attention_in_every_form(side, dtype, kind):
    """Training, evaluation and dropout against the formula in fp32: the output, the gradients of q, k, v and of the bias."""
    torch.manual_seed(0)
    batch, heads, width, scale, tokens = 3, 2, 8, 0.3, side * side
    qkv = torch.randn(batch, tokens, 3, heads, width).to(dtype).requires_grad_()
    shape = dict(none=None, shared=(heads, tokens, tokens), each=(batch, heads, tokens, tokens))[kind]
    bias = None if shape is None else torch.randn(shape).to(dtype).requires_grad_()
    inputs = [qkv] if bias is None else [qkv, bias]

    def formula(qkv: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        q, k, v = qkv.float().permute(2, 0, 3, 1, 4)
        return ((scale * q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def difference(a: Tensor, b: Tensor) -> float:
        return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())

    drop, limit = nn.Dropout(0.5), 1e-5 if dtype == torch.float32 else 0.01
    ours, plain = biased_self_attention(qkv, bias, scale, drop.eval()), formula(*inputs)
    pull = torch.randn(plain.shape).to(dtype)
    assert ours.dtype == dtype and difference(ours, plain) < limit
    for a, b in zip(torch.autograd.grad(ours, inputs, pull), torch.autograd.grad(plain, inputs, pull.float()), strict=True):
        assert a.shape == b.shape and difference(a, b) < limit
    with torch.no_grad():
        assert difference(biased_self_attention(qkv, bias, scale, drop), plain) < limit
    assert difference(biased_self_attention(qkv, bias, scale, drop.train()), plain) > 0.1


def test_cuda_kernels_of_a_biased_attention(monkeypatch):
    """cuDNN's kernel and flash attention are left out, in one compiled graph too."""
    q, bias = torch.randn(2, 2, 49, 8, requires_grad=True), torch.randn(2, 49, 49)
    allowed = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *_, **__: allowed.append(
        (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())) or q)
    cuda_attention(q, q, q, bias, 0.3, 0.0)
    assert allowed == [(False, True)]
    monkeypatch.undo()
    compiled = torch.compile(lambda q: cuda_attention(q, q, q, bias, 0.3, 0.0), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q), cuda_attention(q, q, q, bias, 0.3, 0.0))


@pytest.mark.parametrize("kind", ["none", "shared", "each"])
def test_more_groups_than_a_cuda_grid_takes(kind, monkeypatch):
    """They come in parts below the limit; values and gradients stay."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shape = dict(none=None, shared=(2, 9, 9), each=(7, 2, 9, 9))[kind]
    inputs = [q, k, v] if shape is None else [q, k, v, torch.randn(shape, dtype=torch.float64, requires_grad=True)]

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return cuda_attention(q, k, v, bias, 0.3, 0.0)

    whole, sizes, inner = gradients(ours, *inputs), [], F.scaled_dot_product_attention
    monkeypatch.setattr(module, "MAX_CUDA_BATCH", 3)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *args, **kwargs: sizes.append(len(q)) or inner(q, *args, **kwargs))
    assert close(gradients(ours, *inputs), whole, 1e-12)
    assert sum(sizes) == 7 and max(sizes) <= 3
