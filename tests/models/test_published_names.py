"""Files of weights as people have them: wrapped, without a classifier, under other libraries' names; told in words that hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from recipe import published_state
from torch import Tensor, nn

from config import get_config
from models import build_model, classifier_rows, load_pretrained, load_state
from models.safe_load import MOST_REPEATED, CheckpointError, read_file
from models.weights import LoadReport, check_finite, fit_pretrained, unwrap_state_dict
from utils.checkpoints.exported import read_trained
from utils.checkpoints.file_format import require_training_state, write_checkpoint

State = dict[str, Tensor]

# Four families small enough to be built many times, with the sizes of tests/reference/hugging_face_names.json.
WIDTHS, HEADS, RATIOS = "[16, 32, 32, 32]", "[1, 2, 2, 2]", "[8, 4, 2, 1]"
NODES = {
    "swin": {"EMBED_DIM": 16, "DEPTHS": "[1, 1]", "NUM_HEADS": "[1, 2]"},
    "cvt": {"EMBED_DIMS": "[16, 32, 32]", "DEPTHS": "[1, 2, 3]", "NUM_HEADS": "[1, 2, 2]"},
    "pvt": {"EMBED_DIMS": WIDTHS, "DEPTHS": "[1, 1, 1, 1]", "NUM_HEADS": HEADS, "MLP_RATIOS": "[8, 8, 4, 4]", "SR_RATIOS": RATIOS},
    "pvt_v2": {"EMBED_DIMS": WIDTHS, "DEPTHS": "[1, 1, 1, 1]", "NUM_HEADS": HEADS, "MLP_RATIOS": "[8, 8, 4, 4]", "SR_RATIOS": RATIOS},
    "crossformer": {"EMBED_DIM": 16, "DEPTHS": "[1, 1]", "NUM_HEADS": "[1, 2]", "GROUP_SIZE": "[4, 4]", "INTERVAL": "[2, 1]",
                    "MERGE_SIZE": "[[2, 4]]"},
}
SIZES = {"swin": 56}


def config_of(family: str):
    node = [str(x) for key, value in NODES[family].items() for x in (f"MODEL.{family.upper()}.{key}", value)]
    return get_config(None, ["MODEL.TYPE", family, "MODEL.NAME", "label", *node, "DATA.IMG_SIZE", str(SIZES.get(family, 64))])


def model_of(family: str, classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(config_of(family), classes)


def start(family: str, content: object, classes: int = 5) -> tuple[State, LoadReport]:
    """The weights of a model that starts from a file with ``content``, and what is said of them."""
    model, config = model_of(family, classes, seed=1), config_of(family)
    from models.build import _filter_fn
    report = fit_pretrained(model, unwrap_state_dict(content, "file"), "file", _filter_fn(model, config))
    return model.state_dict(), report


def named(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def backbone(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def same(ours: State, source: State, *apart: str) -> bool:
    return all(torch.equal(tensor, source[name]) for name, tensor in ours.items() if not name.startswith(apart or ("\0",)))


NOISE = {f"decoder.{i}.weight": torch.ones(2) for i in range(40)}


@pytest.mark.parametrize(("wrap", "prefix", "whole"), [
    (lambda s: named("encoder.", s), "encoder.", True),
    (lambda s: {"state_dict": named("model.", s)}, "model.", True),  # Lightning
    (lambda s: {"model": named("module._orig_mod.net.", s)}, "net.", True),
    (lambda s: {"state_dict": named("model._orig_mod.", {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()})},
     "model.", True),
    (lambda s: {"model": {**named("module.", s), "n_averaged": torch.tensor(3)}}, "", True),  # torch's AveragedModel
    (lambda s: named("timm_model.", s), "timm_model.", True),  # transformers' TimmWrapper
    (lambda s: {"hyper_parameters": {"lr": 1}, "state_dict": {**named("model.swin.", s), "criterion.weight": torch.ones(5)}},
     "model.swin.", True),
    (lambda s: {**named("backbone.", backbone(s)), "head.weight": s["head.weight"], "head.bias": s["head.bias"]}, "backbone.", True),
    (lambda s: {**named("backbone.", backbone(s)), "classifier.weight": s["head.weight"], "classifier.bias": s["head.bias"]}, "backbone.",
     True),
    (lambda s: {"model": {**named("encoder.", {**backbone(s), "mask_token": torch.zeros(1, 1, 16)}), **NOISE}}, "encoder.", False),
    (lambda s: {"student": named("module.backbone.", {k: v * 0 for k, v in s.items()}),  # DINO's
                "teacher": named("backbone.", backbone(s)) | {"head.mlp.0.weight": torch.ones(3, 3)}, "epoch": 3},
     "teacher.backbone.", False),
    (lambda s: named("student.", {k: v * 0 for k, v in s.items()}) | named("teacher.", s), "teacher.", True),
    (backbone, "", False),
])
@pytest.mark.parametrize("family", ["crossformer", "swin"])
def test_one_wrapper_around_all_names_is_taken_off_and_told(family: str, wrap, prefix: str, whole: bool) -> None:
    source = model_of(family)
    ours, report = start(family, wrap(published_state(source, family)))
    line = report.summary("file")
    assert report.prefix == prefix and (f"names under {prefix}" in line) == bool(prefix)
    assert same(ours, source.state_dict(), *(() if whole else ("head.",)))
    assert whole == (not report.fresh) and (whole or "fresh because the file has none: head." in line)
    if "mask_token" in str(report.skipped):
        assert len(report.skipped) == 41 and f"41 skipped ({report.skipped[0]}" in line


def test_a_wrapped_file_of_other_sizes_is_told_by_its_shapes() -> None:
    wide = {name: torch.ones(*(2 * side for side in x.shape)) for name, x in model_of("crossformer").state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of another shape \(patch_embed.projs.0.weight is "):
        start("crossformer", named("backbone.", wide))


def test_a_larger_swin_is_told_by_what_it_has_more_and_not_as_a_foreign_file() -> None:
    """timm's translation trips over a block that the model lacks, and the same names stood on both sides of the message."""
    state = published_state(model_of("swin"), "swin")
    deeper = state | {name.replace(".blocks.0.", ".blocks.7."): x for name, x in state.items()}
    wider = {name: torch.cat([x, x]) for name, x in state.items() if x.ndim}
    for content, words in ((deeper, r"unexpected \(layers\.0\.blocks\.7"), (wider, r"of another shape \(patch_embed\.proj\.weight is \[")):
        with pytest.raises(CheckpointError, match=words):
            start("swin", content)


