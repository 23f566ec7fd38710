"""What holds for every family: the official outputs, names and counts, any input size, gradients, timm's protocol, one graph."""

from __future__ import annotations

import importlib
import pickle
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from recipe import PROBE_INPUT, deterministic_input, deterministic_state, eps_probe, published_state, relative_error
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from yacs.config import CfgNode

import models
from config import KEY, ConfigError, get_config
from models.build import build_model
from models.safe_load import CheckpointError
from models.weights import load_pretrained_file

# ---- published variants ----------------------------------------------------------------------------------------------------------

# Parameters, those with weight decay, state-dict keys, CRC-32 of all published names and shapes, drop path rate, channels of the stages.
VARIANTS = {
    "crossformer_tiny": (27_776_794, 27_700_576, 448, 3731114658, 0.1, (64, 128, 256, 512)),
    "crossformer_small": (30_657_394, 30_591_852, 344, 1831504209, 0.2, (96, 192, 384, 768)),
    "crossformer_base": (51_971_554, 51_843_372, 656, 3283658794, 0.3, (96, 192, 384, 768)),
    "crossformer_large": (91_971_184, 91_800_608, 656, 3847547514, 0.5, (128, 256, 512, 1024)),
    "crossformer_pp_small": (23_325_340, 23_235_712, 676, 4292923861, 0.2, (64, 128, 256, 512)),
    "crossformer_pp_base": (51_994_594, 51_860_652, 676, 930486043, 0.3, (96, 192, 384, 768)),
    "crossformer_pp_large": (92_001_904, 91_823_648, 676, 3841931483, 0.5, (128, 256, 512, 1024)),
    "crossformer_pp_huge": (95_962_944, 95_762_656, 892, 2828688216, 0.5, (128, 256, 512, 1024)),
    "cvt_13": (19_997_480, 19_911_936, 459, 1392252638, 0.1, (64, 192, 384)),
    "cvt_21": (31_622_696, 31_486_080, 731, 2535526880, 0.1, (64, 192, 384)),
    "cvt_w24": (277_196_392, 276_760_768, 833, 550629001, 0.3, (192, 768, 1024)),
    "shunted_t": (11_553_576, 11_503_616, 260, 2279737056, 0.1, (64, 128, 256, 512)),
    "shunted_s": (22_401_256, 22_291_776, 596, 2512447469, 0.2, (64, 128, 256, 512)),
    "shunted_b": (39_614_376, 39_419_776, 1010, 2387830873, 0.3, (64, 128, 256, 512)),
    "mpvit_tiny": (5_843_736, 5_793_352, 873, 68565881, 0.0, (96, 176, 216, 216)),
    "mpvit_xsmall": (10_573_448, 10_507_744, 873, 951713014, 0.0, (128, 192, 256, 256)),
    "mpvit_small": (22_892_400, 22_776_216, 1263, 383404056, 0.05, (128, 216, 288, 288)),
    "mpvit_base": (74_845_976, 74_619_888, 1419, 3719167743, 0.3, (224, 368, 480, 480)),
    "pvt_tiny": (13_229_288, 13_192_448, 161, 2687247362, 0.1, (64, 128, 320, 512)),
    "pvt_small": (24_485_864, 24_415_488, 301, 66960749, 0.1, (64, 128, 320, 512)),
    "pvt_medium": (44_208_104, 44_076_288, 517, 945418728, 0.3, (64, 128, 320, 512)),
    "pvt_large": (61_369_320, 61_181_184, 751, 4182208365, 0.3, (64, 128, 320, 512)),
    "pvt_v2_b0": (3_666_760, 3_642_720, 178, 2557064458, 0.1, (32, 64, 160, 256)),
    "pvt_v2_b1": (14_009_000, 13_961_920, 178, 233554867, 0.1, (64, 128, 320, 512)),
    "pvt_v2_b2": (25_362_856, 25_272_512, 334, 1755673009, 0.1, (64, 128, 320, 512)),
    "pvt_v2_b2_li": (22_553_512, 22_458_560, 346, 3296624478, 0.1, (64, 128, 320, 512)),
    "pvt_v2_b3": (45_238_696, 45_071_552, 574, 2677649786, 0.3, (64, 128, 320, 512)),
    "pvt_v2_b4": (62_556_072, 62_316_992, 834, 1267476938, 0.3, (64, 128, 320, 512)),
    "pvt_v2_b5": (81_956_008, 81_648_576, 1054, 3431210572, 0.3, (64, 128, 320, 512)),
    "swin_mlp_tiny_c24": (20_386_632, 20_326_912, 137, 3471856688, 0.2, (96, 192, 384, 768)),
    "swin_mlp_tiny_c12": (21_152_072, 21_080_576, 137, 4017401970, 0.2, (96, 192, 384, 768)),
    "swin_mlp_tiny_c6": (22_682_952, 22_587_904, 137, 2334017748, 0.2, (96, 192, 384, 768)),
    "swin_mlp_base": (60_659_416, 60_522_104, 257, 488845729, 0.5, (128, 256, 512, 1024)),
    "galerkin_tiny": (26_121_736, 26_042_880, 185, 822736477, 0.2, (96, 192, 384, 768)),
    "galerkin_small": (45_659_656, 45_507_072, 353, 4026914522, 0.3, (96, 192, 384, 768)),
    "galerkin_base": (63_405_928, 63_251_968, 269, 407682238, 0.3, (128, 256, 512, 1024)),
}
OURS = [name for name in VARIANTS if not name.startswith("pvt_v2")]
ONE_A_FAMILY = ["crossformer_tiny", "crossformer_pp_small", "cvt_13", "shunted_t", "mpvit_tiny", "pvt_tiny", "swin_mlp_tiny_c12",
                "galerkin_tiny"]
