"""Depthwise convolutions as a GPU computes them: exact on the CPU too; their kernels in Triton's interpreter, and compiled for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import tiny
from gradients import close, gradients
from torch import Tensor, nn

from models import mpvit, ops
from models.gpu import depthwise as gpu_depthwise

# kernel, stride, (height, width), channels, skip, a slice of a wider map's channels, whether kernels reach less far in some channels
CASES = [(3, 1, (6, 9), 10, True, False, False), (3, 2, (7, 4), 8, False, True, False), (5, 2, (3, 10), 6, False, True, False),
         (5, 1, (9, 3), 3, True, False, False), (7, 1, (2, 3), 72, False, True, True), (1, 1, (2, 2), 5, True, False, False)]


def run_case(kernel: int, stride: int, size: tuple[int, int], channels: int, skip: bool, sliced: bool, reaching: bool,
             dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of ``depthwise``, and those of torch's convolution in fp64."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, *size, 3 * channels if sliced else channels, generator=generator).to(device, dtype)
    weights = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.randn(shape, generator=generator).to(device, weights) for shape in ((channels, 1, kernel, kernel), (channels,)))
    reaches, mask = None, torch.ones((), device=device)
    if reaching:
        reaches = (torch.arange(channels) // 8 % (kernel // 2 + 1)).to(device, torch.int32)
        far = (torch.arange(kernel, device=device) - kernel // 2).abs()
        mask = (torch.maximum(far[:, None], far) <= reaches[:, None, None])[:, None]

    def ours(whole: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = whole[..., channels:2 * channels] if sliced else whole
        return gpu_depthwise.depthwise(x, weight * mask, bias, stride, skip, reaches)

    def plain(whole: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = (whole[..., channels:2 * channels] if sliced else whole).permute(0, 3, 1, 2)
        y = F.conv2d(x, weight * mask, bias, stride, kernel // 2, groups=channels)
        return (x + y if skip else y).permute(0, 2, 3, 1)

    inputs = [t.requires_grad_() for t in (whole, weight, bias)]
    return gradients(ours, *inputs), gradients(plain, *(t.detach().double().requires_grad_() for t in inputs))


@pytest.mark.parametrize("case", CASES)
def test_exact(case: tuple) -> None:
    ours, plain = run_case(*case)
    assert all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, plain, strict=True))


def test_only_the_gradients_that_are_wanted() -> None:
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(6, 1, 3, 3), torch.randn(6)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        inputs = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), wanted, strict=True)]
        gpu_depthwise.depthwise(*inputs).square().sum().backward()
        assert [t.grad is not None for t in inputs] == list(wanted)
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    gpu_depthwise.depthwise(*whole).square().sum().backward()
    assert torch.allclose(inputs[2].grad, whole[2].grad) and torch.allclose(inputs[1].grad, whole[1].grad)


@pytest.mark.parametrize("family", ["mpvit", "shunted", "cvt", "pvt"])
def test_a_whole_model_in_this_form(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = tiny(family).double(), torch.randn(3, 3, 64, 64, dtype=torch.float64), []
    for training in (False, True):
        model.train(training)

        def run(*_: Tensor) -> Tensor:
            torch.manual_seed(0)  # of drop path
            return model(x)

        plain = gradients(run, *model.parameters())
        with monkeypatch.context() as patch:
            form = gpu_depthwise.convolve
            patch.setattr(gpu_depthwise, "convolve", lambda *a, form=form, **k: calls.append(a) or form(*a, **k))
            patch.setattr(gpu_depthwise, "applies", lambda x, dtype: True)
            ours = gradients(run, *model.parameters())
        assert bool(calls) == (family != "pvt")
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, plain, strict=True)), training


def test_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As COMPILE blocks has it on a GPU."""
    assert torch.compile(lambda x: x + int(gpu_depthwise._available()), fullgraph=True, backend="aot_eager")(torch.zeros(1)) == (
        gpu_depthwise._available())
    layer = next(m for m in tiny("mpvit", "MODEL.DROP_PATH_RATE", 0).double().modules() if isinstance(m, mpvit.EncoderLayer))
    x = torch.randn(2, 4, 3, 16, dtype=torch.float64, requires_grad=True)
    plain = gradients(lambda x, *_: layer(x), x, *layer.parameters())
    monkeypatch.setattr(gpu_depthwise, "applies", lambda x, dtype: True)
    layer.compile(fullgraph=True, backend="aot_eager")
    ours = gradients(lambda x, *_: layer(x, layer.crpe.joined(x.device)), x, *layer.parameters())
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, plain, strict=True))


