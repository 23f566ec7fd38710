"""Other people's files: read without running their code, checked tensor by tensor, adapted where it is meant."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from recipe import published_state
from safetensors.torch import save_file
from yacs.config import CfgNode

import models  # noqa: F401  registers the families
from config import get_config
from models import build_model, load_pretrained, load_state
from models.crossformer import CrossFormer
from models.safe_load import CheckpointError, read_file, verify_digest
from models.weights import load_pretrained_file, read_state_dict

TINY = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),))


def tiny(seed: int = 0, **kwargs) -> CrossFormer:
    torch.manual_seed(seed)
    return CrossFormer(**dict(TINY, **kwargs))


class Evil:
    """Unpickled naively, it would make a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def swin_style(state: dict) -> dict:
    """As Swin's and CrossFormer's trainers save: a pickled config and numpy number beside the weights."""
    return {"model": state, "optimizer": {"state": {}}, "max_accuracy": np.float64(81.5), "epoch": 299, "config": CfgNode({"A": {"B": 1}})}


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    swin_style,
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "args": argparse.Namespace(lr=1)},
    lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    lambda s: {"model_ema": s, "epoch": 3},
    lambda s: {"state_dict_ema": s, "state_dict": {k: v * 0 for k, v in s.items()}},
    lambda s: {"model": s, "model_ema": {k: v * 0 for k, v in s.items()}},
])
@pytest.mark.parametrize("legacy", [False, True])
def test_published_forms(tmp_path: Path, wrap, legacy: bool) -> None:
    state = tiny().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "w.pth")
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_safetensors(tmp_path: Path) -> None:
    state = tiny().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    assert all(torch.equal(read_state_dict(tmp_path / "w.safetensors")[k], state[k]) for k in state)


@pytest.mark.parametrize("place", ["top", "beside", "nested", "legacy", "bare pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    evil, state = Evil(canary), {"a": torch.ones(2)}
    content = {"top": evil, "beside": {"model": state, "config": evil}, "nested": {"model": {"x": [1, {"y": evil}]}},
               "legacy": {"model": state, "x": evil}, "bare pickle": {"model": evil}}[place]
    if place == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not canary.exists()


def test_unusable_files_are_one_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good.pth"
    torch.save({"model": tiny().state_dict()}, good)
    half = tmp_path / "half.pth"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    for name, words in {"half.pth": "damaged", "text.pth": "damaged or not a checkpoint", "bad.safetensors": "damaged",
                        "none.pth": "holds no model weights", "sparse.pth": "w is not a plain dense tensor",
                        "absent.pth": "no such checkpoint file"}.items():
        with pytest.raises(CheckpointError, match=words):
            read_state_dict(tmp_path / name)


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    from models.safe_load import FORMAT_KEY
    from utils.checkpoints.file_format import write_checkpoint
    path = tmp_path / "c.pth"
    write_checkpoint(str(path), {FORMAT_KEY: 1, "x": torch.arange(1000.0)})
    assert verify_digest(str(path)) and torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(1000.0))
    content = path.read_bytes()
    trailer = range(len(content) - 40, len(content))
    for position in [*np.random.RandomState(0).randint(0, len(content), 40), *trailer]:
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            read_file(path)
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            read_file(path)


def test_weights_must_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "w.pth")
    torch.save({"model": tiny(embed_dim=32).state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"of another shape \(patch_embed.projs.0.weight is \[16, 3, 4, 4\], the model's \[8, "):
        load_pretrained_file(tiny(), path)
    torch.save({"model": {"foo": torch.ones(1), **tiny().state_dict()}}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(foo\)"):
        load_pretrained_file(tiny(), path)
    state = tiny().state_dict()
    del state["norm.weight"]
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.weight\)"):
        load_pretrained_file(tiny(num_classes=3), path)
    state = tiny().state_dict()
    state["norm.weight"][0] = float("nan")
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match="norm.weight holds NaN"):
        load_pretrained_file(tiny(), path)