REFERENCES = ["crossformer_tiny", "crossformer_base", "crossformer_pp_small", "swin_tiny", "cvt_13", "shunted_t", "mpvit_tiny", "pvt_tiny",
              "pvt_v2_b1"]


def family_of(name: str) -> str:
    return next((family for family in ("pvt_v2", "swin_mlp") if name.startswith(family)), name.partition("_")[0])


def build(name: str, **kwargs: Any) -> nn.Module:
    module = importlib.import_module(f"models.{family_of(name)}")
    side = 256 if name.startswith("swin_mlp_tiny") else 224  # its windows bound the weights
    return module.build(name, dict(module.VARIANTS[name], **kwargs), (side, side)).eval()


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, **kwargs)


def meta_images(height: int = 224, width: int = 224, channels: int = 3) -> Tensor:
    return torch.empty(2, channels, height, width, device="meta")


def first_convolution(model: nn.Module) -> str:
    names = model.default_cfg["first_conv"]
    return names if isinstance(names, str) else names[0]


@torch.no_grad()
@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_are_the_official_ones(name: str) -> None:
    reference, model = np.load(Path(__file__).parent.parent / "reference" / f"{name}.npz"), build(name)
    translate = importlib.import_module(f"models.{family_of(name)}").checkpoint_filter_fn
    # A tensor that layers share is made under its first name; what is no number (a count, an index) is left as it is.
    own = {key for key, _ in (*model.named_parameters(), *model.named_buffers())}
    shapes = {public: x.shape for (key, x), public in zip(model.state_dict().items(), published_state(model, family_of(name)), strict=True)
              if key in own and x.is_floating_point()}
    weights, images = deterministic_state(shapes), torch.from_numpy(deterministic_input(2, 3, 224, 224))

    def load(weights: dict[str, np.ndarray]) -> None:
        state = translate({key: torch.from_numpy(x) for key, x in weights.items()}, model)
        left = model.load_state_dict(state, strict=False)
        assert not left.unexpected_keys and not any(key in own and not key.endswith("num_batches_tracked") for key in left.missing_keys)

    load(weights)
    tokens = dict(return_prefix_tokens=True) if family_of(name) == "pvt" else {}  # its reference has the class token in the last stage
    final, stages = model.forward_intermediates(images, **tokens)
    assert relative_error(model.forward_head(final), reference["logits"]) < 1e-5
    assert relative_error(model.forward_head(final, pre_logits=True), reference["features"]) < 1e-5
    for i, y in enumerate(stages):
        y, prefix = y if isinstance(y, tuple) else (y, None)
        y = y.permute(0, 2, 3, 1)
        sequence = y.flatten(1, 2) if prefix is None else torch.cat([prefix, y.flatten(1, 2)], dim=1)
        shape = tuple(reference[f"stage{i}_shape"])
        assert (sequence if len(shape) == 3 else y.permute(0, 3, 1, 2)).shape == shape
        assert relative_error(torch.stack([sequence.mean(), sequence.std(correction=0)]), reference[f"stage{i}_mean_std"]) < 1e-5
        assert relative_error(sequence[0, 0, :16], reference[f"stage{i}_first16"]) < 1e-5
        assert relative_error(y[0, y.shape[1] // 2, y.shape[2] // 2, :16], reference[f"stage{i}_mid16"]) < 1e-5
    load(eps_probe(weights))
    final = model.forward_features(images * PROBE_INPUT)
    assert relative_error(model.forward_head(final), reference["probe_logits"]) < 1e-5
    assert relative_error(model.forward_head(final, pre_logits=True), reference["probe_features"]) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_names_counts_rates_and_layers(name: str) -> None:
    parameters, decayed, keys, digest, rate, channels = VARIANTS[name]
    model = on_meta(name)
    state = published_state(model, family_of(name))
    assert sum(p.numel() for p in model.parameters()) == parameters and len(state) == keys
    assert zlib.crc32("".join(f"{key} {list(x.shape)}\n" for key, x in state.items()).encode()) == digest
    plain, decay = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert plain["weight_decay"] == 0 and sum(p.numel() for p in plain["params"]) == parameters - decayed
    assert sum(p.numel() for p in decay["params"]) == decayed
    assert tuple(info["num_chs"] for info in model.feature_info) == channels
    for module in (model.default_cfg["classifier"], first_convolution(model)):
        assert isinstance(model.get_submodule(module), (nn.Linear, nn.Conv2d))
    blocks = [module for module in model.modules() if hasattr(module, "drop_path") or hasattr(module, "drop_path1")]
    rates = [getattr(getattr(block, "drop_path", None) or block.drop_path1, "drop_prob", 0.0) for block in blocks]
    # From 0 to the rate over all blocks; CvT's earlier stages have none, MPViT's paths have the same.
    if name.startswith("cvt"):
        assert not any(rates[:-len(model.stage2.blocks)])
        rates = rates[-len(model.stage2.blocks):]
    if name.startswith("mpvit"):
        paths = [[getattr(layer.drop_path, "drop_prob", 0.0) for stage in model.mhca_stages for layer in stage.mhca_blks[i].MHCA_layers]
                 for i in range(2)]
        assert paths[0] == paths[1]
        rates = paths[0]
    assert rates == pytest.approx([rate * i / (len(rates) - 1) for i in range(len(rates))])
    if name in OURS:
        check_layer_order(model)


def check_layer_order(model: nn.Module) -> None:
    """Every parameter has its layer, the first convolution the first, the classifier the last."""
    layer = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    assert set(layer) == {name for name, _ in model.named_parameters()}
    assert all(layer[name] == max(layer.values()) for name in layer if name.startswith(model.default_cfg["classifier"] + "."))
    assert all(layer[name] == 0 for name in layer if name.startswith(first_convolution(model) + "."))
    assert len(set(layer.values())) > len(model.feature_info)


# ---- timm's protocol, whole, on tensors without storage --------------------------------------------------------------------------

def test_our_variants_are_registered_and_timms_are_timms() -> None:
    for name in OURS:
        entry_point, home = timm.model_entrypoint(name), f"models.{family_of(name)}"
        assert (entry_point.__module__, entry_point.__name__) == (home, name) and timm.models.is_model_in_modules(name, [family_of(name)])
        assert pickle.loads(pickle.dumps(entry_point)) is entry_point and "parameters" in entry_point.__doc__
        assert name in timm.list_models(f"{family_of(name)}*")
    assert timm.model_entrypoint("pvt_v2_b0").__module__ == "timm.models.pvt_v2"
    assert timm.model_entrypoint("swin_tiny_patch4_window7_224").__module__ == "timm.models.swin_transformer"


@pytest.mark.parametrize("name", OURS)
def test_classifier_protocol(name: str) -> None:
    model = on_meta(name, in_chans=1)
    side = model.default_cfg["input_size"][1]
    features = model.forward_features(meta_images(side, side, 1))
    assert model.forward_head(features).shape == (2, 1000)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size) == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Linear) and model.get_classifier().out_features == 1000
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(first_convolution(model)).in_channels == 1
    model.reset_classifier(7)
    assert model.forward_head(features).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, model.num_features)
    model.reset_classifier(5, "")
    assert model.forward_head(features).ndim > 2 and model.forward_head(features).shape[-1] == 5
    assert set(model.no_weight_decay()) <= {n for n, _ in model.named_parameters()}
    model.set_grad_checkpointing(True)
    assert model.grad_checkpointing


