"""CrossFormer and CrossFormer++: parity with reference outputs, counts, any input size, the timm protocol."""

from __future__ import annotations

import copy
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from models import base, crossformer
from models.crossformer import (
    Attention,
    Block,
    CrossFormer,
    CrossScaleEmbedding,
    from_groups,
    group_size_of,
    relative_index,
    relative_offsets,
    to_groups,
)
from tests.recipe import PROBE_INPUT, deterministic_input, deterministic_state, eps_probe, off

# Parameters, those with weight decay, state-dict keys, CRC-32 of all names and shapes, sorted.
FACTS = {
    "crossformer_tiny": (27_776_794, 27_700_576, 448, 2424896953),
    "crossformer_small": (30_657_394, 30_591_852, 344, 1081303443),
    "crossformer_base": (51_971_554, 51_843_372, 656, 924914334),
    "crossformer_large": (91_971_184, 91_800_608, 656, 148052776),
    "crossformer_pp_small": (23_325_340, 23_235_712, 676, 64308155),
    "crossformer_pp_base": (51_994_594, 51_860_652, 676, 3178598178),
    "crossformer_pp_large": (92_001_904, 91_823_648, 676, 1823029457),
    "crossformer_pp_huge": (95_962_944, 95_762_656, 892, 1666261498),
}
TINY = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),))


def tiny(**kwargs) -> CrossFormer:
    torch.manual_seed(0)
    return CrossFormer(**dict(dict(TINY, num_classes=5, drop_path_rate=0.0), **kwargs))


