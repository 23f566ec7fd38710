"""Linears and the MLP as a GPU trains them: exact on the CPU too; their kernels in Triton's interpreter, and compiled for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from gradients import close, gradients
from torch import Tensor, nn
from torch.nn.utils import prune

from models.cpu_bf16 import Linear
from models.crossformer import CrossFormer
from models.gpu import linear as gpu_linear
from models.layers import Mlp

KERNELS = """
import sys, torch
from models.gpu import linear as gpu_linear
assert not [name for name in sys.modules if name.endswith("_kernels")]
assert gpu_linear.KERNELS.module.INTERPRETED
torch.manual_seed(0)
for rows, columns in ((300, 96), (37, 140), (1, 8)):
    for dtype, limit in ((torch.bfloat16, 2 ** -7), (torch.float16, 2 ** -10)):
        x, grad, slices = (torch.randn(rows, width).to(dtype) for width in (columns, columns, columns + 7))
        for t in (x, slices[:, 3:-4]):
            assert torch.allclose(torch.ops.crossformer.column_sums(t), t.double().sum(0).float(), atol=1e-4)
        to_x, sums = torch.ops.crossformer.gelu_backward_sums(grad, x)
        expected = torch.ops.aten.gelu_backward(grad.double(), x.double())
        assert torch.allclose(to_x.double(), expected, rtol=limit, atol=limit * 0.01)
        assert torch.allclose(sums, expected.sum(0).float(), atol=1e-4)
assert not gpu_linear.KERNELS.failed
"""


def plain_mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    linear = nn.functional.linear
    return linear(nn.functional.gelu(linear(x, *parameters[:2])), *parameters[2:])


@pytest.mark.parametrize("image_needs_gradient", [False, True])
def test_exact(image_needs_gradient: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=image_needs_gradient)
    parameters = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 6), (7,), (4, 7), (4,))]
    for ours, plain, number in ((gpu_linear.linear, nn.functional.linear, 2), (gpu_linear.mlp, plain_mlp, 4)):
        used = parameters[:number]
        inputs = [x, *used] if image_needs_gradient else used
        # Transposed, the gradient that comes back does not lie in rows.
        found = gradients(lambda *_, f=ours, p=used: f(x, *p, torch.float64).transpose(0, 3), *inputs)
        expected = gradients(lambda *_, f=plain, p=used: f(x, *p).transpose(0, 3), *inputs)
        assert all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_results_may_be_changed_in_place() -> None:
    """As timm's SwinV2 does with a ReLU behind a linear."""
    x, first, bias = torch.randn(2, 3, 8), torch.randn(8, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    for y in (gpu_linear.linear(x, first, bias, torch.float32), gpu_linear.mlp(x, first, bias, first, bias, torch.float32)):
        expected = torch.relu(y.detach())
        assert torch.equal(nn.functional.relu_(y), expected)
        y.sum().backward()
    assert first.grad.isfinite().all()


def test_16_bits_and_gradients_in_the_parameters_type() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 16, requires_grad=True)
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((32, 16), (32,), (16, 32), (16,))]
    ours = gradients(lambda x, *p: gpu_linear.mlp(x, *p, torch.bfloat16), x, *parameters)
    assert ours[0].dtype == torch.bfloat16 and {g.dtype for g in ours[1:]} == {torch.float32}
    assert close(ours, gradients(plain_mlp, x, *parameters), 0.02)


def test_sums_in_fp32() -> None:
    """In 16 bits nothing lies between 302 and 304."""
    x = torch.full((300, 4), 1.0078125, dtype=torch.bfloat16)
    sums = torch.ops.crossformer.column_sums(x)
    assert sums.dtype == torch.float32 and torch.equal(sums, torch.full((4,), 302.34375))