@pytest.mark.parametrize("name", OURS)
def test_features_of_published_variants(name: str) -> None:
    backbone = on_meta(name, features_only=True)
    channels, reductions = backbone.feature_info.channels(), backbone.feature_info.reduction()
    assert tuple(channels) == VARIANTS[name][-1]
    assert reductions == [(2 if name == "galerkin_base" else 4) * 2 ** i for i in range(len(channels))]
    for height, width in ((200, 312), (800, 1333)) if name in ONE_A_FAMILY else ((200, 312),):
        for y, channel, reduction in zip(backbone(meta_images(height, width)), channels, reductions, strict=True):
            assert y.shape[:2] == (2, channel)
            for side, whole in zip(y.shape[2:], (height, width), strict=True):
                assert whole // reduction - 1 <= side <= whole // reduction + 1


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_intermediates_and_pruning(name: str) -> None:
    model = on_meta(name)
    side = model.default_cfg["input_size"][1]
    x = meta_images(side, side)
    assert on_meta(name, num_classes=0)(x).shape == (2, model.num_features)
    last = on_meta(name, features_only=True, out_indices=(-1,)).feature_info
    assert (last.channels(), last.reduction()) == ([model.feature_info[-1]["num_chs"]], [model.feature_info[-1]["reduction"]])
    final, maps = model.forward_intermediates(x)
    assert final.shape == model.forward_features(x).shape
    assert [y.shape[1] for y in maps] == [info["num_chs"] for info in model.feature_info]
    only = model.forward_intermediates(x, indices=1, intermediates_only=True, norm=True, output_fmt="NHWC")
    assert len(only) == 1 and only[0].shape[-1] == model.feature_info[-1]["num_chs"]
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert early[0].shape == maps[0].shape
    kept = model.prune_intermediate_layers([0, 1], prune_norm=True)
    assert list(kept) == [0, 1]
    assert [tuple(y.shape) for y in model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)] == [
        tuple(y.shape) for y in maps[:2]]


