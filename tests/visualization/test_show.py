"""--show-batch and --show-attention: the pictures hold what the model is given and what it attends to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL
from PIL import Image

import main
from config import get_config
from data import build_loaders, preprocessing
from models.crossformer import CrossFormer
from utils.tasks.classification import Classification
from utils.visualization.attention_map import Attended, attended, chosen, page
from utils.visualization.batch_grid import labels_of, lines_of, sheet
from utils.visualization.drawing import drawable, to_image


def test_labels_of_a_mixed_batch() -> None:
    """Two classes with their shares, label smoothing taken out; as timm's mixup makes them."""
    from timm.data.mixup import mixup_target
    classes = torch.tensor([0, 3, 3, 1])
    mixed = labels_of(mixup_target(classes, 5, 0.7, 0.1), 0.1)
    assert [[which for which, _ in label] for label in mixed] == [[0, 1], [3], [3], [1, 0]]
    assert [round(weight, 4) for _, weight in mixed[0]] == [0.7, 0.3] and mixed[1][0][1] == pytest.approx(1, abs=1e-5)
    assert labels_of(torch.tensor([2, 0]), 0.1) == [[(2, 1.0)], [(0, 1.0)]]


@pytest.mark.parametrize("where", ["worker", "device"])
def test_batch_is_drawn_as_the_model_is_given_it(where: str, tiny_cfg: Path, program) -> None:
    opts = ["DATA.AUGMENT_ON", where, "SEED", "3", "AUG.REPROB", "1.0"]
    done = program("--cfg", tiny_cfg, "--show-batch", "batch.png", "--opts", *opts)
    assert done.returncode == 0 and "wrote batch.png: 8 images of 32 x 32 pixels" in done.stdout, done
    config = get_config(str(tiny_cfg), opts)
    loaders = build_loaders(config, splits=("train",))
    images, targets = Classification(config).batch_transform(config, 4, rank=0)(next(loaders.batches()), 0)
    assert targets.shape == (8, 4)
    drawn = np.asarray(Image.open(program.folder / "batch.png"))
    side, step, prepare = 32 * 6, 32 * 6 + 14, preprocessing(config)
    for number, image in enumerate(images):
        left, top = 24 + number % 3 * step, 86 + number // 3 * (side + 6 + 2 * 17 + 14)
        expected = np.asarray(to_image(image, prepare["mean"], prepare["std"]))
        assert np.array_equal(drawn[top:top + side:6, left:left + side:6], expected), number
    assert not (program.folder / "output").exists()


