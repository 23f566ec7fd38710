"""torch.compile: one graph for training, one for evaluation, none more; the same names, the same run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from conftest import differences, load
from families import FAMILIES, tiny
from torch import nn

from config import get_config
from models import build_model
from models.build_dense import build_dense_model
from utils.optim.ema import WeightAverage
from utils.runtime import compile


def epochs(model: nn.Module, average: nn.Module) -> list[int]:
    """Graphs made so far, after each part of two epochs: training, evaluation, evaluation of the average."""
    images, made = torch.randn(2, 3, 32, 32), []
    for _ in range(2):
        model.train()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            logits.float().sum().backward()
        made.append(compile.compiled_graphs())
        for evaluated in (model.eval(), average.eval()):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                evaluated(images)
            made.append(compile.compiled_graphs())
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["model", "blocks"])
def test_one_graph_for_training_and_one_for_evaluation(family: str, how: str) -> None:
    """Any break of a graph is an error (fullgraph). Blocks: one a kind and stage, the first of all having no drop path."""
    torch._dynamo.utils.counters.clear()
    unit = {"pvt": "block", "cvt": "stage"}.get(family) if how == "model" else None
    model = tiny(family, "TRAIN.USE_CHECKPOINT", unit is not None, "TRAIN.CHECKPOINT_UNIT", unit or "block")
    names, average = list(model.state_dict()), WeightAverage(model, 0.9).module
    # What comes after a graph has been taken is tried where it takes less long.
    # (A stage computed again counts its batch norms' batches in place, for which eager alone has no way.)
    traced = unit == "stage" or how == "blocks" and family in ("crossformer", "swin")
    backend = "aot_eager" if traced else "eager"
    targets = compile.compile_model(model, how, backend)
    compile.compile_model(average, how, backend, like=model)
    assert list(model.state_dict()) == names and len(targets) == (1 if how == "model" else 8 if family == "mpvit" else 4)
    kinds = 1 if how == "model" else 3
    assert epochs(model, average) == [kinds, *[2 * kinds] * 5]


def test_of_a_dense_model_the_backbone_is_compiled_for_images_of_any_size() -> None:
    torch._dynamo.utils.counters.clear()
    node = [f"MODEL.PVT.{word}" if word.isupper() else word for word in FAMILIES["pvt"].split()]
    config = get_config(None, ["TASK", "detection", "MODEL.DENSE.WIDTH", "16", "MODEL.TYPE", "pvt", "MODEL.NAME", "tiny",
                               "DATA.IMG_SIZE", "32", "MODEL.DROP_PATH_RATE", "0.2", *node])
    model = build_dense_model(config, 3).eval()
    targets = compile.compile_model(model, "blocks", "eager")
    assert len(targets) == 4 and set(targets) <= set(model.backbone.modules())
    made = []
    with torch.inference_mode():
        for height, width in ((64, 96), (96, 64), (32, 64), (128, 96)):
            model(torch.randn(1, 3, height, width))
            made.append(compile.compiled_graphs())
    assert made[1] == made[2] == made[3] <= 2 * made[0]


def test_blocks_of_timm_models() -> None:
    for name, kind, number in (("vit_tiny_patch16_224", "Block", 12), ("convnext_atto", "ConvNeXtBlock", 12), ("resnet26", "Bottleneck", 8),
                               ("swin_tiny_patch4_window7_224", "SwinTransformerBlock", 12)):
        blocks = compile.repeated_blocks(timm.create_model(name))
        assert {type(block).__name__ for block in blocks} == {kind} and len(blocks) == number, name


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler without the generation of code, which takes a minute."""
    monkeypatch.setattr(compile.compile_model, "__defaults__", ("aot_eager", None))
    monkeypatch.setattr("utils.training.setup.require_compiler", lambda device, how: None)
    torch._dynamo.utils.counters.clear()


def plain_names(cfg: Path) -> set[str]:
    return build_model(get_config(str(cfg), []), 4).state_dict().keys()


def test_a_compiled_run_resumes_to_the_same_bits(tiny_cfg: Path, program, quick: None) -> None:
    """With accumulation, an average of weights and a last batch of evaluation that is not full; then evaluated, compiled."""
    command = ("--cfg", tiny_cfg, "--compile", "blocks", "--batch-size", 4, "--accumulation-steps", 2,
               "--opts", "TRAIN.SAVE_EVERY_STEPS", 4, "TRAIN.KEEP_CHECKPOINTS", 0)
    whole = program(*command)
    assert whole.returncode == 0, whole.stderr
    graphs = re.search(r"^compiled blocks: (\d+) graphs, the first step took \d+\.\d s$", whole.stdout, re.M)
    assert graphs and compile.compiled_graphs() == 2 * int(graphs[1])  # as many for evaluation, none more
    folder = program.folder / "output/tiny/default"
    straight = load(folder / "last.pth")
    assert straight["model"].keys() == plain_names(tiny_cfg)
    for path in folder.glob("*.pth"):
        if path.name != "ckpt_00000004.pth":
            path.unlink()  # as a kill in the first epoch leaves it
    torch.compiler.reset()
    resumed = program(*command)
    assert resumed.returncode == 0 and "at step 4\n" in resumed.stdout, resumed.stderr
    assert differences(*[{k: s[k] for k in ("model", "ema", "optimizer")} for s in (straight, load(folder / "last.pth"))]) == []
    evaluated = program("--eval", "--resume", folder / "last.pth")
    assert re.findall(r"^top1 .*", evaluated.stdout, re.M) == re.findall(r"^top1 .*", whole.stdout, re.M)[-1:]


def test_a_model_that_breaks_the_graph_is_one_sentence(tiny_cfg: Path, program, quick: None, monkeypatch) -> None:
    monkeypatch.setattr("models.crossformer.Block.forward", lambda self, x: x if x.mean() > 0 else -x)
    done = program("--cfg", tiny_cfg, "--compile", "blocks")
    assert done.returncode == 2 and "this model cannot be compiled" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_compiler_there_is_one_sentence(tiny_cfg: Path, tmp_path: Path, program, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    done = program("--cfg", tiny_cfg, "--device", "cpu", "--compile", "model")
    assert done.returncode == 2 and "COMPILE is model, but torch.compile does not work here" in done.stderr, done.stderr
    assert "--compile off" in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "output").exists()