@torch.no_grad()
@pytest.mark.parametrize("name", ["crossformer_tiny", "crossformer_base", "crossformer_pp_small"])
def test_outputs_are_the_official_ones(name: str) -> None:
    reference = np.load(Path(__file__).parent / "reference" / f"{name}.npz")
    model = timm.create_model(name).eval()
    state = deterministic_state({key: x.shape for key, x in model.state_dict().items()})
    images = torch.from_numpy(deterministic_input(2, 3, 224, 224))
    model.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()})
    final, stages = model.forward_intermediates(images, output_fmt="NHWC")
    assert off(model.forward_head(final), reference["logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["features"]) < 1e-5
    for i, y in enumerate(stages):
        assert (len(y), y.shape[1] * y.shape[2], y.shape[3]) == tuple(reference[f"stage{i}_shape"])
        assert off(torch.stack([y.mean(), y.std(correction=0)]), reference[f"stage{i}_mean_std"]) < 1e-5
        assert off(y[0, 0, 0, :16], reference[f"stage{i}_first16"]) < 1e-5
        assert off(y[0, y.shape[1] // 2, y.shape[2] // 2, :16], reference[f"stage{i}_mid16"]) < 1e-5
    model.load_state_dict({key: torch.from_numpy(x) for key, x in eps_probe(state).items()})
    final = model.forward_features(images * PROBE_INPUT)
    assert off(model.forward_head(final), reference["probe_logits"]) < 1e-5
    assert off(model.forward_head(final, pre_logits=True), reference["probe_features"]) < 1e-5


@pytest.mark.parametrize("name", FACTS)
def test_names_and_counts(name: str) -> None:
    parameters, decayed, keys, digest = FACTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = [(key, tuple(x.shape)) for key, x in model.state_dict().items()]
    assert len(shapes) == keys and zlib.crc32(repr(sorted(shapes)).encode()) == digest
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert sum(p.numel() for g in groups if g["weight_decay"] for p in g["params"]) == decayed


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
    mask[1, ..., 5:] = crossformer.PADDED_KEY
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


def test_offsets_and_index_agree() -> None:
    group = 4
    offsets = relative_offsets(group, torch.device("cpu"))[relative_index(group, torch.device("cpu"))]
    position = [(i // group, i % group) for i in range(group * group)]
    expected = [[a[0] - b[0], a[1] - b[1]] for a in position for b in position]
    assert offsets.tolist() == expected


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
@pytest.mark.parametrize("size", [(224, 224), (256, 256), (192, 256), (200, 312), (32, 32), (37, 50), (4, 4)])
def test_any_input_size(size: tuple[int, int]) -> None:
    model = tiny().eval()
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 5)
    backbone = tiny()
    backbone.prune_intermediate_layers([0, 1])
    maps = backbone.eval().forward_intermediates(x, intermediates_only=True)
    height, width = (math.ceil(s / 4) for s in size)
    assert [tuple(m.shape) for m in maps] == [(2, 16, height, width), (2, 32, math.ceil(height / 2), math.ceil(width / 2))]


@torch.no_grad()
def test_detection_size_in_bf16() -> None:
    model = timm.create_model("crossformer_tiny", features_only=True).eval().bfloat16()
    maps = model(torch.randn(1, 3, 800, 1333, dtype=torch.bfloat16))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 200, 334), (128, 100, 167), (256, 50, 84), (512, 25, 42)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_timm_protocol() -> None:
    model = timm.create_model("crossformer_tiny", num_classes=7, in_chans=1, drop_path_rate=0.2)
    x = torch.randn(1, 1, 64, 64)
    assert model(x).shape == (1, 7) and model.get_classifier() is model.head
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, 512)
    model.reset_classifier(0)
    assert model(x).shape == (1, 512)
    model.reset_classifier(3, "")
    assert model(x).shape == (1, 2, 2, 3)
    assert timm.create_model("crossformer_small", num_classes=0, img_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 768)
    features = timm.create_model("crossformer_tiny", features_only=True, out_indices=(1, 3))
    assert features.feature_info.channels() == [128, 512] and features.feature_info.reduction() == [8, 32]
    assert model.default_cfg["classifier"] == "head" and model.default_cfg["input_size"] == (3, 224, 224)
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(3, "max")


def test_group_matcher_orders_the_layers() -> None:
    from timm.optim import param_groups_layer_decay
    model = tiny()
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    first, later = scale[id(model.patch_embed.norm.weight)], scale[id(model.layers[1].blocks[1].norm1.weight)]
    assert first < scale[id(model.layers[0].blocks[0].norm1.weight)] < later < scale[id(model.head.weight)] == 1.0


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for enable in (False, True):
        model = tiny(drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(torch.ones(4, 3, 32, 32)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_learns() -> None:
    model = tiny(embed_dim=32, depths=(2, 4), use_acl=True)  # width 16 would leave DPB one channel, and its norms nothing
    model(torch.randn(2, 3, 36, 44)).square().sum().backward()
    # A constant added to all keys cancels in the softmax, and so may the last bias of DPB.
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert all(name.endswith("pos3.2.bias") for name in silent), silent


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


@torch.no_grad()
def test_embedding_kernels_see_the_same_centre() -> None:
    """Each kernel of the cross-scale embedding is centred on the token's own patch."""
    embedding = CrossScaleEmbedding(32, norm=False)
    for p in embedding.parameters():
        nn.init.ones_(p) if p.ndim > 1 else nn.init.zeros_(p)
    image = torch.zeros(1, 3, 64, 64)
    image[..., 33, 33] = 1  # inside patch (8, 8)
    reached = embedding(image)[0, ..., [0, 16, 24, 28]] > 0
    for scale, reach in enumerate((0, 1, 2, 4)):
        ys = reached[..., scale].nonzero()[:, 0]
        assert ys.min() >= 8 - reach and ys.max() <= 8 + reach and bool(reached[8, 8, scale])


@pytest.mark.parametrize("compiled", ["train", "eval"])
def test_one_graph_under_compile(compiled: str) -> None:
    model = tiny(drop_path_rate=0.1).train(compiled == "train")
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
    table = crossformer.PositionTable(4, 2)
    full = table(relative_offsets(4, torch.device("cpu")))
    assert torch.equal(full, table.table)
    inner = table(relative_offsets(2, torch.device("cpu")))  # a clamped group reads the middle of the table
    assert torch.equal(inner, table.table.view(7, 7, 2)[2:5, 2:5].reshape(9, 2))
    assert tiny(position="table").no_weight_decay() == {"layers.0.blocks.0.attn.pos.table", "layers.1.blocks.0.attn.pos.table",
                                                        "layers.1.blocks.1.attn.pos.table"}
    for name, value in (("position", "rope"), ("attention", "all"), ("group_type", "grow")):
        with pytest.raises(ValueError, match=f"{name} is '{value}'; choose from"):
            tiny(**{name: value})


@pytest.mark.parametrize("kernels", [(4, 8, 16, 32), (4,), (4, 12, 16), (4, 8, 10), (2, 4)])
@pytest.mark.parametrize("image_needs_gradient", [False, True])
def test_embedding_in_blocks_is_the_convolutions(kernels: tuple[int, ...], image_needs_gradient: bool) -> None:
    torch.manual_seed(0)
    embedding = CrossScaleEmbedding(32, kernels, norm=False).double()
    x = torch.randn(2, 3, 45, 38, dtype=torch.float64, requires_grad=image_needs_gradient)
    found = []
    for training in (True, False):
        embedding.train(training)
        y = embedding(x)
        inputs = [*embedding.parameters(), *([x] if image_needs_gradient else [])]
        found.append([y, *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), inputs)])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_by_rows_are_the_blocks(dtype: torch.dtype) -> None:
    x = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).to(dtype)
    expected = crossformer.to_blocks(x.clone().requires_grad_(), 4)
    assert torch.equal(crossformer.to_blocks(x, 4), expected)
    assert torch.equal(crossformer.to_blocks(x.to(memory_format=torch.channels_last), 4), expected)
    assert torch.equal(expected[1, 1, 2], x[1, :, 4:8, 8:12].flatten())


@torch.no_grad()
def test_drop_path_in_one_pass() -> None:
    x, branch, path = torch.randn(8, 2, 2, 4), torch.randn(8, 2, 2, 4), base.DropPath(0.5)
    torch.manual_seed(5)
    expected = x + path(branch)
    torch.manual_seed(5)
    assert torch.allclose(base.add_branch(x, branch, path), expected)
    assert torch.equal(base.add_branch(x, branch, path.eval()), x + branch)
    assert torch.equal(base.add_branch(x, branch, nn.Identity()), x + branch)


def test_kept_position_bias_is_never_stale() -> None:
    """Whatever happens to the weights, evaluation gives what a model without the memory of a bias gives."""
    def changed(p: nn.Parameter) -> None:
        p.data.mul_(1.5)

    def stepped(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()

    def averaged(model: nn.Module) -> None:
        ours = [p.data for p in model.parameters()]
        torch._foreach_lerp_(ours, [torch.ones_like(p) for p in ours], 0.5)

    model = tiny(embed_dim=32).eval()
    other = {name: 0.9 * x for name, x in model.state_dict().items()}
    events = [lambda m: m.load_state_dict(other), lambda m: [changed(p) for p in m.parameters()], stepped, averaged,
              lambda m: m.train(), lambda m: m.eval(), lambda m: m.load_state_dict({k: x + 0.1 for k, x in other.items()}, assign=True)]
    names, x = list(model.state_dict()), torch.randn(2, 3, 40, 40)
    before = None
    for event in events:
        event(model)
        for side in (slice(None), slice(0, 16), slice(None)):  # another size has other groups
            image = x[..., side]
            with torch.inference_mode():
                ours = model(image)
            with torch.no_grad():
                again = model(image)
            fresh = tiny(embed_dim=32).train(model.training)
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(ours, again) and torch.allclose(ours, fresh(image), atol=1e-6)
        assert before is None or event in events[4:6] or not torch.allclose(before, ours)
        before = ours
    model.eval()
    with torch.no_grad():
        model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(x)
        assert {m._kept[2].dtype for m in model.modules() if isinstance(m, Attention)} == {torch.bfloat16}  # converted once, then kept
        assert list(model.state_dict()) == names
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x)) and all(m._kept is None for m in copy.deepcopy(model).modules() if isinstance(m, Attention))
        assert torch.allclose(model.double()(x.double()).float(), twin(x), atol=1e-5)
    assert low.isfinite().all()
    model.float()(x).sum().backward()  # and back in training, everything has a gradient
    assert all(p.grad is not None for p in model.layers[0].blocks[0].attn.pos.parameters())


def test_position_bias_is_computed_once_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny().eval(), []
    inner = Attention.position_bias
    monkeypatch.setattr(Attention, "position_bias", lambda self, *args: calls.append(1) or inner(self, *args))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 3  # one a block


@pytest.mark.parametrize("kind", ["none", "shared", "each"])
@pytest.mark.parametrize(("side", "dtype"), [(4, torch.bfloat16), (7, torch.bfloat16), (12, torch.bfloat16), (7, torch.float32)])
def test_attention_in_every_form(side, dtype, kind):
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

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())

    drop, limit = nn.Dropout(0.5), 1e-5 if dtype == torch.float32 else 0.01
    ours, plain = crossformer.attend(qkv, bias, scale, drop.eval()), formula(*inputs)
    pull = torch.randn(plain.shape).to(dtype)
    assert ours.dtype == dtype and apart(ours, plain) < limit
    for a, b in zip(torch.autograd.grad(ours, inputs, pull), torch.autograd.grad(plain, inputs, pull.float()), strict=True):
        assert a.shape == b.shape and apart(a, b) < limit
    with torch.no_grad():
        assert apart(crossformer.attend(qkv, bias, scale, drop), plain) < limit
    assert apart(crossformer.attend(qkv, bias, scale, drop.train()), plain) > 0.1


def test_cuda_kernels_of_a_biased_attention(monkeypatch):
    """cuDNN's kernel and flash attention are left out, in one compiled graph too; the bias's rows begin at multiples of 8."""
    q, bias = torch.randn(2, 2, 49, 8, requires_grad=True), torch.randn(2, 49, 49)
    allowed = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *_, **__: allowed.append(
        (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())) or q)
    crossformer.fused(q, q, q, bias, 0.3, 0.0)
    assert allowed == [(False, True)]
    monkeypatch.undo()
    compiled = torch.compile(lambda q: crossformer.fused(q, q, q, bias, 0.3, 0.0), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q), crossformer.fused(q, q, q, bias, 0.3, 0.0))

    attention = crossformer.Attention(32, 2)
    plain = attention.position_bias(7, torch.device("cpu"))
    for name in ("relative_offsets", "relative_index"):
        real = getattr(crossformer, name)
        monkeypatch.setattr(crossformer, name, lambda group, _, real=real: real(group, torch.device("cpu")))
    aligned = attention.position_bias(7, torch.device("cuda"))
    assert torch.equal(aligned, plain) and aligned.stride() == (49 * 56, 56, 1)
