"""The dynamic position bias in one launch: the same numbers and gradients as layer by layer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.gpu import position_bias as gpu_position_bias
from models.position_bias import DynamicPositionBias, relative_offsets

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("residual", [False, True])
def test_formula_is_the_modules(residual):
    torch.manual_seed(0)
    dpb = DynamicPositionBias(6, 3, residual).double()
    plain = dpb(relative_offsets(4, torch.device("cpu")).double())
    assert torch.allclose(gpu_position_bias.layer_by_layer(list(dpb.parameters()), 4, residual), plain)


KERNELS = """
import torch
from models.gpu import position_bias as m
from models.position_bias import DynamicPositionBias
cpu = torch.device("cpu")
m._LIBRARY.impl("position_bias", m._forward, "CPU")
m._LIBRARY.impl("position_bias_backward", m._backward, "CPU")
print(m._error(cpu, 3, 12, 6))
weights = list(DynamicPositionBias(48, 24).parameters())
ours, plain = m.position_bias(weights, 2, False), m.layer_by_layer(weights, 2, False)
grads = [torch.autograd.grad((y * y).sum(), weights) for y in (ours, plain)]
assert torch.allclose(ours, plain, atol=1e-5)
assert all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*grads))
"""


def test_kernels_have_the_layers_numbers():
    """Interpreted by Triton on the CPU, for widths that fill no tile."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", KERNELS], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, TRITON_INTERPRET="1"), check=True)
    assert max(map(float, done.stdout.split())) < 1e-4


def test_kernels_compile_for_hopper():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from models.gpu import position_bias_kernels
    function = position_bias_kernels.backward
    kinds = dict(dict.fromkeys(("group", "dim", "heads", "size"), "i32"), RESIDUAL="constexpr")
    source = triton.compiler.ASTSource(fn=function, signature={name: kinds.get(name, "*fp32") for name in function.arg_names},
                                       constexprs={(function.arg_names.index("RESIDUAL"),): False})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8)).asm["cubin"]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.namespace)
        return function(*args, **(kwargs or {}))


def test_on_cuda_the_bias_is_one_operation():
    with FakeTensorMode(), torch.device("cuda"):
        dpb = DynamicPositionBias(12, 6)
        with Operations() as operations:
            table = dpb.cached_table(7, torch.device("cuda"))
        assert table.shape == (169, 6) and [name for name in operations.names if name != "prim"] == ["cross_scale_bias"]
        wide = DynamicPositionBias(65, 6)
        assert not gpu_position_bias.fits(list(wide.parameters()))
        with Operations() as operations:
            assert wide.cached_table(7, torch.device("cuda")).shape == (169, 6)
        assert "cross_scale_bias" not in operations.names
    assert not gpu_position_bias.fits(list(nn.Linear(2, 2).parameters()))


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    assert gpu_position_bias._error(torch.device("cuda")) < 1e-3
