"""The layer norm for CUDA: its kernels by Triton's interpreter and compiler, the operation and its use on tensors without numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from models import cpu_bf16, swin
from models.crossformer import Block
from models.gpu import layer_norm as gpu_norm
from models.gpu.group_attention import to_groups
from models.layers import DropPath, PatchMerging

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def plain(x: Tensor, weight: Tensor, bias: Tensor, group: int, interval: int) -> Tensor:
    """What the operation stands for, step by step."""
    y = F.layer_norm(x, x.shape[-1:], weight, bias)
    if not group:
        return y
    span = group * interval
    return to_groups(F.pad(y, (0, 0, 0, -x.shape[2] % span, 0, -x.shape[1] % span)), group, interval)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(len(shape) + shape[-1])
    x = (3 * torch.randn(shape, dtype=torch.float64) + 1).to(dtype)
    return x.requires_grad_(), torch.randn(shape[-1], requires_grad=True), torch.randn(shape[-1], requires_grad=True)


def distances(shape: tuple[int, ...], group: int, interval: int, dtype: torch.dtype, result: torch.dtype, use: str = "alone",
              ) -> list[tuple[torch.dtype, float]]:
    """Types and relative errors of results and gradients beside the plain form in fp64.

    Args:
        use: the norm ``alone``; with a gradient of the ``skip`` beside it; behind a ``sum`` with a branch, or one ``scaled`` by sample.
    """
    x, weight, bias = inputs(shape, dtype)
    given = [x, weight, bias] + ([torch.randn(shape).to(result).requires_grad_()] if use in ("sum", "scaled") else [])
    factor = torch.tensor([0.0, 1.25, 1.5])[:shape[0]] if use == "scaled" else None
    exact = [t.detach().double().requires_grad_() for t in given]
    ours = gpu_norm.layer_norm(x, weight, bias, 1e-5, result, group, interval, *given[3:], factor=factor)
    branch = exact[3] if len(given) > 3 else torch.zeros(())
    total = exact[0] + (branch if factor is None else branch * factor.view(-1, *(1,) * (len(shape) - 1)))
    # What is normed is the sum as it is stored, rounded to its type.
    stored = total + (ours[1].detach().double() - total.detach())
    theirs = plain(stored, *exact[1:3], group, interval), total
    assert ours[0].dtype == result and ours[1].dtype == dtype and ours[0].shape == theirs[0].shape
    grads = [torch.randn(t.shape).to(t.dtype) for t in ours]
    if use == "alone":
        ours, theirs, grads = ours[:1], theirs[:1], grads[:1]
    pairs = [*zip(ours, theirs, strict=True), *zip(torch.autograd.grad(ours, given, grads),
                                                  torch.autograd.grad(theirs, exact, [g.double() for g in grads]), strict=True)]
    assert [pair[0].dtype for pair in pairs[len(ours):]] == [t.dtype for t in given]
    return [(a.dtype, float((a.detach().double() - b.detach()).norm() / b.detach().norm())) for a, b in pairs]


@pytest.mark.parametrize(("height", "width", "group", "interval"), [(8, 8, 4, 2), (9, 13, 4, 1), (14, 28, 7, 2), (5, 3, 2, 3)])
def test_places_are_those_of_to_groups(height: int, width: int, group: int, interval: int) -> None:
    pixels = torch.arange(1, height * width + 1).view(1, height, width, 1)
    span = group * interval
    groups = to_groups(F.pad(pixels, (0, 0, 0, -width % span, 0, -height % span)), group, interval).flatten()
    places = gpu_norm.group_places(height, width, group, interval, CPU).long()
    assert torch.equal(groups[places[:height * width]], pixels.flatten()) and not groups[places[height * width:]].any()
    assert torch.equal(places.sort().values, torch.arange(len(groups)))


@pytest.mark.parametrize(("group", "interval"), [(0, 1), (2, 1), (2, 2), (3, 2), (5, 1)])
def test_the_operation_without_triton(group: int, interval: int) -> None:
    x, weight, bias = (t.detach().double().requires_grad_() for t in inputs((2, 7, 5, 6)))
    branch, factor = torch.randn(2, 7, 5, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0.0, 1.5])
    for more in ((), (branch,), (branch, factor)):
        sizes = 1e-5, torch.float64, group, interval
        assert torch.autograd.gradcheck(lambda *t: gpu_norm.layer_norm(*t[:3], *sizes, *t[3:]), (x, weight, bias, *more))  # noqa: B023
        with torch.inference_mode():
            y, total = gpu_norm.layer_norm(x, weight, bias, *sizes, *more)
        expected = x if not more else x + branch * (factor.view(2, 1, 1, 1) if more[1:] else 1)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y, plain(expected, weight, bias, group, interval), rtol=1e-12, atol=1e-12)


CASES = [
    ((2, 8, 8, 16), 4, 2, torch.float32, torch.float32, "skip"),
    ((1, 14, 14, 48), 7, 2, torch.float32, torch.bfloat16),
    ((1, 16, 8, 48), 1, 8, torch.float32, torch.float32),
    ((3, 5, 7, 96), 4, 1, torch.bfloat16, torch.bfloat16),  # padded, rows that fill no tile
    ((2, 3, 2, 100), 14, 1, torch.float16, torch.float16, "scaled"),
    ((3, 11, 96), 0, 1, torch.float32, torch.bfloat16, "scaled"),
    ((3, 5, 96), 0, 1, torch.bfloat16, torch.bfloat16, "scaled"),
    ((2, 3, 3, 384), 0, 1, torch.float32, torch.float16, "sum"),
    ((2, 3, 3, 768), 3, 1, torch.float32, torch.float32),  # groups in order already
    ((9, 768), 0, 1, torch.bfloat16, torch.float32),
    ((1, 3, 3, 1536), 2, 1, torch.float32, torch.float32),
]


def run_kernels() -> None:
    """In a process of its own, where Triton interprets its kernels."""
    for case in CASES:
        # A kernel on a CPU may cut off what it rounds to bf16 on a GPU.
        for kind, error in (errors := distances(*case)):
            assert error < (4e-7 if kind == torch.float32 else torch.finfo(kind).eps), (case, errors)
    assert not gpu_norm.KERNELS.failed
    x, weight, bias = inputs((2, 9, 9, 48), torch.float32)
    with torch.no_grad():
        assert torch.equal(gpu_norm.layer_norm(x, weight, bias, 1e-5, torch.float32, 4, 2)[0] == 0, plain(x, weight, bias, 4, 2) == 0)


def test_the_kernels_interpreted() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", "from tests.models.gpu.test_gpu_layer_norm import run_kernels; run_kernels()"], cwd=ROOT,
                          env=dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"),
                          capture_output=True, text=True, timeout=300)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this Triton (3.6 was seen) fails with this numpy")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("arch", "channels", "dtype", "result", "absent"), [
    (90, 96, "*fp32", "*bf16", "branch factor total skip to_branch"), (90, 96, "*fp32", "*bf16", "places"),
    (90, 768, "*fp32", "*bf16", "places factor"), (80, 100, "*bf16", "*fp16", "branch factor total to_branch places")])
def test_the_kernels_compile_without_spilled_registers(arch: int, channels: int, dtype: str, result: str, absent: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.gpu import layer_norm_kernels as kernels
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no tools for CUDA")
    for kernel, tile in ((kernels._forward_kernel, kernels._FORWARD_TILE), (kernels._backward_kernel, kernels._BACKWARD_TILE)):
        width = kernels._power_of_two(channels)
        names = kernel.arg_names
        constants = dict(CHANNELS=channels, WIDTH=width, ROWS=tile // width) | {name: None for name in absent.split() if name in names}
        types = {**dict.fromkeys(("x", "to_x", "total", "skip"), dtype), **dict.fromkeys(("y", "grad", "branch", "to_branch"), result),
                 **dict.fromkeys(kernels._SIZES, "i32"), "places": "*i32", "eps": "fp32"}
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=4))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(made.asm["cubin"])
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said.stdout + said.stderr)
        assert found is not None and (found[2], found[3]) == ("0", "0")
        warps = kernels._RESIDENT_WARPS["to_branch" not in absent] if kernel is kernels._backward_kernel else 20
        assert int(found[1]) * 32 * warps <= 65536, f"{found[1]} registers"


class Operations(TorchDispatchMode):
    """Collects names of operations and the tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, (tuple, list)) and made else made
        if isinstance(first, Tensor):
            self.seen.append((func._schema.name, first))
        return made

    def of(self, name: str) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        return [(made.dtype, tuple(made.shape)) for seen, made in self.seen if seen == name]


