"""Where a model of a dense task starts from: classifiers, checkpoints of its kind and of others; what optimizers ask of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.models
import timm.optim
import torch
from families import FAMILIES, tiny
from test_detectors import HEADS, IMAGES, TRUTH, dense, dense_config

from models import load_pretrained, load_state
from models.dense import DenseModel
from models.safe_load import CheckpointError

TASKS = dict(HEADS, semantic_fpn="semantic")


def saved(model: torch.nn.Module, path: Path) -> str:
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def different(model: torch.nn.Module) -> torch.nn.Module:
    """The same with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def equal_names(a: DenseModel, b: DenseModel) -> set[str]:
    other = b.state_dict()
    return {name for name, tensor in a.state_dict().items() if tensor.shape == other[name].shape and torch.equal(tensor, other[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_any_family_starts_the_backbone(family: str, tmp_path: Path) -> None:
    classifier, model = different(tiny(family)), dense("retinanet", "detection", family=family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_pretrained(model, saved(classifier, tmp_path / "c.pth"), dense_config("retinanet", "detection", family=family))
    after = model.state_dict()
    backbone = {name for name in after if name.startswith("backbone.model.")}
    assert set(report.kept) == backbone and report.fresh == ["fpn", "head"]
    assert all(torch.equal(after[name], classifier.state_dict()[name.removeprefix("backbone.model.")]) for name in backbone)
    assert all(torch.equal(after[name], before[name]) for name in after if name not in backbone)
    assert "fpn, head" in report.summary("c.pth")


def test_an_average_comes_before_the_weights_and_layer_norms_of_outputs_are_fresh(tmp_path: Path) -> None:
    raw, average = tiny("swin"), different(tiny("swin"))
    torch.save({"model": raw.state_dict(), "state_dict_ema": average.state_dict()}, tmp_path / "c.pth")
    opts = ("MODEL.DENSE.OUT_NORM", True)
    model = dense("semantic_fpn", "semantic", *opts, family="swin")
    report = load_pretrained(model, str(tmp_path / "c.pth"), dense_config("semantic_fpn", "semantic", *opts, family="swin"))
    name = "layers.0.blocks.0.attn.qkv.weight"
    assert torch.equal(model.backbone.model.state_dict()[name], average.state_dict()[name])
    assert report.fresh == ["backbone.norms", "branches", "classifier", "fpn"]


def test_groups_of_another_size_take_a_classifiers_weights_as_they_are(tmp_path: Path) -> None:
    opts = ("MODEL.CROSSFORMER.GROUP_SIZE", "[8,4]", "MODEL.CROSSFORMER.INTERVAL", "[4,1]")
    classifier, model = different(tiny("crossformer")), dense("mask_rcnn", "instance", *opts)
    assert [(stage.blocks[1].group_size, stage.blocks[1].interval) for stage in model.backbone.model.layers] == [(8, 4), (4, 1)]
    report = load_pretrained(model, saved(classifier, tmp_path / "c.pth"), dense_config("mask_rcnn", "instance", *opts))
    assert not report.adapted and len(report.kept) == len(model.backbone.model.state_dict())
    assert all(torch.equal(tensor, classifier.state_dict()[name]) for name, tensor in model.backbone.model.state_dict().items())


def test_a_classifier_of_other_sizes_is_refused(tmp_path: Path) -> None:
    path = saved(tiny("crossformer", "MODEL.CROSSFORMER.EMBED_DIM", 32), tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_pretrained(dense("retinanet", "detection"), path, dense_config("retinanet", "detection"))
    path = saved(tiny("crossformer", "MODEL.CROSSFORMER.DEPTHS", "[1,2]"), tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load_pretrained(dense("retinanet", "detection"), path, dense_config("retinanet", "detection"))


@pytest.mark.parametrize("head", TASKS)
def test_a_checkpoint_of_other_classes_starts_all_but_what_hangs_on_them(head: str, tmp_path: Path) -> None:
    source, model, config = different(dense(head, TASKS[head], classes=5)), dense(head, TASKS[head]), dense_config(head, TASKS[head])
    report = load_pretrained(model, saved(source, tmp_path / "d.pth"), config)
    fresh = {name for name in model.state_dict() if name.startswith(model.class_modules)}
    assert fresh and {entry.split(" ")[0] for entry in report.replaced} <= fresh
    assert equal_names(model, source) >= set(model.state_dict()) - fresh and not equal_names(model, source) & fresh
    same = dense(head, TASKS[head], classes=5)
    report = load_pretrained(same, str(tmp_path / "d.pth"), config)
    assert not report.replaced and not report.fresh and equal_names(same, source) == set(same.state_dict())


def test_another_heads_checkpoint_starts_the_backbone(tmp_path: Path) -> None:
    source, model = different(dense("retinanet", "detection")), dense("mask_rcnn", "instance")
    report = load_pretrained(model, saved(source, tmp_path / "d.pth"), dense_config("mask_rcnn", "instance"))
    backbone = {name for name in model.state_dict() if name.startswith("backbone.")}
    assert set(report.kept) == backbone and report.fresh == ["fpn", "roi_heads", "rpn"]
    assert all(torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in backbone)


def test_what_is_evaluated_must_be_there_in_whole() -> None:
    model, config = dense("mask_rcnn", "instance"), dense_config("mask_rcnn", "instance")
    state = different(dense("mask_rcnn", "instance")).state_dict()
    load_state(model, state, config, "d.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="no head of TASK instance"):
        load_state(model, tiny("crossformer").state_dict(), config, "c.pth")
    with pytest.raises(CheckpointError, match="of another shape"):
        load_state(model, dense("mask_rcnn", "instance", classes=5).state_dict(), config, "d.pth")


def test_layer_decay_takes_the_backbones_layers_and_the_head_as_the_last() -> None:
    model = dense("semantic_fpn", "semantic", "MODEL.CROSSFORMER.POSITION", "table")
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    own = timm.models.group_parameters(model.backbone.model, model.backbone.model.group_matcher(), reverse=True)
    assert all(layers[f"backbone.model.{name}"] == layer for name, layer in own.items())
    assert {layer for name, layer in layers.items() if not name.startswith("backbone.")} == {max(own.values()) + 1}
    groups = timm.optim.param_groups_layer_decay(model, 0.1, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales[id(model.fpn.inner_blocks[0][0].weight)] == (1.0, 0.1)
    assert scales[id(model.backbone.model.patch_embed.projs[0].weight)] == (0.5 ** (max(own.values()) + 1), 0.1)
    tables = [p for name, p in model.named_parameters() if name.endswith("pos.table")]
    assert tables and all(scales[id(table)][1] == 0 for table in tables)


def test_recomputation_gives_the_same_gradients() -> None:
    gradients = []
    for use in (False, True):
        model = dense("retinanet", "detection", "TRAIN.USE_CHECKPOINT", use).train()
        assert model.backbone.model.grad_checkpointing is use
        sum(model(IMAGES, None, TRUTH).values()).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