def test_the_page_on_adding_a_model_holds_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file on the page, found in a folder of the package, is a classifier of the config and a backbone."""
    page = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    (tmp_path / "plainnet.py").write_text(page.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    models.import_all()
    model = models.build_model(get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", "plainnet", "DATA.IMG_SIZE", "64"]), 5)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert len(group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)) == len(list(model.parameters()))
    maps = timm.create_model("plainnet", features_only=True)(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 16, 16), (1, 64, 8, 8), (1, 128, 4, 4)]


# ---- small models with numbers ---------------------------------------------------------------------------------------------------

def ceil(stride: int) -> Callable[[int], int]:
    return lambda side: -(-side // stride)


def floor(stride: int) -> Callable[[int], int]:
    return lambda side: max(1, side // stride)


def strided_7x7(side: int) -> int:
    """CvT's first convolution, padded by 2, of stride 4."""
    return max(1, (side - 3) // 4 + 1)


def strided_stem(side: int) -> int:
    """Shunted's first convolutions: 7x7 of stride 2, padded, then 2x2."""
    return max(1, (side + 1) // 4)


def halved(first: Callable[[int], int], stages: int) -> list[Callable[[int], int]]:
    return [lambda side, i=i: -(-first(side) // 2 ** i) for i in range(stages)]


def turn_pvt(state: dict[str, Tensor]) -> None:
    for s, prefix in ((0, 0), (1, 0), (2, 1)):
        table, side = state[f"pos_embed{s + 1}"], 16 // 2 ** s
        flipped = table[:, prefix:].view(1, side, side, -1).transpose(1, 2).flatten(1, 2)
        state[f"pos_embed{s + 1}"] = torch.cat([table[:, :prefix], flipped], dim=1)


def turn_offsets(state: dict[str, Tensor]) -> None:
    """The position bias of CrossFormer takes (dy, dx)."""
    for name in state:
        if name.endswith("pos.pos_proj.weight"):
            state[name] = state[name].flip(1)


def turn_galerkin(state: dict[str, Tensor]) -> None:
    """Merging puts 2x2 tokens side by side, down the columns first; with positions, a head begins with a token's row and column."""
    for name in state:
        if name.endswith("downsample.reduction.weight"):
            state[name] = state[name].unflatten(1, (4, -1))[:, [0, 2, 1, 3]].flatten(1)
        elif name.endswith("attn.proj.weight"):
            heads = state[name].unflatten(1, (2 if name.startswith("layers.0") else 4, -1))
            state[name] = torch.cat([heads[..., [1, 0]], heads[..., 2:]], dim=2).flatten(1)


def turn_swin_mlp(state: dict[str, Tensor]) -> None:
    """The tokens of a window come row by row, in the perceptron over them both as inputs and as outputs."""
    turn_galerkin(state)
    for name in state:
        if ".spatial_mlp." in name:
            heads = 2 if name.startswith("layers.0") else 4
            x = state[name].view(heads, 4, 4, *((4, 4) if name.endswith("weight") else ()))
            state[name] = (x.transpose(1, 2).transpose(3, 4) if x.ndim == 5 else x.transpose(1, 2)).reshape(state[name].shape)


@dataclass
class Small:
    """A small model of a family.

    Attributes:
        kwargs: what differs from the class's defaults.
        sides: side of each stage's map for a side of the image.
        stride: pixels of the image a side of a first token.
        token: whether a class token stands before the last stage's tokens.
        silent: parameters that a loss cannot move.
        turn: what swapping height and width does to the weights beside turning kernels.
        first: convolutions that take another number of input channels.
        depth: parameters from the first layer to the last, each one layer on.
        beside: parameters, each with one of the same layer.
        wrong: arguments and what their error says.
    """

    variant: str
    kwargs: dict[str, Any]
    channels: Sequence[int]
    sides: Sequence[Callable[[int], int]]
    first: list[str]
    depth: Sequence[str]
    beside: dict[str, str]
    wrong: Sequence[tuple[dict[str, Any], str]]
    stride: int = 4
    token: bool = False
    silent: str = r"$^"
    turn: Callable[[dict[str, Tensor]], None] = field(default=lambda state: None)

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"models.{family_of(self.variant)}")

    def __call__(self, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.module.build("small", dict(self.kwargs, **dict(dict(num_classes=5, drop_path_rate=0.0), **kwargs)), (64, 64))

    def pooled(self, final: Tensor) -> Tensor:
        return final[:, 0] if self.token else final.mean(dim=(1, 2))


GALERKIN = dict(
    turn=turn_galerkin, channels=(8, 16, 32), first=["patch_embed.proj.weight"],
    depth=["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "layers.1.blocks.0.attn.norm_k.weight",
           "layers.1.blocks.1.norm1.weight", "layers.2.blocks.0.norm1.weight", "head.weight"],
    beside={"norm.weight": "layers.2.blocks.0.norm1.weight"},
    wrong=[(dict(num_heads=(1, 2)), "num_heads has 2 entries for 3 stages"), (dict(num_heads=(8, 4, 4)), "width 8 cannot have 8 heads"),
           (dict(num_heads=(3, 4, 4)), "width 8 cannot have 3 heads"), (dict(patch_size=0), "patch_size is 0")])
PATH = "mhca_stages.{}.mhca_blks.0.MHCA_layers.{}.norm1.weight"

SMALL = {
    "crossformer": Small(
        "crossformer_tiny", dict(embed_dim=32, depths=(1, 3, 1), num_heads=(1, 2, 4), group_size=(4, 4, 4), interval=(2, 2, 1),
                                 merge_size=((2, 4), (2, 4)), use_acl=True),
        channels=(32, 64, 128), sides=[ceil(4), ceil(8), ceil(16)], first=[f"patch_embed.projs.{i}.weight" for i in range(4)],
        depth=["patch_embed.norm.weight", "layers.0.blocks.0.norm1.weight", "layers.1.blocks.0.attn.pos.pos_proj.weight",
               "layers.1.blocks.1.norm1.weight", "layers.1.blocks.2.norm1.weight", "layers.2.blocks.0.norm1.weight", "head.weight"],
        beside={"norm.weight": "layers.2.blocks.0.norm1.weight"},
        # A constant added to all keys cancels in the softmax, and so may the last bias of the position bias.
        silent=r"pos3\.2\.bias$", turn=turn_offsets,
        wrong=[(dict(num_heads=(1, 2)), "num_heads has 2 entries for 3 stages"), (dict(merge_size=()), "3 stages need 2"),
               (dict(num_heads=(3, 2, 4)), "width 32 cannot have 3 heads"), (dict(embed_dim=8), "embed_dim is 8; it must be at least 16"),
               *(({name: "nonsense"}, f"{name} is 'nonsense'; choose from") for name in ("position", "attention", "group_type"))]),
    "cvt": Small(
        "cvt_13", dict(embed_dims=(8, 16, 32), depths=(1, 2, 3), num_heads=(1, 2, 4)), token=True,
        channels=(8, 16, 32), sides=halved(strided_7x7, 3), first=["stage0.patch_embed.proj.weight"],
        depth=["stage0.patch_embed.proj.weight", "stage0.blocks.0.norm1.weight", "stage1.blocks.0.norm1.weight",
               "stage1.blocks.1.norm1.weight", "stage2.blocks.0.norm1.weight", "stage2.blocks.1.norm1.weight",
               "stage2.blocks.2.norm1.weight", "head.weight"],
        beside={"stage2.cls_token": "stage2.blocks.0.norm1.weight", "stage2.patch_embed.proj.weight": "stage2.blocks.0.norm1.weight",
                "norm.weight": "stage2.blocks.2.norm1.weight"},
        # Only the class token leaves the last block, so the queries of its pixels are never used.
        silent=r"stage2\.blocks\.2\.attn\.conv_proj_q\.",
        wrong=[(dict(num_heads=(1, 2)), "num_heads has 2 entries for 3 stages"),
               (dict(num_heads=(5, 2, 4)), "width 8 cannot have 5 heads")]),
    "shunted": Small(
        "shunted_t", dict(embed_dims=(8, 16, 32, 64), depths=(1, 2, 1, 1), num_heads=(2, 4, 4, 8), num_conv=1),
        channels=(8, 16, 32, 64), sides=halved(strided_stem, 4), first=["patch_embed1.conv.0.weight"],
        depth=["patch_embed1.conv.0.weight", "block1.0.norm1.weight", "block2.0.norm1.weight", "block2.1.norm1.weight",
               "block3.0.norm1.weight", "block4.0.norm1.weight", "head.weight"],
        beside={"patch_embed2.proj.weight": "block2.0.norm1.weight", "norm2.weight": "block2.1.norm1.weight",
                "norm4.weight": "block4.0.norm1.weight"},
        wrong=[(dict(num_heads=(1, 2)), "num_heads has 2 entries for 4 stages"), (dict(sr_ratios=(8, 4, 3, 1)), "cannot merge at rate 3")]),
    "mpvit": Small(
        "mpvit_tiny", dict(embed_dims=(16, 24, 32), num_paths=(2, 1, 2), depths=(1, 2, 1), num_heads=(8, 8, 8), mlp_ratios=(2, 2, 2)),
        channels=(24, 32, 32), sides=[ceil(4), ceil(8), ceil(16)], first=["stem.0.conv.weight"],
        depth=["stem.0.conv.weight", PATH.format(0, 0), PATH.format(1, 0), PATH.format(1, 1), PATH.format(2, 0), "cls_head.cls.weight"],
        beside={"mhca_stages.1.aggregate.conv.weight": PATH.format(1, 1), "mhca_stages.1.InvRes.norm.weight": PATH.format(1, 0),
                "patch_embed_stages.1.patch_embeds.0.patch_conv.bn.weight": PATH.format(1, 0),
                "mhca_stages.1.mhca_blks.0.cpe.proj.weight": PATH.format(1, 0)},
        wrong=[(dict(num_paths=(2, 2)), "num_paths has 2 entries for 3 stages"), (dict(num_paths=(2, 0, 3)), "every stage needs a path"),
               (dict(embed_dims=(20, 24, 32)), "width 20 cannot have 8 heads"),
               (dict(num_heads=(4, 8, 8)), "serves 8 heads of 4"), (dict(crpe_windows=((4, 8),)), "odd kernel")]),
    "pvt": Small(
        "pvt_tiny", dict(embed_dims=(8, 16, 32), depths=(1, 2, 1), num_heads=(1, 2, 4), mlp_ratios=(2, 2, 2), sr_ratios=(4, 2, 1)),
        token=True, channels=(8, 16, 32), sides=[floor(4), floor(8), floor(16)], first=["patch_embed1.proj.weight"],
        depth=["pos_embed1", "block1.0.norm1.weight", "block2.0.norm1.weight", "block2.1.norm1.weight", "block3.0.norm1.weight",
               "head.weight"],
        beside={"patch_embed1.proj.weight": "pos_embed1", "pos_embed2": "block2.0.norm1.weight",
                "patch_embed2.norm.bias": "block2.0.norm1.weight", "cls_token": "norm.weight", "norm.weight": "block3.0.norm1.weight"},
        turn=turn_pvt,
        wrong=[(dict(num_heads=(1, 2)), "num_heads has 2 entries for 3 stages"), (dict(num_heads=(3, 2, 4)), "width 8 cannot have 3 heads"),
               (dict(sr_ratios=(4, 2, 2)), "must not reduce")]),
    "swin_mlp": Small(
        "swin_mlp_tiny_c24", dict(embed_dim=8, depths=(1, 2, 1), num_heads=(2, 4, 4), window_size=4), turn=turn_swin_mlp,
        channels=(8, 16, 32), sides=[ceil(4), ceil(8), ceil(16)], first=["patch_embed.proj.weight"],
        depth=["patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "layers.1.blocks.0.spatial_mlp.weight",
               "layers.1.blocks.1.norm1.weight", "layers.2.blocks.0.norm1.weight", "head.weight"],
        beside={"norm.weight": "layers.2.blocks.0.norm1.weight"},
        wrong=[(dict(num_heads=(1, 2)), "num_heads has 2 entries for 3 stages"), (dict(num_heads=(3, 4, 4)), "width 8 cannot have 3 heads"),
               (dict(window_size=0), "window_size 0; they must be")]),
    "galerkin": Small("galerkin_tiny", dict(embed_dim=8, depths=(1, 2, 1), num_heads=(2, 4, 4)), sides=[ceil(4), ceil(8), ceil(16)],
                      **GALERKIN),
    "galerkin with positions": Small(
        "galerkin_tiny", dict(embed_dim=8, depths=(1, 2, 1), num_heads=(2, 4, 4), patch_size=2, positions=True), stride=2,
        sides=[ceil(2), ceil(4), ceil(8)], **GALERKIN),
}
SIZES = [(224, 224), (200, 312), (128, 128), (61, 94), (32, 32), (37, 50), (17, 9), (5, 9), (2, 40), (1, 1)]
small_models = pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)


@small_models
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_features_of_any_size(small: Small, size: tuple[int, int]) -> None:
    x, model, backbone = torch.randn(2, 3, *size), small().eval(), small(features_only=True).eval()
    assert model(x).shape == (2, 5) and backbone.feature_info.channels() == list(small.channels)
    assert backbone.feature_info.reduction() == [small.stride * 2 ** i for i in range(len(small.channels))]
    expected = [[2, channels, *map(side, size)] for channels, side in zip(small.channels, small.sides, strict=True)]
    maps = backbone(x)
    assert [list(m.shape) for m in maps] == expected and all(torch.isfinite(m).all() for m in maps)


@small_models
@torch.no_grad()
def test_height_and_width_are_not_mixed_up(small: Small) -> None:
    model, turned, x = small().eval(), small().eval(), torch.randn(1, 3, 72, 104)
    state = {name: w.transpose(2, 3) if w.ndim == 4 else w for name, w in model.state_dict().items()}
    small.turn(state)
    turned.load_state_dict(state)
    assert torch.allclose(model(x), turned(x.transpose(2, 3)), atol=1e-5)


@small_models
def test_every_parameter_learns(small: Small) -> None:
    model = small()
    model(torch.randn(2, 3, 60, 92)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(re.search(small.silent, name) for name in silent), silent


@small_models
def test_features_only_holds_no_parameter_without_a_use(small: Small) -> None:
    model = small(features_only=True, out_indices=(0, 1), in_chans=5)
    sum(m.square().sum() for m in model(torch.randn(2, 5, 64, 96))).backward()
    assert all(p.grad is not None for p in model.parameters())


@small_models
@torch.no_grad()
def test_heads_and_intermediates(small: Small) -> None:
    model, x = small().eval(), torch.randn(2, 3, 64, 96)
    last = len(small.channels) - 1
    sizes = [(2, channels, side(64), side(96)) for channels, side in zip(small.channels, small.sides, strict=True)]
    final = model.forward_features(x)
    _, channels, height, width = sizes[-1]
    assert final.shape == ((2, 1 + height * width, channels) if small.token else (2, height, width, channels))
    assert torch.equal(model.forward_head(final), model(x)) and torch.allclose(model(x[:1]), model(x)[:1], atol=1e-6)

    y, maps = model.forward_intermediates(x, indices=[0, last], norm=True)
    assert torch.equal(y, final) and [m.shape for m in maps] == [sizes[0], sizes[-1]]
    assert torch.allclose(maps[1].flatten(2).transpose(1, 2), final[:, 1:] if small.token else final.flatten(1, 2), atol=1e-6)
    early, maps = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NHWC")
    assert maps[0].shape == (2, *sizes[1][2:], sizes[1][1]) and torch.equal(early.reshape(maps[0].shape), maps[0])
    assert len(model.forward_intermediates(x, indices=2, norm=True, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match="NCHW or NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")

    model.reset_classifier(0)
    assert torch.allclose(model(x), small.pooled(final)) and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "avg")
    assert torch.allclose(model(x), final[:, 1:].mean(1) if small.token else final.mean((1, 2)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), final)
    model.reset_classifier(7, model.pools[0])
    assert model(x).shape == (2, 7) and model.get_classifier().weight.std() < 0.03
    with pytest.raises(ValueError, match=f"choose {', '.join(filter(None, model.pools))}, or"):
        model.reset_classifier(7, "max")


@small_models
def test_layer_decay_groups(small: Small) -> None:
    model = small()
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    assert [groups[name] for name in small.depth] == list(range(len(small.depth)))
    assert {name: groups[name] for name in small.beside} == {name: groups[other] for name, other in small.beside.items()}


@pytest.mark.parametrize("family", [family for family in SMALL if family != "galerkin"])
@torch.no_grad()
def test_one_graph_and_export(family: str) -> None:
    small = SMALL[family]
    model, x = small(depths=(1,) * len(small.channels)).eval(), torch.randn(2, 3, 48, 80)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), atol=1e-5)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 48, 80)
        assert torch.allclose(program.module()(x), model(x), atol=1e-5)


@small_models
def test_published_form_of_weights(small: Small, tmp_path: Path) -> None:
    path, donor = tmp_path / "published.pth", small()
    torch.save({"model": donor.state_dict(), "model_ema": {}, "epoch": 299}, path)
    model = small(num_classes=9, in_chans=1)
    report = load_pretrained_file(model, path, small.module.checkpoint_filter_fn)
    head = model.default_cfg["classifier"]
    assert report.adapted == small.first
    assert [line.split()[0] for line in report.replaced] == [f"{head}.weight", f"{head}.bias"]
    fresh = {*small.first, f"{head}.weight", f"{head}.bias"}
    assert all(torch.equal(x, donor.state_dict()[name]) for name, x in model.state_dict().items() if name not in fresh)
    torch.save(dict(donor.state_dict(), surplus=torch.zeros(1)), path)
    with pytest.raises(CheckpointError, match="surplus"):
        load_pretrained_file(small(), path, small.module.checkpoint_filter_fn)


@small_models
def test_numbers_of_a_config_node(small: Small) -> None:
    numbers = dict(small.kwargs, num_classes=3, drop_path_rate=0.2)
    model = small.module.build(small.variant, dict(small.module.VARIANTS[small.variant], **numbers), (64, 64))
    assert type(model) is type(small()) and model.get_classifier().out_features == 3
    assert model.state_dict().keys() == small().state_dict().keys()
    for kwargs, message in small.wrong:
        with pytest.raises(ValueError, match=message):
            small(**kwargs)


@pytest.mark.parametrize(("kind", "own", "changed", "words"), [
    ("crossformer", "[1, 2]", "NUM_HEADS [3, 2]", "CROSSFORMER.NUM_HEADS is [3, 2]: a stage of width 16"),
    ("crossformer", "[1, 2]", "INTERVAL [1]", "CROSSFORMER.INTERVAL has 1 entries for 2 stages"),
    ("crossformer", "[1, 2]", "PATCH_SIZE [4, 7]", "CROSSFORMER.PATCH_SIZE is [4, 7]"),
    ("crossformer", "[1, 2]", "PATCH_SIZE [2, 4, 6, 8, 10, 12, 14]", "too many kernels for 16 channels"),
    ("crossformer", "[1, 2]", "MERGE_SIZE [[3]]", "CROSSFORMER.MERGE_SIZE is [3]"),
    ("crossformer", "[1, 2]", "MLP_RATIO [1, 2, 3]", "CROSSFORMER.MLP_RATIO has 3 entries"),
    ("crossformer", "[1, 2]", "MLP_RATIO 0.01", "leaves no hidden channel"),
    ("swin", "[1, 2]", "NUM_HEADS [1]", "SWIN.NUM_HEADS has 1 entries for 2 stages"),
    ("swin", "[1, 2]", "NUM_HEADS [3, 2]", "SWIN.NUM_HEADS is [3, 2]"),
    ("swinv2", "[1, 2]", "NUM_HEADS [3, 2]", "SWINV2.NUM_HEADS is [3, 2]"),
    ("swinv2", "[1, 2]", "PRETRAINED_WINDOW_SIZES [8]", "SWINV2.PRETRAINED_WINDOW_SIZES has 1 entries"),
    ("swin_mlp", "[1, 2]", "NUM_HEADS [3, 2]", "SWIN_MLP.NUM_HEADS is [3, 2]"),
    ("pvt_v2", "[1, 2]", "NUM_HEADS [3, 2]", "PVT_V2.NUM_HEADS is [3, 2]"),
    ("pvt_v2", "[1, 2]", "SR_RATIOS [1]", "PVT_V2.SR_RATIOS has 1 entries for 2 stages"),
    ("pvt", "[1, 2]", "SR_RATIOS [1, 2]", "PVT.SR_RATIOS ends with 2"),
    ("cvt", "[1, 2]", "PATCH_PADDINGS [9, 1]", "CVT.PATCH_PADDINGS is [9, 1]"),
    ("shunted", "[2, 2]", "SR_RATIOS [3, 1]", "SHUNTED.SR_RATIOS is [3, 1]"),
    ("mpvit", "[4, 4]", "CRPE_WINDOWS [[2, 4]]", "odd kernel"),
    ("galerkin", "[1, 2]", "MLP_RATIO 0.01", "GALERKIN.MLP_RATIO"),
])
def test_numbers_that_make_no_model_are_told_by_their_keys(kind: str, own: str, changed: str, words: str) -> None:
    section = f"MODEL.{kind.upper()}"
    numbers = dict(DEPTHS="[1, 1]", NUM_HEADS=own)
    numbers |= dict(EMBED_DIM="16") if f"{section}.EMBED_DIM" in KEY else dict(EMBED_DIMS="[16, 32]", MLP_RATIOS="[2, 2]")
    more = dict(crossformer=dict(GROUP_SIZE="[4, 4]", INTERVAL="[2, 1]"), shunted=dict(SR_RATIOS="[2, 1]"), pvt=dict(SR_RATIOS="[2, 1]"),
                pvt_v2=dict(SR_RATIOS="[2, 1]"), mpvit=dict(NUM_PATHS="[2, 2]", CRPE_WINDOWS="[[3, 4]]"),
                cvt=dict(PATCH_SIZES="[7, 3]", PATCH_STRIDES="[4, 2]", PATCH_PADDINGS="[2, 1]", KV_STRIDES="[2, 2]"))
    numbers |= more.get(kind, {})

    def config(**numbers: str) -> CfgNode:
        pairs = [word for leaf, value in numbers.items() for word in (f"{section}.{leaf}", value)]
        return get_config(opts=["MODEL.TYPE", kind, "MODEL.NAME", "own", "DATA.IMG_SIZE", "32", *pairs])

    drawn = torch.get_rng_state()
    with torch.device("meta"):
        build_model(config(**numbers), 4)
    assert torch.equal(drawn, torch.get_rng_state())
    leaf, _, value = changed.partition(" ")
    with pytest.raises(ConfigError, match=re.escape(words)):
        build_model(config(**numbers | {leaf: value}), 4)


def test_a_model_larger_than_the_memory_is_told_before_it_is_built() -> None:
    with pytest.raises(ConfigError, match=r"weights take [\d,.]+ GiB"):
        build_model(get_config(opts=["MODEL.TYPE", "galerkin", "MODEL.GALERKIN.EMBED_DIM", "8192", "MODEL.GALERKIN.DEPTHS", "[9, 9, 9, 9]",
                                     "MODEL.GALERKIN.NUM_HEADS", "[8, 8, 8, 8]"]), 4)