def test_sheet_keeps_long_names_inside_and_goes_on_with_single_labels() -> None:
    names = ["x" * 200, "y"]
    shares = torch.tensor([[0.6, 0.4], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    tiles = [Image.new("RGB", (32, 32), (255, 0, 0))] * 4
    drawn = np.asarray(sheet(tiles, lines_of(shares, 0.0, names), "t" * 500, "s"))
    assert (drawn[:, -20:] == drawn[0, 0]).all() and (drawn[-20:] == drawn[0, 0]).all()  # margins stay empty
    labels = drawn[86 + 192 + 6:86 + 192 + 6 + 2 * 17]
    assert (labels[:, 24:24 + 192] != drawn[0, 0]).any() and (labels[:, 24 + 192 + 2:24 + 192 + 14] == drawn[0, 0]).all()


def test_names_in_any_script_are_told_apart() -> None:
    assert drawable("a\x1b[2J\n") == "a\\x1b[2J\\n"
    tiles = [Image.new("RGB", (32, 32), (255, 0, 0))] * 2
    drawn = np.asarray(sheet(tiles, [[("\u732b", "")], [("\u72ac", "")]], "t", "s"))
    first, second = (drawn[86 + 192 + 2:, left:left + 192] for left in (24, 24 + 192 + 14))
    assert (first != second).any()  # no boxes, which are all alike


def test_pictures_need_a_place(tiny_cfg: Path, program) -> None:
    for arguments, words in (
            (["--show-batch", "batch.jpg"], "ends in .png"), (["--show-batch", "nowhere/batch.png"], "no file can be written there"),
            (["--show-attention", "x.png", "--show-file", "nowhere/a.png"], "SHOW.FILE"),
            (["--show-attention", "x.png", "--show-token", "40,3"], "outside the model's input of 32 x 32"),
            (["--show-attention", "x.png", "--show-token", "here"], "give y,x"),
            (["--show-attention", "x.png", "--opts", "MODEL.TYPE", "swin"], "CrossFormer and CrossFormer++; MODEL.TYPE is swin")):
        done = program("--cfg", tiny_cfg, *arguments)
        assert done.returncode == 2 and words in done.stderr, done
    done = program("--cfg", tiny_cfg, "--show-attention", "absent.png")
    assert done.returncode == 3 and "absent.png: cannot be read" in done.stderr


# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model() -> CrossFormer:
    """One head a stage and values and projections that pass tokens through: a block's attention is a weighted mean of its input."""
    torch.manual_seed(0)
    model = CrossFormer(embed_dim=16, depths=(2, 3), num_heads=(1, 1), group_size=(4, 3), interval=(2, 1), merge_size=((2, 4),),
                        num_classes=3)
    for layer in model.layers:
        for block in layer.blocks:
            width = block.attn.proj.in_features
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)
            block.attn.qkv.weight.data[2 * width:] = torch.eye(width)
            block.attn.qkv.bias.data[2 * width:] = 0
            block.attn.proj.weight.data, block.attn.proj.bias.data = torch.eye(width), torch.zeros(width)
            torch.nn.init.normal_(block.attn.pos.pos3[2].weight)
    return model.eval()


@pytest.mark.parametrize("size", [(64, 64), (52, 40)])  # the second one pads the maps of both stages
def test_weights_are_those_that_the_block_applies(size: tuple[int, int], model: CrossFormer) -> None:
    torch.manual_seed(1)
    image, point = torch.randn(1, 3, *size), (37, 22)
    inputs: dict[object, torch.Tensor] = {}
    hooks = [block.norm1.register_forward_hook(lambda norm, _, out: inputs.__setitem__(norm, out))
             for layer in model.layers for block in layer.blocks]
    with torch.inference_mode():
        model(image)
        found = attended(model, image, point)
    for hook in hooks:
        hook.remove()
    assert [(item.stage, item.block, item.far) for item in found] == [
        (0, 0, False), (0, 1, True), (1, 0, False), (1, 1, False), (1, 2, False)]
    for item in found:
        block = model.layers[item.stage].blocks[item.block]
        x = inputs[block.norm1]
        assert item.token == (point[0] // item.stride, point[1] // item.stride) and item.stride == 4 * 2 ** item.stage
        assert item.weights.sum() + item.on_padding == pytest.approx(1, abs=1e-5) and item.on_padding < 1e-6
        with torch.inference_mode():
            expected = block.attend_groups(x)[0, item.token[0], item.token[1]]
            ours = (torch.from_numpy(item.weights)[:, None] * x[0, item.cells[:, 0], item.cells[:, 1]]).sum(0)
        assert torch.allclose(ours, expected, atol=1e-4), item
        assert item.weights.max() > 1.3 * item.weights.mean()  # not a mean that any group would give


def test_long_distance_reaches_every_other_token_and_short_the_neighbours(model: CrossFormer) -> None:
    near, far = attended(model, torch.randn(1, 3, 64, 64), (37, 22))[:2]
    y, x = near.token
    assert {tuple(cell) for cell in near.cells} == {(i, j) for i in range(8, 12) for j in range(4, 8)} and (y, x) == (9, 5)
    assert {tuple(cell) for cell in far.cells} == {(i, j) for i in range(9, 16, 2) for j in range(1, 8, 2)}
    assert [(item.stage, item.block) for item in chosen(attended(model, torch.randn(1, 3, 64, 64), (0, 0)))] == [(0, 0), (0, 1), (1, 2)]


def test_the_strongest_cell_is_drawn_lightest() -> None:
    image = Image.new("RGB", (64, 64), (0, 0, 0))
    cells = np.array([(i, j) for i in range(2) for j in range(2)])
    item = Attended(0, 0, False, 32, (0, 0), cells, np.array([0.1, 0.1, 0.7, 0.1], np.float32), 0.0)
    drawn = np.asarray(page(image, [item], 1, (5, 5), "title", "below")).astype(int)
    left, top, factor = 26 + 256 + 20, 26 + 28 + 24 + 12 + 22, 4
    levels = {(i, j): drawn[top + (32 * i + 20) * factor, left + (32 * j + 20) * factor].sum() for i in range(2) for j in range(2)}
    assert levels[1, 0] == max(levels.values()) > 1.5 * levels[1, 1]


def test_attention_through_the_checkpoint_alone(tiny_cfg: Path, images: Path, program) -> None:
    cfg = program.folder / "far.yaml"
    cfg.write_text(tiny_cfg.read_text().replace(TINY_MODEL, TINY_MODEL.replace("DEPTHS: [1, 2]", "DEPTHS: [2, 2]")))
    assert main.main(["--cfg", str(cfg), "--epochs", "1", "--opts", "TRAIN.WARMUP_EPOCHS", "0"]) == 0
    best = program.folder / "output/tiny/default/best.pth"
    done = program("--show-attention", images / "val/b/0.jpg", "--show-token", "30,1", "--resume", best)
    assert done.returncode == 0, done.stderr
    assert "stage 1 block 2 (long distance): token 7,0 of the map attends to 16 tokens" in done.stdout
    assert "stage 2 block 2 (short distance): token 3,0" in done.stdout
    with Image.open(program.folder / "attention.png") as picture:
        assert picture.format == "PNG" and picture.width > 800
