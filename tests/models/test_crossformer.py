"""CrossFormer and CrossFormer++: groups, attention and padding number by number, initial values, group sizes, ablations."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from models import crossformer, layers
from models.crossformer import PADDED_KEY, Attention, Block, CrossFormer, from_groups, group_size_of, to_groups
from models.position_bias import PositionTable, relative_offsets

TINY = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),))


def tiny(**kwargs) -> CrossFormer:
    torch.manual_seed(0)
    return CrossFormer(**dict(dict(TINY, num_classes=5, drop_path_rate=0.0), **kwargs))


@torch.no_grad()
@pytest.mark.parametrize(("group", "interval", "shape"), [(4, 1, (8, 12)), (4, 2, (16, 8)), (2, 3, (12, 6))])
def test_groups_are_what_the_paper_says(group: int, interval: int, shape: tuple[int, int]) -> None:
    """Member (gy, gx) of the group of a token lies ``interval`` apart, and ungrouping undoes grouping."""
    height, width = shape
    x = torch.arange(height * width, dtype=torch.float32).view(1, height, width, 1)
    groups = to_groups(x, group, interval)[..., 0].long()
    expected = set()
    span = group * interval
    for row in range(height // span):
        for column in range(width // span):
            for iy in range(interval):
                for ix in range(interval):
                    expected.add(tuple((row * span + gy * interval + iy) * width + column * span + gx * interval + ix
                                       for gy in range(group) for gx in range(group)))
    assert {tuple(g) for g in groups.tolist()} == expected
    assert torch.equal(from_groups(to_groups(x, group, interval), 1, height, width, group, interval), x)


@torch.no_grad()
def test_attention_equals_a_loop_over_pairs() -> None:
    torch.manual_seed(1)
    group, heads, dim = 3, 2, 32
    attention = Attention(dim, heads).eval()
    for p in attention.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, group * group, dim)
    mask = torch.zeros(2, 1, 1, group * group)
    mask[1, ..., 5:] = PADDED_KEY
    ours = attention(x, group, mask)
    q, k, v = attention.qkv(x).split(dim, dim=-1)
    width = dim // heads
    expected = torch.zeros(2, group * group, dim)
    for b in range(2):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(group * group):
                keys = range(group * group if b == 0 else 5)
                offsets = torch.tensor([[i // group - j // group, i % group - j % group] for j in keys], dtype=torch.float32)
                bias = attention.pos(offsets)[:, h]
                logits = torch.stack([q[b, i, part] @ k[b, j, part] for j in keys]) * width ** -0.5 + bias
                expected[b, i, part] = torch.softmax(logits, 0) @ torch.stack([v[b, j, part] for j in keys])
    assert torch.allclose(ours, attention.proj(expected), atol=1e-5)


@torch.no_grad()
def test_padding_does_not_reach_real_tokens() -> None:
    """A map that needs padding gives what a long way round gives: attention among the real members of each group only."""
    torch.manual_seed(2)
    block = Block(32, 2, group_size=4, interval=2).eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(1, 9, 11, 32)
    ours = block.attend_groups(x)
    expected = torch.zeros_like(x)
    for ry in range(2):
        for rx in range(2):
            for iy in range(2):
                for ix in range(2):
                    cells = [(ry * 8 + gy * 2 + iy, rx * 8 + gx * 2 + ix, gy, gx) for gy in range(4) for gx in range(4)]
                    real = [c for c in cells if c[0] < 9 and c[1] < 11]
                    if not real:
                        continue
                    tokens = torch.stack([x[0, c[0], c[1]] for c in real])
                    q, k, v = block.attn.qkv(tokens).view(len(real), 3, 2, 16).permute(1, 2, 0, 3)
                    offsets = torch.tensor([[a[2] - b[2], a[3] - b[3]] for a in real for b in real], dtype=torch.float32)
                    bias = block.attn.pos(offsets).view(len(real), len(real), 2).permute(2, 0, 1)
                    out = torch.softmax(q @ k.transpose(1, 2) / 4 + bias, -1) @ v
                    for c, y in zip(real, block.attn.proj(out.transpose(0, 1).reshape(len(real), 32)), strict=True):
                        expected[0, c[0], c[1]] = y
    assert torch.allclose(ours, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("shape", "group", "interval"), [((200, 336), 14, 16), ((100, 168), 14, 8), ((50, 84), 7, 2), ((25, 42), 7, 1)])
def test_what_padding_holds_reaches_no_real_token_at_detection_size(shape: tuple[int, int], group: int, interval: int,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The four stages of an image of 800 x 1344 with the large groups of the paper's detectors, to the bit."""
    torch.manual_seed(2)
    block, x = Block(16, 1, group_size=group, interval=interval).eval(), torch.randn(1, *shape, 16)
    zeros, pad = block.attend_groups(x), torch.nn.functional.pad

    def noisy(tokens: torch.Tensor, sides: tuple[int, ...], value: float | None = None) -> torch.Tensor:
        if value is not None:  # the mask's
            return pad(tokens, sides, value=value)
        where = pad(torch.ones_like(tokens), sides)
        return torch.where(where > 0, pad(tokens, sides), torch.randn(where.shape))

    monkeypatch.setattr(crossformer, "F", SimpleNamespace(pad=noisy))
    assert torch.equal(block.attend_groups(x), zeros)
    block.mask_padding = False
    assert not torch.equal(block.attend_groups(x), zeros)


