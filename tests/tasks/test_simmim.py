"""SimMIM: masks from (seed, epoch, index), the model and its loss, the authors' files, and a run from its start to fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import differences, load
from families import FAMILIES

from config import ConfigError, get_config
from data import build_loaders
from models import build_model
from models.safe_load import read_file
from models.simmim import SimMIM, enlarged, masked_error, masked_squares, normalised_by_neighbourhood
from models.weights import unwrap_state_dict
from utils.tasks.build import build_task
from utils.tasks.simmim import MaskedImages, mask_seed

PRETRAIN = """MODEL:
  TYPE: {type}
  NAME: simmim_pretrain
  DROP_PATH_RATE: 0.0
  SIMMIM:
    NORM_TARGET:
      ENABLE: True
      PATCH_SIZE: 47
  {node}:
    EMBED_DIM: 128
    DEPTHS: [ 2, 2, 18, 2 ]
    NUM_HEADS: [ 4, 8, 16, 32 ]
    WINDOW_SIZE: {window}
DATA:
  IMG_SIZE: 192
  MASK_PATCH_SIZE: 32
  MASK_RATIO: 0.6
TRAIN:
  EPOCHS: 800
  WARMUP_EPOCHS: 10
  BASE_LR: 1e-4
  WARMUP_LR: 5e-7
  WEIGHT_DECAY: 0.05
  LR_SCHEDULER:
    NAME: 'multistep'
    GAMMA: 0.1
    MULTISTEPS: [700,]