def test_head_is_replaced_whole_and_the_rest_kept(tmp_path: Path) -> None:
    path, source = str(tmp_path / "w.pth"), tiny(num_classes=1000)
    torch.save({"model": source.state_dict()}, path)
    model = tiny(seed=1, num_classes=5)
    fresh = model.head.weight.clone()
    report = load_pretrained_file(model, path)
    assert torch.equal(model.head.weight, fresh) and torch.equal(model.norm.weight, source.norm.weight)
    assert "head replaced" in report.summary(path) and "[1000, 32] -> [5, 32]" in report.summary(path)
    assert len(report.kept) == len(source.state_dict()) - 2
    headless = tiny(seed=1, num_classes=0)
    load_pretrained_file(headless, path)
    assert torch.equal(headless.layers[1].blocks[1].mlp.fc1.weight, source.layers[1].blocks[1].mlp.fc1.weight)
    grey = tiny(seed=1, in_chans=1)
    report = load_pretrained_file(grey, path)
    assert len(report.adapted) == 4 and torch.allclose(grey.patch_embed.projs[0].weight, source.patch_embed.projs[0].weight.sum(1, True))


def test_timm_overlay_loads_the_repositorys_file_strictly(tmp_path: Path) -> None:
    path = str(tmp_path / "crossformer-t.pth")
    state = timm.create_model("crossformer_tiny").state_dict()
    extra = {"layers.0.blocks.0.attn.biases": torch.zeros(169, 2), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    torch.save(swin_style({**state, **extra}), path)
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
    model = timm.create_model("crossformer_tiny", **overlay)
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in state)
    features = timm.create_model("crossformer_tiny", features_only=True, out_indices=(0, 1, 2, 3), **overlay)
    assert torch.equal(features.model.layers[3].blocks[5].mlp.fc2.weight, state["layers.3.blocks.5.mlp.fc2.weight"])
    other = timm.create_model("crossformer_tiny", num_classes=7, **overlay)
    assert torch.equal(other.norm.weight, state["norm.weight"]) and other.head.out_features == 7
    del state["layers.2.blocks.3.norm1.weight"]
    torch.save({"model": state}, path)
    for kwargs in ({}, {"num_classes": 7}, {"features_only": True}):
        with pytest.raises(CheckpointError, match="layers.2.blocks.3.norm1.weight"):
            timm.create_model("crossformer_tiny", **kwargs, **overlay)


def official_swin(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the Swin repository's names, with the buffers that its files hold."""
    return {**published_state(model, "swin"), "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
            "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49, dtype=torch.int64)}


def test_swins_published_names_and_windows(tmp_path: Path) -> None:
    node = ["MODEL.TYPE", "swin", "MODEL.NAME", "label", "MODEL.SWIN.EMBED_DIM", "16", "MODEL.SWIN.DEPTHS", "[2, 2]",
            "MODEL.SWIN.NUM_HEADS", "[1, 2]", "MODEL.SWIN.WINDOW_SIZE"]
    config = get_config(None, [*node, "7", "DATA.IMG_SIZE", "56"])
    source = build_model(config, 6)
    path = str(tmp_path / "swin.pth")
    torch.save(swin_style(official_swin(source)), path)
    for load in (lambda model: load_pretrained(model, path, config), lambda model: load_state(model, official_swin(source), config, path)):
        same = build_model(config, 6)
        load(same)
        assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), source.state_dict().values(), strict=True))
    larger = get_config(None, [*node, "12", "DATA.IMG_SIZE", "96"])
    model = build_model(larger, 3)
    line = load_pretrained(model, path, larger).summary(path)
    assert "4 resized" in line and "relative_position_bias_table" in line and "head replaced" in line
    assert torch.equal(model.layers[0].blocks[0].mlp.fc1.weight, source.layers[0].blocks[0].mlp.fc1.weight)