def test_a_whole_model_in_this_form(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = CrossFormer(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), num_classes=3, drop_path_rate=0.0).double()
    x, calls = torch.randn(1, 3, 64, 64, dtype=torch.float64), []
    plain = gradients(lambda *_: model(x), *model.parameters())
    for name in ("linear", "mlp"):
        form = getattr(gpu_linear, name)
        monkeypatch.setattr(gpu_linear, name, lambda *a, n=name, f=form: calls.append(n) or f(*a))
    monkeypatch.setattr(gpu_linear, "applies", lambda x, *parameters: all(p is not None for p in parameters))
    ours = gradients(lambda *_: model(x), *model.parameters())
    assert calls.count("mlp") == 5 and calls.count("linear") >= 10
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, plain, strict=True))


def test_parameters_converted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    mlp, x, sizes = Mlp(8, 20), torch.randn(6, 8), []
    parameters, copy = [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b: sizes.append(len(b)) or copy(a, b))

    def run() -> list[Tensor]:
        return gradients(lambda *p: gpu_linear.mlp(x, *p, torch.bfloat16), *parameters)

    for step in range(3):
        plain = run()
        with gpu_linear.converting_at_once(mlp):
            assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True)), step
        with torch.no_grad():
            torch._foreach_add_(parameters, 0.1)
    parameters[3].requires_grad_(False)
    with gpu_linear.converting_at_once(mlp):
        pass
    assert sizes == [4, 4, 3]  # the first pass finds out which
    gone = weakref.ref(mlp)
    del mlp
    assert gone() is None


def test_what_it_is_not_for() -> None:
    x, layer = torch.randn(4, 8).bfloat16(), Linear(8, 8)
    assert not gpu_linear.applies(x, layer.weight, layer.bias)
    mlp = Mlp(8, 16, drop=0.5)
    assert not torch.equal(mlp(x.float()), mlp(x.float()))  # dropout stays


def test_hooks_within_an_mlp_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_linear, "applies", lambda *_: True)
    mlp, x, seen = Mlp(8, 16), torch.randn(3, 8), []
    expected = mlp(x)
    mlp.act.register_forward_hook(lambda *_: seen.append(1))
    assert torch.allclose(mlp(x), expected, atol=1e-6) and seen == [1]
    prune.l1_unstructured(mlp.fc1, "weight", 0.5)  # makes the weight anew in each call
    for _ in range(2):
        mlp(x).sum().backward()
    assert int((mlp.fc1.weight_orig.grad == 0).sum()) >= 64


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-c", KERNELS], env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                            cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_kernels_compile_for_sm_90(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.gpu import linear_kernels as kernels
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for kernel, rows, tensors in ((kernels._column_sums_kernel, 32, ["x"]), (kernels._gelu_backward_kernel, 16, ["grad", "x", "to_x"])):
        types = dict.fromkeys(tensors, "*bf16") | {"sums": "*fp32"}
        signature = {name: types.get(name, "constexpr" if name.isupper() else "i32") for name in kernel.arg_names}
        whole = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in types or name in ("columns", "stride")}
        constants = {(i,): {"ROWS": rows, "COLUMNS": 128}[name] for i, name in enumerate(signature) if name.isupper()}
        compiled = triton.compile(ASTSource(kernel, signature, constants, whole), target=GPUTarget("cuda", 90, 32),
                                  options={"num_warps": 4})
        assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes a thread


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [50, 20_000])
def test_on_cuda(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(96, 200), torch.randn(rows, 96, requires_grad=True)
    plain = gradients(lambda x, *_: mlp(x), x, *mlp.parameters())
    mlp, x = mlp.cuda(), x.detach().cuda().requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        assert gpu_linear.applies(x, mlp.fc1.weight, mlp.fc1.bias)
        runs = [gradients(lambda x, *_, f=f: f(x), x, *mlp.parameters()) for f in (mlp, mlp, lambda x: mlp.fc2(mlp.act(mlp.fc1(x))))]
    assert all(close([g.cpu() for g in run], plain, 0.03) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True)) and not gpu_linear.KERNELS.failed
