"""The roofline counts what operations launch and move on a GPU that is not there, and its paces give back what was measured."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import roofline as script
import torch
import torch.nn.functional as F
from torch import nn

from config import get_config
from utils.profiling import measured_steps as measured
from utils.profiling.fake_gpu import DEVICE, backward, fake_gpu
from utils.profiling.kernel_costs import BANDWIDTH, LAUNCH, Kernels
from utils.profiling.roofline import Recorder, record, step_seconds, sums, total

BF16 = torch.bfloat16


def recorded(work) -> dict[str, Kernels]:
    with fake_gpu(), Recorder() as recorder:
        work()
    return {row.name: row for row in sums(recorder.kernels)}


def made(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=grad)


def test_a_linear_and_its_gradients() -> None:
    def work() -> None:
        F.linear(made(1000, 64, grad=True), made(32, 64, grad=True), made(32, grad=True)).backward(made(1000, 32))

    rows = recorded(work)
    assert rows.keys() == {"addmm", "mm", "sum"}
    assert (rows["addmm"].launches, rows["addmm"].flops) == (1, 2 * 1000 * 32 * 64)
    assert (rows["addmm"].read, rows["addmm"].written) == (2 * (32 + 1000 * 64 + 64 * 32), 2 * 1000 * 32)
    assert rows["mm"].flops == 2 * 2 * 1000 * 32 * 64 and rows["sum"].read == 2 * 1000 * 32
    assert rows["sum"].least == pytest.approx(2 * 1001 * 32 / BANDWIDTH) and rows["sum"].expected > rows["sum"].least


def test_views_launch_nothing_and_copies_count_what_they_move() -> None:
    def work() -> None:
        x = made(8, 16, 32)
        x.transpose(0, 1).unsqueeze(0)[0, :3].expand(2, 3, 8, 32).detach()
        x.float()
        x.transpose(0, 1).contiguous()
        made(1, 16, 32).expand(8, 16, 32).contiguous()

    rows = recorded(work)
    size = 8 * 16 * 32
    assert rows.keys() == {"copy"} and rows["copy"].launches == 3
    assert (rows["copy"].read, rows["copy"].written) == (2 * size + 2 * size + 2 * size // 8, 4 * size + 2 * size + 2 * size)


def test_narrow_rows_of_a_layer_norm_are_slow() -> None:
    rows = recorded(lambda: F.layer_norm(made(4096, 64, dtype=torch.float32), (64,)))
    row = rows["native_layer_norm"]
    assert (row.launches, row.read, row.written) == (1, 4 * 4096 * 64, 4 * (4096 * 64 + 2 * 4096)) and row.expected > 5 * row.least


def test_attention_with_a_bias_is_the_memory_efficient_kernel_and_flash_without() -> None:
    q, bias = [4, 3, 49, 32], [1, 3, 49, 49]
    rows = recorded(lambda: F.scaled_dot_product_attention(made(*q), made(*q), made(*q), attn_mask=made(*bias)))
    assert rows["_efficient_attention_forward"].flops == 4 * 4 * 3 * 49 * 49 * 32
    assert "_flash_attention_forward" in recorded(lambda: F.scaled_dot_product_attention(made(*q), made(*q), made(*q)))
    assert "bmm" in recorded(lambda: F.scaled_dot_product_attention(*(made(4, 3, 49, 30) for _ in range(3)), attn_mask=made(*bias)))


def test_convolutions_keep_the_layout_of_their_input_and_few_channels_are_slow() -> None:
    def work(out: int, last: bool) -> torch.Tensor:
        x, conv = made(256, 32, 28, 28), nn.Conv2d(32, out, 3, padding=1, device=DEVICE, dtype=BF16)
        y = conv(x.contiguous(memory_format=torch.channels_last) if last else x)
        y.backward(torch.empty_like(y))
        return y

    with fake_gpu(), Recorder():
        assert work(16, True).is_contiguous(memory_format=torch.channels_last) and work(16, False).is_contiguous()
    wide, few = (recorded(lambda out=out: work(out, True)) for out in (64, 12))
    assert wide["convolution"].flops == 2 * 256 * 64 * 28 * 28 * 32 * 9 and wide["convolution_backward"].flops == wide["convolution"].flops
    assert few["convolution_backward"].expected > 2 * wide["convolution_backward"].expected


def test_an_operation_unknown_to_torch_is_one_kernel_at_four_fifths_of_the_peak() -> None:
    @torch.library.custom_op("roofline_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no kernel is started")

    @torch.library.custom_op("roofline_test::twice_into", mutates_args=("y",))
    def twice_into(x: torch.Tensor, y: torch.Tensor) -> None:
        raise AssertionError("no kernel is started")

    twice.register_fake(torch.empty_like)
    twice_into.register_fake(lambda x, y: None)
    for row in recorded(lambda: (twice(made(10_000_000)), twice_into(made(10_000_000), made(10_000_000)))).values():
        assert (row.launches, row.read, row.written) == (1, 20_000_000, 20_000_000) and row.expected == pytest.approx(4e7 / (0.8 * 4.8e12))


def tiny(*opts: object):
    node = dict(EMBED_DIM=32, DEPTHS=[1, 2], NUM_HEADS=[1, 2], GROUP_SIZE=[4, 4], INTERVAL=[4, 2], MERGE_SIZE=[[2, 4]])
    return get_config(None, ["DATA.BATCH_SIZE", "24", "DATA.IMG_SIZE", "64", "MODEL.NUM_CLASSES", "10", "MODEL.NAME", "tiny",
                             *(item for key, value in node.items() for item in (f"MODEL.CROSSFORMER.{key}", value)), *map(str, opts)])


def test_a_step_of_a_model() -> None:
    """Launches do not go with the batch; products do; the update is there; a forward pass is a third of the products."""
    step, forward, double = (record(tiny("DATA.BATCH_SIZE", size), inference) for size, inference in ((24, False), (24, True), (48, True)))
    assert total(forward).launches == total(double).launches
    assert total(double).flops == pytest.approx(2 * total(forward).flops, rel=0.01)
    assert 2 < total(step).flops / total(forward).flops < 3.2
    assert step_seconds(total(step), graphs=True) < step_seconds(total(step), graphs=True, pessimistic=True)
    names = {row.name for row in sums(step)}
    assert {"_fused_adamw", "_foreach_norm", "gelu"} <= names and any("attention_backward" in name for name in names)
    assert not {name for name in names if "backward" in name or "adam" in name} & {row.name for row in sums(forward)}
    assert step_seconds(total(step)) == total(step).launches * LAUNCH > step_seconds(total(step), graphs=True)


CALLS = Path(__file__).with_name("crossformer_small_calls.tsv")  # times, operation, its arguments: what a step called at measured.COMMIT


def read(value: object) -> object:
    """An argument as ``CALLS`` has it: ``@type:shape/strides`` is a tensor, ``#`` a word of torch's."""
    if isinstance(value, list):
        return [read(part) for part in value]
    if isinstance(value, dict):
        return {name: read(part) for name, part in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("#"):
        return DEVICE if value == "#device" else getattr(torch, value[1:])
    kind, _, sizes = value[1:].partition(":")
    shape, *strides = [[int(n) for n in part.split("x") if n] for part in sizes.split("/")]
    dtype = getattr(torch, kind.replace("bf16", "bfloat16").replace("f32", "float32"))
    return torch.empty_strided(shape, *strides, dtype=dtype, device=DEVICE) if strides else made(*shape, dtype=dtype)


def test_the_paces_give_back_what_was_measured_of_crossformer_small() -> None:
    """Its calls as they were then (but for the lists of tensors of clipping and AdamW), since the program has changed."""
    kernels: list[Kernels] = []
    with fake_gpu():
        for line in CALLS.read_text().splitlines():
            times, name, args, *kwargs = line.split("\t")
            func, recorder = functools.reduce(getattr, name.split("."), torch.ops.aten), Recorder()
            args, kwargs = read(json.loads(args)), read(json.loads(kwargs[0])) if kwargs else {}
            with recorder:
                func(*args, **kwargs)
            kernels += recorder.kernels * int(times)
    whole, rows = total(kernels), {row.name: row for row in sums(kernels)}
    assert whole.launches == pytest.approx(measured.LAUNCHES, rel=0.05)
    assert 1e3 * whole.expected == pytest.approx(measured.MILLISECONDS, rel=0.1)
    for name, milliseconds in measured.BY_OPERATION.items():
        if milliseconds > 2:
            assert 1e3 * rows[name].expected == pytest.approx(milliseconds, rel=0.25), name


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * weight

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def test_gradients_walk_through_the_graph_as_torchs_engine_does() -> None:
    """Parameters that two branches share or none reaches, broadcasting, types that change, several results: on the CPU, with numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.BatchNorm2d(8), nn.Flatten(2), nn.LayerNorm(36), nn.Linear(36, 6))
    x, unreached = torch.randn(2, 3, 8, 8), nn.Parameter(torch.ones(6))

    def gradients(run) -> list[torch.Tensor]:
        model.zero_grad()
        y = WithoutGradient.apply(model(x), unreached)
        first, second, third = (y + model[5](torch.ones(36)).bfloat16().float() * y.detach()).chunk(3, dim=-1)
        run(first.sum() + second.exp().mean() + (third * first).sum())
        return [p.grad.clone() for p in model.parameters()]

    for own, theirs in zip(gradients(backward), gradients(torch.Tensor.backward), strict=True):
        torch.testing.assert_close(own, theirs)
    assert unreached.grad is None


def test_the_script_prints_tables(capsys, tmp_path) -> None:
    assert script.main(["--model", "pvt_tiny", "--batch", "2", "--inference", "--json", str(tmp_path / "r.json")]) == 0
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert "addmm" in out and f"together{figures['together']['launches']:>35d}" in out
    assert script.main(["--batch", "0"]) == 2 and capsys.readouterr().err.startswith("error: ")