PRINT_FREQ: 100
SAVE_FREQ: 5
TAG: simmim_pretrain__img192__800ep
"""


def tiny(family: str, *opts: object, side: int = 8) -> tuple[MaskedImages, SimMIM]:
    words = FAMILIES[family].split()
    node = [x for key, value in zip(words[::2], words[1::2], strict=True) for x in (f"MODEL.{family.upper()}.{key}", value)]
    config = get_config(None, ["MODEL.TYPE", family, "MODEL.NAME", "tiny", "DATA.IMG_SIZE", "32", "TASK", "simmim", *node,
                               "DATA.MASK_PATCH_SIZE", str(side), *map(str, opts)])
    torch.manual_seed(0)
    task = build_task(config)
    return task, task.build_model(config, 5)


def test_a_mask_is_a_function_of_seed_epoch_and_index() -> None:
    seeds = torch.tensor([mask_seed(0, (epoch, index, 0)) for epoch in range(20) for index in range(50)])
    mask = masked_squares(seeds, (192, 160), 32, 0.6)
    assert mask.shape == (1000, 6, 5) and (mask.sum((1, 2)) == 18).all() and (seeds >= 0).all()
    assert torch.equal(masked_squares(seeds[7:9], (192, 160), 32, 0.6), mask[7:9])  # whatever stands beside in the batch
    assert len({tuple(m.flatten().tolist()) for m in mask}) > 990 and (mask.float().mean(0) - 0.6).abs().max() < 0.06
    assert len({mask_seed(*parts) for parts in ((0, (0, 0, 0)), (1, (0, 0, 0)), (0, (1, 0, 0)), (0, (0, 1, 0)), (0, (0, 0, 1)))}) == 5
    assert masked_squares(seeds[:3], (100, 33), 32, 0.5).shape == (3, 4, 2)
    known = masked_squares(torch.tensor([1, 2]), (64, 64), 16, 0.25).flatten(1).int().tolist()
    assert [[i for i, m in enumerate(row) if m] for row in known] == [[0, 7, 11, 13], [0, 2, 6, 12]]  # on every device


@pytest.mark.parametrize("family", ["crossformer", "swin", "swinv2", "swin_mlp"])
def test_what_is_masked_is_not_seen_and_alone_is_judged(family: str) -> None:
    FAMILIES.setdefault("swinv2", FAMILIES["swin"])
    task, model = tiny(family)
    model.eval()
    images, seeds = torch.randn(2, 3, 32, 32), torch.tensor([3, 4])
    mask = masked_squares(seeds, (32, 32), 8, 0.6)
    hidden = enlarged(mask, 8, 32, 32)[:, None]
    other = torch.where(hidden, torch.randn(2, 3, 32, 32), images)
    with torch.no_grad():
        predicted = model(images, mask)
        assert predicted.shape == images.shape and torch.equal(model(other, mask), predicted) and not torch.equal(model(other), predicted)
        error = (predicted - images).abs()[hidden.expand_as(images)].view(2, -1).mean(1)
        assert torch.allclose(task.forward(model, (images, seeds)), error) and torch.allclose(task.loss(error, None), error.sum())
        assert torch.equal(masked_error(predicted, images, mask, 8), masked_error(predicted, torch.where(hidden, images, 9), mask, 8))
        assert family.startswith("swin") and family != "swin_mlp" or model(torch.randn(1, 3, 40, 25)).shape == (1, 3, 40, 25)
    task.forward(model.train(), (images, seeds)).sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A position bias of width 1 is normed to nothing, and SwinV2's blocks begin with norms of 0.
    assert family == "swinv2" or [name for name in silent if ".attn.pos." not in name] == []
    assert {"encoder.mask_token"} < model.no_weight_decay() | {"x"} and {"encoder.mask_token", "decoder.0.weight"} < set(model.state_dict())
    result = task.evaluator(torch.device("cpu"))
    for part in ((torch.tensor([1.0, 7.0]), torch.tensor([5, -1])), (torch.tensor([2.0]), torch.tensor([0]))):
        result.update(*part)
    assert result.result().values == {"loss": 1.5} and result.result().samples == 2


def test_normalised_targets() -> None:
    x = torch.randn(2, 3, 20, 26)
    y = normalised_by_neighbourhood(x, 7)
    for row, column, window in ((8, 9, x[..., 5:12, 6:13]), (0, 0, x[..., :4, :4]), (19, 3, x[..., 16:, :7])):
        expected = (x[..., row, column] - window.mean((2, 3))) / (window.flatten(2).var(2) + 1e-6).sqrt()
        assert torch.allclose(y[..., row, column], expected, atol=1e-4)
    task, model = tiny("swin", "MODEL.SIMMIM.NORM_TARGET.ENABLE", True, "MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE", 7, "MODEL.IN_CHANS", 2)
    images, seeds = torch.randn(2, 2, 32, 32), torch.tensor([3, 4])
    mask = masked_squares(seeds, (32, 32), 8, 0.6)
    expected = masked_error(model.eval()(images, mask), normalised_by_neighbourhood(images, 7), mask, 8)
    assert torch.equal(task.forward(model, (images, seeds)), expected)


@pytest.mark.parametrize(("node", "window"), [("SWIN", 6), ("SWINV2", 12)])
def test_the_repositorys_pretraining_files(tmp_path: Path, node: str, window: int) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(PRETRAIN.format(type=node.lower(), node=node, window=window))
    config = get_config(str(path))
    assert config.TASK == "simmim" and config.TRAIN.LR_SCHEDULER.MULTISTEPS == [700] and config.AUG.SCALE == [0.67, 1.0]
    aug = config.AUG
    assert (aug.AUTO_AUGMENT, aug.REPROB, aug.MIXUP, aug.CUTMIX, aug.COLOR_JITTER) == ("none", 0, 0, 0, 0)
    config = get_config(str(path), [f"MODEL.{node}.DEPTHS", "[1, 1, 1, 1]"])
    with torch.device("meta"):
        task = build_task(config)
        model = task.build_model(config, 1000)
        whole = build_model(config, 1000)
    assert task.neighbourhood == 47 and model.decoder[0].weight.shape == (3072, 1024, 1, 1)
    # The encoder is the classifier without its head, and a mask token.
    names = {name: x.shape for name, x in whole.state_dict().items() if not name.startswith("head.")}
    assert names | {"mask_token": (1, 1, 128)} == {name: tuple(x.shape) for name, x in model.encoder.state_dict().items()}
    mixup = [get_config(str(path), opts).AUG.MIXUP for opts in (["AUG.MIXUP", "0.5"], ["TASK", "classification"])]
    assert mixup == [0.5, 0.8]


def test_wrong_settings_are_told() -> None:
    for family, opts, words in (("swin", ("DATA.MASK_PATCH_SIZE", 6), "no multiple of the model's patches of 4"),
                                ("swin", ("DATA.MASK_PATCH_SIZE", 32), "leaves none visible"),
                                ("swin", ("TRAIN.LAYER_DECAY", 0.9), "TRAIN.LAYER_DECAY 1"),
                                ("swin", ("TRAIN.BEST_METRIC", "top1"), "choose from loss"),
                                ("swin", ("TRAIN.CLASS_WEIGHTS", "balanced"), "looks at no classes"),
                                ("cvt", (), "MODEL.TYPE cvt: it takes a model of type crossformer, swin")):
        with pytest.raises(ConfigError, match=words):
            tiny(family, *opts)


def test_a_run_from_its_start_to_fine_tuning(tiny_cfg: Path, images: Path, program) -> None:
    command = ("--cfg", tiny_cfg, "--epochs", 3, "--tag", "pre", "--opts", "TASK", "simmim", "DATA.MASK_PATCH_SIZE", 8,
               "TRAIN.SAVE_EVERY_STEPS", 1, "TRAIN.KEEP_CHECKPOINTS", 0)
    done = program(*command)
    assert done.returncode == 0, done.stderr
    folder = program.folder / "output/tiny/pre"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] and {"raw_loss", "train_loss"} <= rows[0].keys() and "top1" not in rows[0]
    straight = load(folder / "last.pth")
    # What a kill after step 7, in the second epoch, leaves behind
    for file in folder.iterdir():
        if file.name in ("last.pth", "best.pth") or (file.name.startswith("ckpt") and int(file.stem[5:]) > 7):
            file.unlink()
    done = program(*command)
    assert done.returncode == 0 and "at step 7" in done.stdout, done.stderr
    resumed = load(folder / "last.pth")
    for part in ("model", "ema", "optimizer", "best", "step"):
        assert differences(resumed[part], straight[part], part) == []
    # It is evaluated by its own loss, the same masks every time, and answers nothing
    loss = f"loss {rows[-1]['loss']:.4f} (19)"
    done = program("--eval", "--resume", folder / "last.pth")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == loss, done.stderr
    for flags in (("--predict", images / "val/a"), ("--export", "x.pt2")):
        done = program(*flags, "--resume", folder / "last.pth")
        assert done.returncode == 2 and "--pretrained" in done.stderr, done.stderr
    # and starts a classifier
    tuned = program("--cfg", tiny_cfg, "--epochs", 1, "--tag", "tuned", "--pretrained", folder / "last.pth", "--opts", "TRAIN.FREEZE",
                    "[patch_embed, layers, norm]")
    assert tuned.returncode == 0 and "names under encoder." in tuned.stdout and "head.weight" in tuned.stdout, tuned.stderr
    ours = load(program.folder / "output/tiny/tuned/last.pth")["model"]
    theirs = unwrap_state_dict(read_file(str(folder / "last.pth")), "last.pth")
    assert all(torch.equal(x, theirs[f"encoder.{name}"]) for name, x in ours.items() if not name.startswith("head."))
    shutil.rmtree(folder)


def test_seeds_come_with_the_images_whatever_the_workers(tiny_cfg: Path) -> None:
    opts = ["TASK", "simmim", "DATA.MASK_PATCH_SIZE", "8"]
    config = get_config(str(tiny_cfg), opts)
    task, plain = build_task(config), build_loaders(config)
    found = {}
    for workers in (0, 2):
        loaders = task.build_loaders(get_config(str(tiny_cfg), [*opts, "DATA.NUM_WORKERS", str(workers)]))
        batches = loaders.batches(start=6)
        found[workers] = [next(batches) for _ in range(2)] + list(loaders.val)
        loaders.close()
    assert all(torch.equal(a, b) for left, right in zip(found[0], found[2], strict=True) for a, b in zip(left, right, strict=True))
    keys = plain.train.batch_sampler.keys(6)
    assert found[0][0][1].tolist() == [mask_seed(0, key) for key in keys] and (found[0][-1][1] < 0).sum() == 24 - 19