def test_a_backbone_without_a_classifier_is_trained_from_but_not_evaluated() -> None:
    source, config = model_of("crossformer"), config_of("crossformer")
    state = {name: x for name, x in backbone(source.state_dict()).items() if not name.startswith("norm.")}  # as detectors keep it
    ours, report = start("crossformer", {"state_dict": state})
    assert same(ours, source.state_dict(), "head.", "norm.")
    assert set(report.fresh) == {"head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert classifier_rows(source, state, config, "file") == 0
    with pytest.raises(CheckpointError, match="file: holds no classifier .*MODEL.CLASS_MAP"):
        fit_pretrained(source, state, "file", class_map=[0, 1, 2, 3, 4])
    with pytest.raises(CheckpointError, match="file: holds no classifier .*--pretrained file"):
        load_state(source, state, config, "file")


@pytest.mark.parametrize("family", ["swin", "cvt", "pvt", "pvt_v2"])
def test_hugging_faces_names(family: str) -> None:
    shapes = json.loads((ROOT / "tests/reference/hugging_face_names.json").read_text())[family]
    torch.manual_seed(0)
    file = {name: torch.rand(shape) + 0.5 if shape else torch.tensor(1) for name, shape in shapes.items()}
    ours, report = start(family, file)
    assert f"Hugging Face's names of {dict(swin='Swin', cvt='CvT', pvt='PVT', pvt_v2='PVTv2')[family]}" in report.summary("file")
    assert not (report.adapted or report.fresh or report.skipped) and math.isclose(
        sum(float(x.double().sum()) for x in ours.values()), sum(float(x.double().sum()) for x in file.values()), rel_tol=1e-9)
    first = next(re.match(r"(.*?)(?:self\.)?query\.weight", name) for name in file if name.endswith("query.weight"))
    query, value = (next(file[n] for n in file if re.fullmatch(re.escape(first[1]) + rf"(self\.)?(projection_)?{word}\.weight", n))
                    for word in ("query", "value")) if family != "cvt" else (file[first[0]], file[first[0].replace("query", "value")])
    whole = {"swin": "layers.0.blocks.0.attn.qkv", "cvt": "stage0.blocks.0.attn.proj_v", "pvt": "block1.0.attn.kv",
             "pvt_v2": "stages.0.blocks.0.attn.kv"}[family]
    assert torch.equal(ours[f"{whole}.weight"][-16:], value) and (family != "swin" or torch.equal(ours[f"{whole}.weight"][:16], query))
    assert torch.equal(ours["head.fc.weight" if family == "swin" else "head.weight"], file["classifier.weight"])
    # The bare model, as a wrapper's part
    bare = {name.partition(".")[2] if name.startswith(family) else name: x for name, x in file.items() if "classifier" not in name}
    again, report = start(family, named("encoder.", bare))
    assert report.prefix == "encoder." and all(name.startswith("head.") for name in report.fresh) and same(again, ours, "head.")


def test_openmmlabs_names_and_its_order_of_merging() -> None:
    source = model_of("swin")
    names = ((r"^patch_embed\.proj", "patch_embed.projection"), (r"^layers", "stages"), (r"\.attn\.", ".attn.w_msa."),
             (r"\.mlp\.fc1", ".ffn.layers.0.0"), (r"\.mlp\.fc2", ".ffn.layers.1"), (r"^norm\.", "norm3."))
    file = {}
    for name, x in published_state(source, "swin").items():
        if ".downsample." in name:  # theirs runs over channel, row, column; the published one over column, row, channel
            x = x.unflatten(-1, (2, 2, 16)).permute(*range(x.ndim - 1), -1, -2, -3).flatten(-3)
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        file[name.replace("head.", "head.fc.") if name.startswith("head.") else f"backbone.{name}"] = x
    ours, report = start("swin", {"meta": {}, "state_dict": file})
    assert same(ours, source.state_dict()) and report.prefix == "backbone." and "OpenMMLab" in report.summary("file")


def test_renamed_is_not_resized() -> None:
    source = model_of("swin")
    ours, report = start("swin", {"model": {**published_state(source, "swin"), "layers.0.blocks.0.attn.relative_position_index":
                                            torch.zeros(49, 49, dtype=torch.int64)}})
    line = report.summary("file")
    assert same(ours, source.state_dict()) and len(report.kept) == len(ours) and len(report.renamed) == 5
    assert "5 of them renamed (" in line and "resized" not in line and "1 skipped (layers.0.blocks.0.attn.relative" in line


@pytest.mark.parametrize("family", NODES)
def test_another_models_names_are_shown_beside_the_expected_ones(family: str) -> None:
    beit = {f"blocks.{i}.{name}": torch.ones(4, 4) for i in range(6) for name in ("attn.relative_position_bias_table", "attn.qkv.weight")}
    own = next(iter(model_of(family).state_dict()))
    for content in ({"cls_token": torch.ones(1, 1, 4), **beit}, named("net.", beit), {"model": {"layer1.0.conv1.weight": torch.ones(1)}},
                    {"x": torch.ones(1)}):
        with pytest.raises(CheckpointError) as caught:
            start(family, content)
        words = str(caught.value)
        foreign = next(iter(unwrap_state_dict(content, "file")))
        assert foreign in words and own in words and "Error" not in words and "object" not in words, words


def test_tensors_that_are_no_weights_are_refused_before_work(tmp_path: Path) -> None:
    good = model_of("crossformer").state_dict()
    name = "patch_embed.projs.0.weight"
    cases = {
        "complex64": good[name].to(torch.complex64), "int64": (100 * good[name]).to(torch.int64), "bool": good[name] > 0,
        "float8_e4m3fn": good[name].to(torch.float8_e4m3fn), "meta": torch.empty_like(good[name], device="meta"),
        "repeats 4 stored bytes": torch.zeros(1).expand(10**15)}
    for words, tensor in cases.items():
        torch.save({"model": {**good, name: tensor}, "optimizer": [tensor]}, tmp_path / "w.pth")
        path, model, config = str(tmp_path / "w.pth"), model_of("crossformer"), config_of("crossformer")
        for load in (lambda path=path, model=model, config=config: load_pretrained(model, path, config),
                     lambda path=path, model=model, config=config: load_state(model, read_file(path)["model"], config, path)):
            with pytest.raises(CheckpointError, match=words):
                load()
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        check_finite({name: cases["float8_e4m3fn"]}, "w.pth")
    torch.save({"weights": torch.zeros(1).expand(MOST_REPEATED // 8)}, tmp_path / "w.pth")  # a view that is no harm
    read_file(tmp_path / "w.pth")
    half = {key: x.half() if x.is_floating_point() else x for key, x in good.items()}
    assert same(start("crossformer", half)[0], {key: x.to(good[key].dtype) for key, x in half.items()})


def test_an_own_checkpoint_is_whole_or_refused(tmp_path: Path) -> None:
    state = {"a": torch.ones(1)}
    whole = {"hvt_format": 1, "config": "", "classes": ["a", "b"], "data_path": "d", "global_batch": 4, "steps_per_epoch": 2, "step": 3,
             "model": state, "ema": {}, "optimizer": {}, "scaler": {}, "best": {"top1": 3.0}, "loss_sums": [0.5]}
    path = str(tmp_path / "c.pth")
    write_checkpoint(path, whole)
    assert read_trained(path)["step"] == 3
    broken = [{k: v for k, v in whole.items() if k != key} for key in whole if key != "hvt_format"]
    trained = {k: v for k, v in whole.items() if k not in ("optimizer", "scaler", "loss_sums", "global_batch", "steps_per_epoch")}
    write_checkpoint(path, trained)  # as an export or an average of checkpoints
    with pytest.raises(CheckpointError, match="no training state"):
        require_training_state(read_trained(path), path)
    broken += [{**whole, key: value} for key, value in dict(
        config=3, classes=[1], step=-1, model=[], ema=None, best={"top1": "x"}, loss_sums=[None], global_batch=0).items()]
    broken += [{**whole, "model": {}}, {**whole, "model": {"a": 1}}, {**whole, "ema": {1: state["a"]}}]
    for content in broken:
        write_checkpoint(path, content)
        changed = next(key for key in whole if key not in content or content[key] is not whole[key])
        with pytest.raises(CheckpointError, match=f"is no whole checkpoint of this program: .*{changed}"):
            read_trained(path)
