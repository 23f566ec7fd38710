"""--export of dense tasks: what onnxruntime makes of the file is what the model says, and the file tells what it needs and gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from config import ConfigError, get_config
from utils.commands import export_dense
from utils.inference.exporters import ExportError, onnx_outputs
from utils.inference.trained_model import Trained
from utils.tasks.build import build_task
from utils.tasks.detection import Detection

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TINY = ["MODEL.TYPE", "galerkin", "MODEL.NAME", "tiny", "MODEL.GALERKIN.EMBED_DIM", "16", "MODEL.GALERKIN.DEPTHS", "[1,1]",
        "MODEL.GALERKIN.NUM_HEADS", "[1,2]", "DATA.DENSE.SHORT_SIDE", "[60]", "DATA.DENSE.LONG_SIDE", "90", "MODEL.DENSE.WIDTH", "16",
        "MODEL.DENSE.MIN_SCORE", "0.0", "MODEL.DENSE.DETECTIONS", "7", "DEVICE", "cpu"]


def write(path: Path, *opts: str) -> tuple[str, Trained]:
    config = get_config(None, [*TINY, *opts])
    task = build_task(config)
    torch.manual_seed(0)
    model = task.build_model(config, 3).eval().requires_grad_(False)
    trained = Trained(config, model, "best.pth", False, 4, False, ["ant", "bee", "cat"])
    with torch.no_grad():
        return export_dense.write_dense_onnx(config, trained, task, str(path)), trained


def test_a_detector_finds_the_same_objects(tmp_path: Path) -> None:
    path = tmp_path / "found.onnx"
    line, trained = write(path, "TASK", "instance")
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert facts["classes"] == ["ant", "bee", "cat"] and facts["task"] == "instance" and len(facts["preprocessing"]["mean"]) == 3
    _, height, width = facts["preprocessing"]["input_size"]
    assert height % 8 == width % 8 == 0 and "21 objects" in line
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(9))
    found = dict(zip(facts["outputs"], onnx_outputs(str(path))(images), strict=True))
    expected = trained.model(images)[0]
    assert found.keys() == expected.keys()
    assert found["boxes"].shape == (7, 4) and torch.allclose(found["boxes"].sum(), expected["boxes"].sum(), rtol=1e-3)


def test_retinanets_objects_are_found_by_the_export_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Detection.build_model

    def telling(self: Detection, config: CfgNode, classes: int) -> nn.Module:
        model = real(self, config, classes)  # whose scores would nearly all be one
        for parameter in model.head.parameters():
            if parameter.ndim == 4:
                nn.init.xavier_uniform_(parameter, gain=2.0)
        return model

    monkeypatch.setattr(Detection, "build_model", telling)
    line, _ = write(tmp_path / "found.onnx", "TASK", "detection")
    assert 15 <= int(re.search(r"on (\d+) objects", line)[1]) <= 21  # several have one score, of whom any may be the last


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export_dense.onnx_outputs
    monkeypatch.setattr(export_dense, "onnx_outputs", lambda path: lambda images: real(path)(images * 1.5))
    with pytest.raises(ExportError):
        write(tmp_path / "found.onnx", "TASK", "instance")
    with pytest.raises(ConfigError, match="onnx"):
        write(tmp_path / "found.pt2", "TASK", "instance")
    assert not list(tmp_path.iterdir())


def test_a_class_for_each_pixel_on_any_number_of_images(tmp_path: Path) -> None:
    path = tmp_path / "map.onnx"
    line, _ = write(path, "TASK", "semantic", "MODEL.DENSE.HEAD", "semantic_fpn")
    logits, = onnx_outputs(str(path))(torch.zeros(3, 3, *[int(x.dim_value) for x in
                                                          onnx.load(path).graph.input[0].type.tensor_type.shape.dim[2:]]))
    assert logits.shape[:2] == (3, 3) and "batches of 1, 2 and 5" in line
