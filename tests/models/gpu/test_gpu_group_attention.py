"""Attention within the groups of a map: formula, kernels, and the block that chooses between them and torch's."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import gradients
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import crossformer, swin
from models.crossformer import Block
from models.gpu import group_attention

ROOT = Path(__file__).parents[3]


def block(group: int, interval: int, **kwargs) -> Block:
    torch.manual_seed(0)
    return Block(32, 2, group, interval, **kwargs).double()


@pytest.mark.parametrize("position", ["dpb", "none"])
@pytest.mark.parametrize(("group", "interval", "height", "width"), [(2, 1, 4, 6), (2, 2, 8, 4), (3, 1, 7, 5), (2, 3, 7, 11), (7, 2, 5, 9)])
def test_groups_in_place_are_groups_laid_out(group, interval, height, width, position, monkeypatch):
    """A block's attention, with padding and maps smaller than the group too: values, and gradients of the map and of all weights."""
    ours = block(group, interval, position=position)
    x = torch.randn(2, height, width, 32, dtype=torch.float64, requires_grad=True)
    weights = list(ours.attn.parameters())

    def run(*_: Tensor) -> Tensor:
        return ours.attend_groups(x)

    plain, calls = gradients(run, x, *weights), []
    monkeypatch.setattr(crossformer, "fits", lambda x, *_: calls.append(1) or True)
    for a, b in zip(gradients(run, x, *weights), plain, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-12)
    assert calls
    monkeypatch.setattr(ours, "mask_padding", False)  # padding as keys is for torch's kernels
    calls.clear()
    run()
    assert bool(calls) == (min(height, width) <= group and height == width or height % (group * interval) + width % (group * interval) == 0)


@pytest.mark.parametrize(("size", "shift"), [(8, 0), (12, 2), (4, 0)])
def test_swins_windows_in_place_are_timms(size, shift, monkeypatch):
    """Shifted or not, and with a window as large as the map: values, and gradients of the map and of all weights."""
    torch.manual_seed(0)
    timms = SwinTransformerBlock(32, (size, size), 2, window_size=4, shift_size=shift, drop_path=0.0).double()
    ours = swin.attend_in_place(copy.deepcopy(timms))
    assert type(ours) is swin.BlockInPlace and list(ours.state_dict()) == list(timms.state_dict())
    x = torch.randn(2, size, size, 32, dtype=torch.float64, requires_grad=True)
    calls = []
    monkeypatch.setattr(swin, "fits", lambda *_: calls.append(1) or True)
    for a, b in zip(gradients(lambda x, *_: ours._attn(x), x, *ours.attn.parameters()),
                    gradients(lambda x, *_: timms._attn(x), x, *timms.attn.parameters()), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-12)
    assert calls
    calls.clear()
    ours._attn(x[:, :, :-1] if shift == 0 else x[:, :-1, :-1])  # timm pads it
    assert not calls


KERNELS = """
import json, sys, torch
from models.gpu import group_attention as m
m.PROGRAMS = dict(forward=8, backward=2)
torch.manual_seed(0)
errors = []
for batch, height, width, heads, dim, group, interval, shift, biased in json.loads(sys.argv[1]):
    qkv, grad = torch.randn(batch, height, width, 3 * heads * dim), torch.randn(batch, height, width, heads * dim)
    table = torch.randn((2 * group - 1) ** 2, heads) if biased else None
    sizes = heads, group, interval, shift, 0.3
    ours = [m._forward_on_cuda(qkv, table, *sizes), *m._backward_on_cuda(grad, qkv, table, *sizes)]
    qkv, grad, table = (None if t is None else t.double() for t in (qkv, grad, table))
    plain = [m._forward(qkv, table, *sizes), *m._backward(grad, qkv, table, *sizes)]
    errors += [float((a - b).norm() / b.norm()) for a, b in zip(ours, plain) if len(b)]
print(json.dumps(errors))
"""


def test_kernels_have_the_formulas_numbers():
    """Interpreted by Triton on the CPU: padding, long distances, no bias, shifted windows, samples and groups that fill nothing up."""
    pytest.importorskip("triton")
    cases = [(3, 5, 6, 2, 16, 2, 2, 0, True), (5, 6, 9, 1, 32, 7, 1, 0, True), (2, 6, 6, 1, 16, 3, 2, 0, False),
             (2, 8, 7, 1, 16, 4, 1, 2, True)]
    done = subprocess.run([sys.executable, "-c", KERNELS, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, TRITON_INTERPRET="1"), check=True)
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 11 and max(errors) < 1e-6


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_kernels_compile_for_hopper(kernel):
    """Without a GPU; and 16 bytes at a time go to and from memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from models.gpu import group_attention_kernels
    function, constants = getattr(group_attention_kernels, kernel), dict(DIM=32, BLOCK=64, BIASED=True, PRECISION="ieee")
    kinds = dict(qkv="*bf16", out="*bf16", grad="*bf16", to_qkv="*bf16", table="*fp32", to_bias="*fp32", scale="fp32")
    names = function.arg_names
    source = triton.compiler.ASTSource(
        fn=function, signature={name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds.get(name, "").startswith("*")})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=2))
    assert "st.global.v4" in compiled.asm["ptx"] and "wgmma" in compiled.asm["ptx"]


def test_kernels_that_do_not_work_are_named_once_and_left():
    group_attention.kernels_work.cache_clear()
    with pytest.warns(UserWarning, match="Triton"):  # a CPU runs none
        assert not group_attention.kernels_work(torch.device("cpu"), torch.bfloat16, 4, 16)
    assert not group_attention.kernels_work(torch.device("cpu"), torch.bfloat16, 4, 16)
    group_attention.kernels_work.cache_clear()


def test_kernels_that_are_wrong_are_left(monkeypatch):
    device, right = torch.device("cpu"), group_attention._forward
    monkeypatch.setattr(group_attention, "_forward_on_cuda", right)
    monkeypatch.setattr(group_attention, "_backward_on_cuda", group_attention._backward)
    assert not group_attention._difference(device, torch.float32, 7, 32)
    monkeypatch.setattr(group_attention, "_forward_on_cuda", lambda *args: 1.03 * right(*args))
    assert "output is off by 3.0 %" in group_attention._difference(device, torch.float32, 7, 32)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_on_cuda_no_group_is_laid_out(request):
    """Neither a copy of the map nor a bias of pairs, whatever its size; dropout, large groups and fp32 take torch's kernels."""
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        with torch.device("cuda"):
            net = Block(64, 2, 7, 2)
        x = torch.empty(4, 20, 17, 64, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            net.attend_groups(x)  # makes the constants
            with Operations() as operations:
                assert net.attend_groups(x).shape == x.shape
        assert not group_attention.fits(x.float(), 2, 7, nn.Dropout(0.0)) and not group_attention.fits(x, 2, 9, nn.Dropout(0.0))
        assert group_attention.fits(x, 2, 7, nn.Dropout(0.1).eval()) and not group_attention.fits(x, 2, 7, nn.Dropout(0.1))
    assert "cross_scale.group_attention.default" in operations.names
    assert not [name for name in operations.names for word in ("clone", "copy", "pad", "index", "arange") if word in name]


@pytest.mark.gpu
@pytest.mark.parametrize("group", [4, 7])
def test_kernels_on_a_gpu(group):
    assert group_attention.kernels_work(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, group, 32)