@torch.no_grad()
def test_detection_size_in_bf16() -> None:
    model = timm.create_model("crossformer_tiny", features_only=True).eval().bfloat16()
    maps = model(torch.randn(1, 3, 800, 1333, dtype=torch.bfloat16))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 200, 334), (128, 100, 167), (256, 50, 84), (512, 25, 42)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_initialisation_and_drop_path_schedule() -> None:
    model = timm.create_model("crossformer_tiny")
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert abs(weights.mean()) < 1e-4 and abs(weights.std() - 0.02) < 1e-4
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))
    kernel = model.layers[0].downsample.reductions[0].weight  # torch's default: uniform within 1/sqrt(fan-in)
    assert abs(kernel.abs().max() - (64 * 4) ** -0.5) < 1e-3
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 16).tolist())


def test_amplitude_cooling_sits_after_every_third_block_but_the_last() -> None:
    model = tiny(depths=(6, 3), use_acl=True)
    assert [[b.ex_conv is not None for b in stage.blocks] for stage in model.layers] == [[False, False, True, False, False, False],
                                                                                         [False, False, False]]


def test_group_size_rules() -> None:
    at = lambda rule, block, stage, index, size: group_size_of(rule, 14, block, 24, stage, index, 56, size)  # noqa: E731
    assert at("constant", 9, 2, 5, 14) == 14
    assert [at("7_14", 4 + i, 2, i, 14) for i in (0, 3, 4)] == [7, 7, 14] and at("7_14", 0, 0, 0, 56) == 14
    share = 4 / 56 + 3 * (1 - 4 / 56) / 24
    assert at("linear", 3, 1, 1, 28) == math.ceil(share * 28) and at("linear", 0, 0, 0, 56) == 4
    assert at("linear_div", 12, 2, 8, 14) == 7 and at("linear_div", 20, 2, 16, 14) == 14
    assert at("alter", 14, 2, 10, 14) == 7 and at("alter", 15, 2, 11, 14) == 14 and at("alter", 23, 3, 1, 7) == 7


def test_backward_repeats_itself_on_two_threads() -> None:
    """At 224 pixels and two threads, where table[index] instead of index_select was seen to differ."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        model = CrossFormer(embed_dim=32, depths=(1, 1), num_heads=(2, 4), group_size=(7, 7), interval=(8, 4), merge_size=((2, 4),),
                            drop_path_rate=0.0)
        x = torch.randn(2, 3, 224, 224)
        runs = []
        for _ in range(4):
            model.zero_grad()
            model(x).square().sum().backward()
            runs.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_one_graph_for_training() -> None:
    model = tiny(drop_path_rate=0.1).train()
    x = torch.randn(2, 3, 40, 40)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-5)


@pytest.mark.parametrize("kwargs", [
    dict(patch_size=(4,), merge_size=((2,),)), dict(attention="sda"), dict(attention="lda"), dict(position="dpb_residual"),
    dict(position="table"), dict(position="none"), dict(position="none", ape=True)])
def test_ablations_of_the_paper(kwargs: dict) -> None:
    """Each override builds, learns in every parameter and takes sizes that clamp and pad the groups."""
    model = tiny(embed_dim=32, img_size=64, **kwargs)
    for size in ((64, 64), (36, 44), (12, 8)):
        model(torch.randn(2, 3, *size)).square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all(name.endswith("pos3.2.bias") for name in silent), silent


def test_ablations_are_what_they_say() -> None:
    intervals = {kind: [b.interval for b in tiny(depths=(2, 2), interval=(4, 2), attention=kind).layers[0].blocks]
                 for kind in ("lsda", "sda", "lda")}
    assert intervals == {"lsda": [1, 4], "sda": [1, 1], "lda": [4, 4]}
    table = PositionTable(4, 2)
    full = table(relative_offsets(4, torch.device("cpu")))
    assert torch.equal(full, table.table)
    inner = table(relative_offsets(2, torch.device("cpu")))  # a clamped group reads the middle of the table
    assert torch.equal(inner, table.table.view(7, 7, 2)[2:5, 2:5].reshape(9, 2))
    assert tiny(position="table").no_weight_decay() == {"layers.0.blocks.0.attn.pos.table", "layers.1.blocks.0.attn.pos.table",
                                                        "layers.1.blocks.1.attn.pos.table"}


@torch.no_grad()
def test_drop_path_in_one_pass() -> None:
    x, branch, path = torch.randn(8, 2, 2, 4), torch.randn(8, 2, 2, 4), layers.DropPath(0.5)
    torch.manual_seed(5)
    expected = x + path(branch)
    torch.manual_seed(5)
    assert torch.allclose(layers.add_branch(x, branch, path), expected)
    assert torch.equal(layers.add_branch(x, branch, path.eval()), x + branch)
    assert torch.equal(layers.add_branch(x, branch, nn.Identity()), x + branch)


@pytest.mark.parametrize("low", [False, True])
def test_residual_stream_of_the_first_stage(low):
    """In autocast's type when that is asked for; without autocast the option changes nothing."""
    model, tokens = tiny(low_precision_residual=low), torch.randn(1, 8, 8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.place(tokens).dtype == (torch.bfloat16 if low else torch.float32)
        assert torch.equal(model.place(tokens), tokens.to(torch.bfloat16) if low else tokens)
    assert torch.equal(model.place(tokens), tokens)