OURS, TORCHS = "crossformer::layer_norm", "aten::native_layer_norm"


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on a GPU that is not there, under its autocast to bf16."""
    monkeypatch.setattr(gpu_norm.KERNELS, "module", SimpleNamespace())
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad():
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


def test_types_and_cases_on_a_gpu(fake_gpu: None) -> None:
    large = torch.empty(256, 56, 56, 96, device="cuda")
    for kind, result in ((cpu_bf16.LayerNorm, torch.float32), (cpu_bf16.LayerNormForProducts, torch.bfloat16)):
        norm = kind(96, device="cuda")
        for x, dtype in ((large, result), (large.bfloat16(), result)):
            with Operations() as operations:
                assert norm(x).dtype == dtype
            assert operations.of(OURS) == [(dtype, (256, 56, 56, 96))] and not operations.of(TORCHS)
        torch.set_autocast_enabled("cuda", False)
        assert gpu_norm.fuses(norm, large) and norm(large).dtype == torch.float32
        assert not gpu_norm.fuses(norm, large.bfloat16())
        norm = kind(96, device="cuda", dtype=torch.bfloat16)
        assert gpu_norm.fuses(norm, large.bfloat16()) and norm(large.bfloat16()).dtype == torch.bfloat16
        torch.set_autocast_enabled("cuda", True)
    norm = cpu_bf16.LayerNorm(96, device="cuda")
    assert not gpu_norm.fuses(norm, large[:1, :7]) and not gpu_norm.fuses(norm, large.double())
    assert not gpu_norm.fuses(nn.LayerNorm(96, device="cuda"), large)
    for other in (dict(bias=False), dict(elementwise_affine=False)):
        assert not gpu_norm.fuses(cpu_bf16.LayerNorm(96, device="cuda", **other), large)
    assert not gpu_norm.fuses(cpu_bf16.LayerNorm((56, 96), device="cuda"), large)
    gpu_norm.KERNELS.failed = "Triton is broken"
    try:
        assert not gpu_norm.fuses(norm, large)
    finally:
        gpu_norm.KERNELS.failed = ""


def test_a_block_on_a_gpu_norms_into_groups_and_into_the_products_type(fake_gpu: None) -> None:
    with torch.device("cuda"):
        block = Block(96, 3, 14, interval=2, position="none")  # groups too large for ``group_attention``
        small = Block(96, 3, 7, interval=2, position="none")
    for size in (56, 50):  # the second is padded to 56
        x = torch.empty(64, size, size, 96, device="cuda")
        with Operations() as operations:
            assert block(x).shape == x.shape
        assert operations.of(OURS) == [(torch.bfloat16, (64 * 16, 196, 96)), (torch.bfloat16, (64, size, size, 96))]
        assert operations.of("aten::add").count((torch.float32, tuple(x.shape))) == 1  # the first branch is added where its sum is normed
        assert not operations.of(TORCHS)
        handle = block.norm1.register_forward_hook(lambda norm, args, y: y)
        with Operations() as operations:
            block(x)
            small(x)
        handle.remove()
        assert operations.of(OURS) == 4 * [(torch.bfloat16, (64, size, size, 96))]  # a hook is given the map


def test_a_failing_triton_is_one_notice_and_torchs_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler")
    for name, value in (("module", SimpleNamespace(INTERPRETED=True, forward=fail, backward=fail)), ("failed", ""), ("_tried", set())):
        monkeypatch.setattr(gpu_norm.KERNELS, name, value)
    with pytest.warns(UserWarning, match="C compiler") as notices:
        errors = [error for use in ("alone", "scaled") for _, error in distances((2, 7, 5, 12), 2, 2, torch.float32, torch.float32, use)]
    assert len(notices) == 1 and max(errors) < 1e-6


def test_which_norms_come_in_the_products_type() -> None:
    model = swin.build("tiny", dict(embed_dim=16, depths=(1, 1, 1), num_heads=(1, 1, 1), window_size=4, num_classes=3), (32, 32))
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    marked = {name for name, kind in kinds.items() if kind is cpu_bf16.LayerNormForProducts}
    assert marked == {name for name in kinds if re.search(r"blocks.*norm[12]|downsample.norm", name)} and len(marked) == 8
    assert type(PatchMerging(8).norm) is cpu_bf16.LayerNormForProducts
    assert not any(type(m) is cpu_bf16.LayerNormForProducts for m in timm.create_model("swin_tiny_patch4_window7_224").modules())


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "group", "interval", "dtype"), [
    (56, 14, 4, torch.bfloat16), (50, 14, 2, torch.bfloat16), (56, 14, 1, torch.float16)])
def test_on_a_gpu(size: int, group: int, interval: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block beside the plain form: values, gradients, the same bits again, in a CUDA graph, and with activations computed again."""
    class Product(nn.Module):
        """In place of attention, whose gradients differ between repeats."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.num_heads, self.attn_drop = nn.Linear(96, 96), 3, nn.Dropout(0.0)

        def forward(self, groups: Tensor, group: int, mask: Tensor | None) -> Tensor:
            return self.linear(groups)

    torch.manual_seed(0)
    block = Block(96, 3, group, interval, position="none")
    block.attn = Product()
    nn.init.normal_(block.cuda().norm1.weight)
    x = torch.randn(8, size, size, 96, device="cuda", requires_grad=True)
    parameters = [block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias]

    def run(recompute: bool = False) -> list[Tensor]:
        with torch.autocast("cuda", dtype):
            y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return [y, *torch.autograd.grad(y.float().square().mean() * 1024, (x, *parameters))]
    results = run()
    assert not gpu_norm.KERNELS.failed
    assert all(torch.equal(a, b) for other in (run(), run(recompute=True)) for a, b in zip(results, other, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, captured, strict=True))
    block.drop_path = DropPath(0.5).cuda()
    torch.manual_seed(1)
    dropped = run()
    monkeypatch.setattr(gpu_norm, "LEAST_NUMBERS", 2 ** 40)
    torch.manual_seed(1)
    plain_dropped = run()
    block.drop_path = nn.Identity()
    for ours, theirs in zip([*results, *dropped], [*run(), *plain_dropped], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2 * torch.finfo(dtype).eps
    x32 = torch.randn(64, 28, 28, 192, device="cuda", requires_grad=True)
    norm = cpu_bf16.LayerNorm(192).cuda()
    slow = [y := norm(x32), *torch.autograd.grad(y.sin().sum(), (x32, norm.weight, norm.bias))]
    monkeypatch.setattr(gpu_norm, "LEAST_NUMBERS", 0)
    fast = [y := norm(x32), *torch.autograd.grad(y.sin().sum(), (x32, norm.weight, norm.bias))]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
