"""SwinV2, and the Swin repository's YAML files for it, SwinMLP and SimMIM fine-tuning; Swin-MoE is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from recipe import published_swin

from config import ConfigError, get_config
from models import architecture, build_model, load_pretrained

HEADS = {96: "[ 3, 6, 12, 24 ]", 128: "[ 4, 8, 16, 32 ]", 192: "[ 6, 12, 24, 48 ]"}
# The published counts with a classifier of 1000 classes, which is taken off.
BACKBONE = {"tiny": 28_347_154 - 769_000, "small": 49_728_418 - 769_000, "base": 87_918_816 - 1_025_000, "large": 196_739_932 - 1_537_000}


def swin_yaml(kind: str, name: str, width: int, depth: int, window: int, size: int, extra: str = "", heads: str = "", top: str = "") -> str:
    return (f"DATA:\n  IMG_SIZE: {size}\n{top}MODEL:\n  TYPE: {kind.lower()}\n  NAME: {name}\n"
            f"  DROP_PATH_RATE: 0.2\n  {kind}:\n    EMBED_DIM: {width}\n    DEPTHS: [ 2, 2, {depth}, 2 ]\n    NUM_HEADS: "
            f"{heads or HEADS[width]}\n    WINDOW_SIZE: {window}\n{extra}")


FROM_12 = "    PRETRAINED_WINDOW_SIZES: [ 12, 12, 12, 6 ]\nTRAIN:\n  EPOCHS: 30\n  WEIGHT_DECAY: 1e-8\n  BASE_LR: 4e-05\n" \
    "  WARMUP_LR: 4e-08\n  MIN_LR: 4e-07\nTEST:\n  CROP: False\n"
SIZES = {"tiny": (96, 6), "small": (96, 18), "base": (128, 18), "large": (192, 18)}
V2 = {f"swinv2_{size}_patch4_window{window}_256": swin_yaml("SWINV2", "label", *SIZES[size], window, 256)
      for size in ("tiny", "small", "base") for window in (8, 16)}
V2 |= {f"swinv2_{size}_patch4_window12_192_22k": swin_yaml("SWINV2", "label", *SIZES[size], 12, 192, top="  DATASET: imagenet22K\n")
       for size in ("base", "large")}
V2 |= {f"swinv2_{size}_patch4_window12to{window}_192to{side}_22kto1k_ft": swin_yaml("SWINV2", "label", *SIZES[size], window, side, FROM_12)
       for size in ("base", "large") for window, side in ((16, 256), (24, 384))}
MLP = {f"swin_mlp_tiny_c{channels}_patch4_window8_256": swin_yaml("SWIN_MLP", "label", 96, 6, 8, 256, heads=heads) for channels, heads in
       ((24, "[ 4, 8, 16, 32 ]"), (12, "[ 8, 16, 32, 64 ]"), (6, "[ 16, 32, 64, 128 ]"))}
MLP["swin_mlp_base_patch4_window7_224"] = swin_yaml("SWIN_MLP", "label", 128, 18, 7, 224)
FINETUNE = "TRAIN:\n  EPOCHS: 100\n  WARMUP_EPOCHS: 20\n  BASE_LR: 1.25e-3\n  WARMUP_LR: 2.5e-7\n  MIN_LR: 2.5e-7\n  LAYER_DECAY: {}\n" \
    "PRINT_FREQ: 100\nSAVE_FREQ: 5\nTAG: simmim_finetune\n"
SIMMIM = {"simmim_finetune__swin_base__img192_window6__800ep":
          swin_yaml("SWIN", "simmim_finetune", 128, 18, 6, 192, FINETUNE.format(0.9)) + "PRETRAINED: ''\n",
          "simmim_finetune__swinv2_base__img224_window14__800ep":
          swin_yaml("SWINV2", "simmim_finetune", 128, 18, 14, 224,
                    "    PRETRAINED_WINDOW_SIZES: [ 12, 12, 12, 6 ]\n  SIMMIM:\n    NORM_TARGET:\n"
                    "      ENABLE: True\n      PATCH_SIZE: 47\n" + FINETUNE.format(0.75))}


@pytest.mark.parametrize("name", V2 | MLP | SIMMIM)
def test_the_repositorys_files_make_their_models(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text((V2 | MLP | SIMMIM)[name])
    config = get_config(str(path))
    with torch.device("meta"):
        model = build_model(config, 7)
        if "tiny_patch4_window16" in name or "mlp_tiny_c6" in name or "simmim" in name:
            assert model(torch.empty(1, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)).shape == (1, 7)
    head = sum(p.numel() for p in model.get_classifier().parameters())
    size = re.search(r"tiny|small|base|large", name)[0]
    assert "v2" not in name or sum(p.numel() for p in model.parameters()) - head == BACKBONE[size]
    if "tiny_patch4_window8" in name:
        with torch.device("meta"):
            known, kwargs = architecture(config, 7)
            assert timm.create_model(known, **kwargs).state_dict().keys() == model.state_dict().keys()
    if "22kto1k" in name:
        assert config.TRAIN.WEIGHT_DECAY == 1e-8 and not config.TEST.CROP
        assert model.layers[0].blocks[0].attn.pretrained_window_size == (12, 12)
    if "simmim" in name:
        assert config.TRAIN.LAYER_DECAY in (0.9, 0.75) and config.TAG == "simmim_finetune" and config.TASK == "auto"


def test_official_files_load_at_another_window_too(tmp_path: Path) -> None:
    node = ["MODEL.TYPE", "swinv2", "MODEL.NAME", "label", "MODEL.SWINV2.EMBED_DIM", "16", "MODEL.SWINV2.DEPTHS", "[2, 2]",
            "MODEL.SWINV2.NUM_HEADS", "[1, 2]", "MODEL.SWINV2.WINDOW_SIZE"]
    config, path = get_config(None, [*node, "4", "DATA.IMG_SIZE", "32"]), str(tmp_path / "v2.pth")
    torch.manual_seed(0)
    source = build_model(config, 5).eval()
    state = {published_swin(name): x for name, x in source.state_dict().items()}
    assert re.search(r"layers\.0\.blocks\.0\.attn\.(cpb_mlp\.0\.weight|logit_scale|q_bias)", " ".join(state))
    state |= {"layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 7, 7, 2),
              "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
              "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}
    torch.save({"model": state}, path)
    same = build_model(config, 5).eval()
    report = load_pretrained(same, path, config)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(same(x), source(x)) and len(report.skipped) == 3 and not report.adapted
    larger = get_config(None, [*node, "8", "DATA.IMG_SIZE", "64", "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", "[4, 4]"])
    report = load_pretrained(build_model(larger, 5), path, larger)
    assert len(report.kept) == len(source.state_dict()) and not report.adapted
    with pytest.raises(ConfigError, match="PRETRAINED_WINDOW_SIZES has 1 entries for 2 stages"):
        build_model(get_config(None, [*node, "4", "DATA.IMG_SIZE", "32", "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES", "[4]"]), 5)


@pytest.mark.parametrize("text", ["MODEL:\n  TYPE: swin_moe\n",
                                  "MODEL:\n  SWIN_MOE:\n    EMBED_DIM: 96\n", "TRAIN:\n  MOE:\n    SAVE_MASTER: True\n"])
def test_swin_moe_is_refused_by_what_it_needs(text: str, tmp_path: Path) -> None:
    (tmp_path / "vit.yaml").write_text("MODEL:\n  TYPE: vit\n  VIT:\n    EMBED_DIM: 768\n")
    with pytest.raises(ConfigError, match="MODEL.VIT: .*MODEL.TYPE timm, SimMIM's by MODEL.NAME beit_base_patch16_224"):
        get_config(str(tmp_path / "vit.yaml"))
    assert timm.is_model("beit_base_patch16_224")
    (tmp_path / "moe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="moe.yaml:[123]: .*needs? the library Tutel.*MODEL.TYPE swin"):
        get_config(str(tmp_path / "moe.yaml"))
