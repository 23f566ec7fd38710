"""Starting from weights: heads mapped, parts frozen, files converted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import warm_start
from conftest import ROOT, differences, environment, load
from safetensors.torch import load_file

from config import ConfigError, get_config
from models import build_model, load_pretrained
from models.crossformer import CrossFormer
from models.safe_load import CheckpointError
from utils.optim.freeze import freeze

NODE = ["MODEL.NAME", "tiny", "MODEL.CROS.EMBED_DIM", "16", "MODEL.CROS.DEPTHS", "[1, 2]", "MODEL.CROS.NUM_HEADS", "[1, 2]",
        "MODEL.CROS.GROUP_SIZE", "[4, 4]", "MODEL.CROS.INTERVAL", "[2, 1]", "MODEL.CROS.MERGE_SIZE", "[[2, 4]]"]


def config_with(*opts: object):
    return get_config(None, [*NODE, *map(str, opts)])


def test_a_larger_head_is_mapped_row_by_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_model(config_with(), 50)
    torch.nn.init.normal_(source.head.bias)
    torch.save({"model": source.state_dict()}, tmp_path / "large.pth")
    (tmp_path / "map.txt").write_text("\ufeff7\r\n49\r\n0\r\n")
    config = config_with("MODEL.CLASS_MAP", tmp_path / "map.txt")
    model = build_model(config, 3)
    line = load_pretrained(model, str(tmp_path / "large.pth"), config).summary("large.pth")
    assert "head mapped (head.weight 50 -> 3 rows" in line and "head replaced" not in line
    assert torch.equal(model.head.weight, source.head.weight[[7, 49, 0]]) and torch.equal(model.head.bias, source.head.bias[[7, 49, 0]])
    for text, words in (("1\n2\n", "names 2 rows"), ("1\n2\n50\n", "up to 50"), ("1\nx\n3\n", "map.txt:2: 'x' is no row number")):
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            load_pretrained(build_model(config, 3), str(tmp_path / "large.pth"), config)


def test_frozen_parts_stay_and_the_rest_learns(tiny_cfg: Path, program) -> None:
    first = program("--cfg", tiny_cfg, "--epochs", 1, "--tag", "first")
    assert first.returncode == 0, first.stderr
    start = load(program.folder / "output/tiny/first/last.pth")["ema"]
    weights = ["--pretrained", "output/tiny/first/last.pth"]
    done = program("--cfg", tiny_cfg, *weights, "--tag", "part", "--opts", "TRAIN.FREEZE", "[patch_embed, 'layers.0.*']")
    assert done.returncode == 0 and "M of them trained" in done.stdout
    after = load(program.folder / "output/tiny/part/last.pth")["model"]
    for name in start:
        fixed = name.startswith(("patch_embed.", "layers.0."))
        assert torch.equal(start[name], after[name]) == fixed or name.endswith("pos3.2.bias"), name
    probe = program("--cfg", tiny_cfg, *weights, "--tag", "probe", "--opts", "TRAIN.LINEAR_PROBE", True)
    assert probe.returncode == 0, probe.stderr
    after = load(program.folder / "output/tiny/probe/last.pth")["model"]
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_fixed_modules_compute_as_in_evaluation() -> None:
    config = get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", "resnet10t", "TRAIN.LINEAR_PROBE", "True"])
    model = build_model(config, 3)
    fixed = freeze(model, config)
    model.train()
    for module in fixed:
        module.eval()
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)) and model.fc.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


def test_patterns_that_fit_nothing_or_everything_are_refused() -> None:
    with pytest.raises(ConfigError, match="'layer9.*' fits no parameter of tiny; its names begin with patch_embed, layers, norm, head"):
        freeze(build_model(config_with(), 3), config_with("TRAIN.FREEZE", "['layer9.*']"))
    with pytest.raises(ConfigError, match="leaves nothing"):
        freeze(build_model(config_with(), 3), config_with("TRAIN.FREEZE", "['*']"))


def test_published_files_become_clean_safetensors(tmp_path: Path) -> None:
    from yacs.config import CfgNode
    torch.manual_seed(0)
    model = CrossFormer(embed_dim=16, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),))
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "config": CfgNode({"A": 1})}, tmp_path / "a.pth")

    def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
        return warm_start.run([str(argument) for argument in arguments], tmp_path, environment(), 60, ROOT / "scripts/convert_weights.py")

    done = convert(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert done.returncode == 0, done.stderr
    assert differences(load_file(tmp_path / "a.safetensors"), dict(model.state_dict())) == []
    (tmp_path / "bad.pth").write_text("x")
    refused = convert(tmp_path / "bad.pth", tmp_path / "b.safetensors")
    assert refused.returncode == 3 and refused.stderr.count("\n") == 1 and not (tmp_path / "b.safetensors").exists()


def test_hub_weights_without_a_network_are_one_sentence(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    config = get_config(None, ["MODEL.TYPE", "timm", "MODEL.NAME", "resnet10t"])

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network\nand a second line")

    monkeypatch.setattr("models.build.timm.create_model", offline)
    with pytest.raises(CheckpointError, match=r"weights of resnet10t cannot be fetched from the hub here \(no network\); download"):
        load_pretrained(torch.nn.Linear(1, 1), "hub", config)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="timm has no weights of crossformer_tiny"):
        load_pretrained(torch.nn.Linear(1, 1), "hub", get_config())