def test_what_evaluation_leaves_can_be_trained_with() -> None:
    layer = next(m for m in tiny("mpvit").modules() if isinstance(m, mpvit.EncoderLayer))
    x = torch.randn(1, 2, 3, 16)
    with torch.inference_mode():
        layer(x, layer.crpe.joined(x.device))
    layer(x, layer.crpe.joined(x.device)).sum().backward()


def test_what_it_is_not_for() -> None:
    assert not gpu_depthwise.applies(torch.randn(1, 4, 2, 2).bfloat16(), torch.bfloat16)


def test_batch_norm_of_a_pointwise_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes it, a product of matrices: the map lies with the channels last, and comes so."""
    conv, norm, x = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(ops, "compute_dtype", lambda x: torch.bfloat16)
    y = ops._convolve(conv, x, conv.weight, None)
    monkeypatch.undo()
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.allclose(y, conv(x), atol=1e-5)
    assert torch.allclose(ops.conv_norm(conv, norm, x), norm(conv(x)), atol=1e-5)


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, __file__], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300,
                            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.returncode == 0, result.stderr


def check_kernels() -> None:
    """Run in a process of its own: Triton looks at TRITON_INTERPRET when it is imported."""
    assert "models.gpu.depthwise_kernels" not in sys.modules
    assert gpu_depthwise.KERNELS.module.INTERPRETED
    for case in CASES:
        ours, plain = run_case(*case)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, plain, strict=True)), case
    assert close(*run_case(*CASES[0], dtype=torch.bfloat16), 0.01)
    x = torch.full((3, 2, 40, 4), 1.0078125, dtype=torch.bfloat16, requires_grad=True)  # sums beyond what bf16 can count
    weight = torch.ones(4, 1, 1, 1, requires_grad=True)
    gpu_depthwise.depthwise(x, weight, None).backward(torch.ones_like(x))
    assert torch.equal(weight.grad.flatten(), torch.full((4,), 240 * 1.0078125))
    assert not gpu_depthwise.KERNELS.failed


@pytest.mark.parametrize(("kernel", "reaching"), [(3, False), (7, True)])
def test_kernels_compile_for_sm_90(kernel: int, reaching: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.gpu import depthwise_kernels as kernels
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    types = dict.fromkeys(("x", "grad", "addend", "out"), "*bf16")
    types |= dict.fromkeys(("weight", "bias", "sums"), "*fp32") | {"reaches": "*i32"}
    for function, warps in ((kernels._convolve, 8), (kernels._weight_gradient, 4)):
        constants = dict(KERNEL=kernel, STRIDE=1, TRANSPOSED=False, HAS_BIAS=True, HAS_ADDEND=True, HAS_REACHES=reaching,
                         ALIGN=8, SUM=tl.float32, SIDE=kernels.TILE, KERNEL_ROWS=kernel if kernel == 3 else 1,
                         MAP_ROWS=kernels.GRADIENT_ROWS, BLOCK_C=kernels.CHANNELS)
        signature = {name: types.get(name, "constexpr" if name.isupper() else "i32") for name in function.arg_names}
        whole = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in types}
        compiled = triton.compile(
            ASTSource(function, signature, {(i,): constants[name] for i, name in enumerate(signature) if name.isupper()}, whole),
            target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes a thread, also of 216 channels, no multiple of 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, (3, 1, (56, 56), 64, True, False, False), (3, 2, (29, 31), 216, False, False, False),
                                  (7, 1, (14, 14), 216, False, True, True)])
def test_on_cuda(case: tuple, dtype: torch.dtype) -> None:
    ours, plain = run_case(*case, dtype=dtype, device="cuda")
    assert close(ours, plain, 0.01)
    again, _ = run_case(*case, dtype=dtype, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert not gpu_depthwise.KERNELS.failed


if __name__ == "__main__":
    check_kernels()
