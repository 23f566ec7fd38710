"""--export: each form opened by the program it is for, on a real image, against what --predict says of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from config import get_config
from models import architecture, build_model
from utils.commands.export import Normalised


@pytest.fixture
def shares(program, tiny_run: Path, images: Path) -> torch.Tensor:
    return shares_of(program, tiny_run, images)


def shares_of(program, tiny_run: Path, images: Path, *opts: str) -> torch.Tensor:
    """Probabilities of one validation image in the order of the classes, by --predict on Pillow's pixels."""
    done = program("--predict", images / "val/c/1.png", "--resume", tiny_run, "--json", "-", "--opts", "DATA.DECODER", "pillow", *opts)
    top = json.loads(done.stdout)["top"]
    return torch.tensor([share for _, share in sorted((row["number"], row["probability"]) for row in top)])


def timm_pixels(prepare: dict, path: Path) -> torch.Tensor:
    """The image as timm prepares it from a description of the preprocessing."""
    known = {key: prepare[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    return timm.data.create_transform(**known)(Image.open(path).convert("RGB"))[None]


def test_hub_folder_opens_in_timm(program, tiny_run: Path, images: Path, shares) -> None:
    done = program("--export", "mine", "--resume", tiny_run)
    assert done.returncode == 0 and not done.stderr, done
    assert "averaged weights" in done.stdout and "difference 0.0e+00" in done.stdout and len(done.stdout.splitlines()) == 2
    here = program.folder
    assert sorted(path.name for path in (here / "mine").iterdir()) == ["config.json", "model.safetensors"]
    averaged = torch.load(tiny_run, weights_only=True)["ema"]
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in load_file(here / "mine/model.safetensors").items())
    model = timm.create_model("local-dir:mine", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c", "d"]
    pixels = timm_pixels(timm.data.resolve_model_data_config(model), images / "val/c/1.png")
    assert torch.allclose(model(pixels).softmax(dim=1)[0], shares, atol=1e-5)
    assert timm.create_model("local-dir:mine", pretrained=True, num_classes=7)(pixels).shape == (1, 7)

    assert program("--export", "mine/", "--resume", tiny_run).returncode == 0  # again
    done = program("--export", "mine/other.safetensors", "--resume", tiny_run)
    assert done.returncode == 2 and "of something else" in done.stderr
    (here / "own").mkdir()
    assert program("--export", "own/other.safetensors", "--resume", tiny_run).returncode == 0
    assert timm.create_model("local-dir:own", pretrained=True).num_classes == 4
    assert not list(here.rglob(".tmp*"))


def test_hub_folder_opens_in_transformers(program, tiny_run: Path, images: Path, shares, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    assert program("--export", "mine", "--resume", tiny_run).returncode == 0
    model = transformers.AutoModelForImageClassification.from_pretrained("mine").eval()
    ours = timm.create_model("local-dir:mine", pretrained=True).eval()
    x = torch.randn(3, *ours.pretrained_cfg["input_size"])
    assert torch.equal(model(pixel_values=x).logits, ours(x)) and list(model.config.id2label.values()) == ["a", "b", "c", "d"]
    # Models are built there without storage: what no file holds must be filled in again.
    filled = dict(model.timm_model.named_buffers())
    assert all(torch.equal(buffer, filled[name]) for name, buffer in ours.named_buffers()) and any("keep" in name for name in filled)
    told = transformers.pipeline("image-classification", model="mine")(str(images / "val/c/1.png"))
    assert all(abs(row["score"] - float(shares["abcd".index(row["label"])])) < 1e-5 for row in told) and len(told) == 4


def test_the_program_reads_its_own_export(program, tiny_run: Path, tiny_cfg: Path, images: Path) -> None:
    assert program("--export", "mine/", "--resume", tiny_run).returncode == 0
    described = (program.folder / "mine/config.json").read_text()
    assert str(images) not in described and json.loads(described)["recipe"]["config"]["MODEL.NAME"] == "tiny"
    wanted = program("--eval", "--resume", tiny_run, "--weights", "ema").stdout.splitlines()[-1]
    for path in ("mine", "mine/model.safetensors"):
        done = program("--eval", "--resume", path, "--data-path", images)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == wanted, done
    done = program("--eval", "--resume", "mine/")
    assert done.returncode == 2 and "--data-path" in done.stderr
    done = program("--cfg", tiny_cfg, "--pretrained", "mine/", "--epochs", 1, "--opts", "TRAIN.REPORT", "none")
    assert done.returncode == 0 and "98 tensors kept" in done.stdout and "fresh" not in done.stdout, done
    done = program("--resume", "mine/", "--data-path", images, "--tag", "other")
    assert done.returncode == 3 and "--pretrained mine/" in done.stderr
    done = program("--predict", images / "val/c/1.png", "--resume", "mine/", "--json", "-")
    assert done.returncode == 0 and {row["class"] for row in json.loads(done.stdout)["top"]} == set("abcd")
    (program.folder / "mine/config.json").write_text(described.replace('"hvt_format": 1', '"hvt_format": "x"'))
    done = program("--eval", "--resume", "mine/", "--data-path", images)
    assert done.returncode == 3 and "mine/config.json: damaged" in done.stderr


def test_pt2_carries_what_it_needs(program, tiny_run: Path, images: Path) -> None:
    """Of a model whose images are padded."""
    shares = shares_of(program, tiny_run, images, "DATA.FIT", "pad")
    done = program("--export", "m.pt2", "--resume", tiny_run, "--opts", "DATA.FIT", "pad")
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 2, done
    beside = {"classes.json": "", "preprocessing.json": ""}
    model = torch.export.load(str(program.folder / "m.pt2"), extra_files=beside).module()
    assert json.loads(beside["classes.json"]) == ["a", "b", "c", "d"]
    prepare = json.loads(beside["preprocessing.json"])
    assert "pad" in prepare["steps"]
    pixels = timm_pixels(prepare, images / "val/c/1.png")
    assert torch.allclose(model(pixels.expand(3, -1, -1, -1)).softmax(dim=1)[2], shares, atol=1e-5)


def test_onnx_with_normalisation_inside(program, tiny_run: Path, images: Path, shares) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime
    done = program("--export", "m.onnx", "--resume", tiny_run, "--opts", "EXPORT.PREPROCESS", True)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 2, done
    path = program.folder / "m.onnx"
    session = onnxruntime.InferenceSession(str(path))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["a", "b", "c", "d"]
    prepare = json.loads(about["preprocessing"])
    prepared = timm_pixels(dict(prepare, mean=[0, 0, 0], std=[1, 1, 1]), images / "val/c/1.png")
    logits = session.run(None, {"images": np.repeat((255 * prepared).round().to(torch.uint8).numpy(), 3, axis=0)})[0]
    assert torch.allclose(torch.from_numpy(logits).softmax(dim=1)[1], shares, atol=1e-5)
    assert str(ROOT).encode() not in path.read_bytes()  # no path of this machine


def test_normalised_takes_pixels() -> None:
    model = Normalised(torch.nn.Identity(), [0.5, 0.25, 0.1], [0.5, 0.2, 0.1])
    white = model(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert torch.allclose(white[0, :, 0, 0], torch.tensor([1.0, 3.75, 9.0]))


@pytest.mark.parametrize(("kind", "opts"), [
    ("crossformer", ["EMBED_DIM", 16, "DEPTHS", "[1, 1]", "NUM_HEADS", "[1, 2]", "GROUP_SIZE", "[4, 4]", "INTERVAL", "[2, 1]", "MERGE_SIZE",
                     "[[2, 4]]", "PATCH_SIZE", 4, "NO_MASK", True]),
    ("swin", ["EMBED_DIM", 12, "DEPTHS", "[1, 1]", "NUM_HEADS", "[1, 2]", "WINDOW_SIZE", 4]),
    ("shunted", ["EMBED_DIMS", "[16, 16, 16, 16]", "DEPTHS", "[1, 1, 1, 1]"]),
])
def test_labels_and_changed_variants_have_a_name_in_timm(kind: str, opts: list) -> None:
    name = "shunted_t" if kind == "shunted" else "mine"
    node = [word if number % 2 else f"MODEL.{kind.upper()}.{word}" for number, word in enumerate(opts)]
    config = get_config(None, ["MODEL.TYPE", kind, "MODEL.NAME", name, "DATA.IMG_SIZE", 64, *node])
    known, arguments = architecture(config, 5)
    ours, theirs = build_model(config, 5).eval(), timm.create_model(known, **json.loads(json.dumps(arguments))).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


def test_mistakes_and_failures_leave_nothing_behind(program, tiny_run: Path, monkeypatch) -> None:
    rows = [(["m.h5"], 2, ["m.h5", "FILE.onnx", "FILE.pt2", "a folder"]), (["absent/m.pt2"], 2, ["there is no folder"]),
            (["mine", "--opts", "EXPORT.PREPROCESS", True], 2, ["EXPORT.PREPROCESS"]),
            (["m.pt2", "--predict", "x.jpg"], 2, ["give one of them"])]
    for arguments, status, words in rows:
        done = program("--export", *arguments, "--resume", tiny_run)
        assert done.returncode == status and len(done.stderr.splitlines()) == 1 and not done.stdout, (arguments, done)
        assert all(word in done.stderr for word in words), (arguments, done.stderr)
    if importlib.util.find_spec("onnxruntime"):
        done = program("--export", "m.onnx", "--resume", tiny_run, "--opts", "EXPORT.OPSET", 99)
        assert done.returncode == 2 and "EXPORT.OPSET is 99" in done.stderr
    done = program("--export", "m.pt2")
    assert done.returncode == 2 and "--export needs weights" in done.stderr
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    done = program("--export", "m.onnx", "--resume", tiny_run)
    assert done.returncode == 2 and "ONNX needs the package onnx" in done.stderr and "pip install -r requirements-extras.txt" in done.stderr
    monkeypatch.setattr("utils.commands.export.difference", lambda found, expected: float("nan"))
    for name in ("m.pt2", "mine"):
        done = program("--export", name, "--resume", tiny_run)
        assert done.returncode == 1 and "differs by nan" in done.stderr and "Traceback" not in done.stderr, done
    assert not list(program.folder.iterdir())
