"""--eval in depth and --compare: label sets, flips, figures of each class, two checkpoints, all against counts made by hand."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, load
from PIL import Image

from config import config_from_text
from data import build_loaders
from models import build_model
from utils.checkpoints.file_format import write_checkpoint
from utils.evaluation.image_predictions import ImagePredictions, PredictionRecorder
from utils.evaluation.loop import evaluate
from utils.evaluation.paired_test import report
from utils.evaluation.per_class import PerClass
from utils.evaluation.statistics import bootstrap_difference, mcnemar
from utils.evaluation.summary import describe
from utils.runtime.precision import Precision
from utils.tasks.build import build_task

NAMES = [f"n{i:02d}" for i in range(12)]
LAST = re.compile(r"^top1 (\S+) .*\((\d+) of (\d+)[;)]", re.M)


def paint(path: Path, number: int, seed: int) -> None:
    """A patch at a place of its class, on noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 80, (36, 36, 3))
    row, column = divmod(number, 4)
    pixels[12 * row:12 * row + 12, 9 * column:9 * column + 9] = 255
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve classes and a checkpoint, trained a little, with an average; what follows is done in this folder."""
    import main
    here = tmp_path_factory.mktemp("world")
    for number, name in enumerate(NAMES):
        for i in range(4):
            paint(here / "data/train" / name / f"{i}.png", number, 100 * number + i)
        for i in range(3):
            paint(here / "data/val" / name / f"{i}.png", number, 100 * number + 50 + i)
    (here / "cfg.yaml").write_text(f"DATA: {{DATA_PATH: '{here}/data', IMG_SIZE: 32, BATCH_SIZE: 16, NUM_WORKERS: 0}}\n" + TINY_MODEL +
                                   "TRAIN: {EPOCHS: 32, WARMUP_EPOCHS: 1, BASE_LR: 0.2, EMA_DECAY: 0.8, EVAL_FREQ: 32}\n"
                                   "SAVE_FREQ: 4\n"
                                   "AUG: {MIXUP_PROB: 0.0, AUTO_AUGMENT: none, REPROB: 0.0, HFLIP: 0.0, SCALE: [0.9, 1.0]}\n")
    cwd = Path.cwd()
    os.chdir(here)
    try:
        assert main.main(["--cfg", "cfg.yaml", "--opts", "TRAIN.KEEP_CHECKPOINTS", "0"]) == 0
    finally:
        os.chdir(cwd)
    run = here / "output/tiny/default"
    shutil.copy(run / "ckpt_00000096.pth", here / "b.pth")
    shutil.copy(run / "ckpt_00000036.pth", here / "a.pth")
    return here


def logits_of(checkpoint: Path, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (36, 12) of the averaged weights on the validation images, and their targets, by the shortest way."""
    content = load(checkpoint)
    config = config_from_text(content["config"])
    model = build_model(config, 12).eval()
    model.load_state_dict(content["ema"])
    logits, targets = [], []
    with torch.inference_mode():
        for images, target in build_loaders(config, splits=("val",), classes=content["classes"]).val:
            logits.append(model(images.flip(3) if flip else images)[target >= 0])
            targets.append(target[target >= 0])
    return torch.cat(logits), torch.cat(targets)


def turned(checkpoint: Path) -> dict:
    """The content of ``checkpoint`` with its classes in the opposite order."""
    content = load(checkpoint)
    for state in (content["model"], content["ema"]):
        for key in ("head.weight", "head.bias"):
            state[key] = state[key].flip(0)
    content["classes"] = NAMES[::-1]
    return content


def last(output: str) -> tuple[int, int]:
    """(right, of) in the last line of an evaluation."""
    found = LAST.search(output.strip().splitlines()[-1])
    assert found, output
    return int(found[2]), int(found[3])


def test_flip_judges_the_mean_of_both_images(world: Path, program) -> None:
    plain, targets = logits_of(world / "a.pth")
    mirrored, _ = logits_of(world / "a.pth", flip=True)
    by_logits = int(((plain + mirrored).argmax(1) == targets).sum())
    mean = (plain.softmax(1) + mirrored.softmax(1)) / 2
    loss = -mean[torch.arange(36), targets].log().mean()
    one = program("--eval", "--resume", world / "a.pth", "--test-flip")
    other = program("--eval", "--resume", world / "a.pth", "--opts", "TEST.FLIP", "probabilities")
    without = program("--eval", "--resume", world / "a.pth")
    assert last(one.stdout) == (by_logits, 36) and last(other.stdout) == (int((mean.argmax(1) == targets).sum()), 36)
    assert last(without.stdout) == (int((plain.argmax(1) == targets).sum()), 36)
    assert f"loss {loss:.4f}" in other.stdout.splitlines()[-1]
    losses = [f"loss {torch.nn.functional.cross_entropy(logits, targets):.4f}" for logits in ((plain + mirrored) / 2, plain)]
    assert losses[0] in one.stdout.splitlines()[-1] and losses[1] in without.stdout.splitlines()[-1] and losses[0] != losses[1]


def test_weights_named_twice_are_refused_and_the_remedies_work(world: Path, program) -> None:
    cfg, best = ["--cfg", world / "cfg.yaml"], world / "output/tiny/default/best.pth"
    for asked, status, words in [
            (["--eval", "--resume", world / "a.pth", "--pretrained", world / "b.pth"], 2, ["--resume", "--pretrained"]),
            (["--predict", world / "data/val/n00/0.png", "--resume", world / "a.pth", "--pretrained", "absent.pth"], 2, ["--pretrained"]),
            (["--throughput", *cfg, "--pretrained", "absent.pth"], 3, ["absent.pth"]),
            (["--eval", *cfg, "--output", world / "output", "--pretrained", world / "a.pth"], 2, [str(best), str(world / "a.pth")])]:
        done = program(*asked)
        assert done.returncode == status and all(word in done.stderr for word in words), (asked, done)
    for weights in (world / "a.pth", best):
        assert f"evaluating {weights}" in program("--eval", *cfg, "--output", world / "output", "--resume", weights).stdout
    assert f"evaluating {world / 'a.pth'}" in program("--eval", *cfg, "--pretrained", world / "a.pth").stdout  # no run here


def test_figures_of_each_class(world: Path, program) -> None:
    logits, targets = logits_of(world / "a.pth")
    answers = logits.argmax(1)
    done = program("--eval", "--resume", world / "a.pth", "--per-class", "classes.csv", "--csv", "wrong.csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((program.folder / "classes.csv").open()))
    assert [row["class"] for row in rows] == NAMES
    for i, row in enumerate(rows):
        right, of, taken = int(((answers == i) & (targets == i)).sum()), int((targets == i).sum()), int((answers == i).sum())
        assert (int(row["correct"]), int(row["images"]), int(row["answered"])) == (right, of, taken)
        assert float(row["recall"]) == pytest.approx(right / of, abs=1e-6)
        assert float(row["f1"]) == pytest.approx(2 * right / (of + taken), abs=1e-6)
    assert "interval of top1: " in done.stdout and "ECE" in done.stdout and "worst classes: " in done.stdout
    mistakes = list(csv.DictReader((program.folder / "wrong.csv").open()))
    best, shares = logits.topk(2).indices, logits.softmax(1).amax(1)
    paths = [str(world / f"data/val/{name}/{i}.png") for name in NAMES for i in range(3)]
    expected = {paths[i]: (NAMES[targets[i]], NAMES[best[i, 0]], NAMES[best[i, 1]]) for i in range(36) if best[i, 0] != targets[i]}
    assert {row["path"]: (row["true"], row["predicted"], row["second"]) for row in mistakes} == expected and expected
    certain = [float(row["probability"]) for row in mistakes]
    assert certain == sorted(certain, reverse=True)
    assert certain == pytest.approx([float(shares[paths.index(row["path"])]) for row in mistakes], rel=1e-4)
    again = program("--eval", "--resume", world / "a.pth", "--csv", "-")
    assert again.stdout == (program.folder / "wrong.csv").read_text() and last(again.stderr) == (36 - len(mistakes), 36)
    refused = program("--eval", "--resume", world / "a.pth", "--csv", world / "data/val/n00/0.png")
    assert refused.returncode == 2 and "PREDICT.CSV" in refused.stderr
    refused = program("--eval", "--resume", world / "a.pth", "--per-class", "nowhere/classes.csv")
    assert refused.returncode == 2 and "TEST.PER_CLASS" in refused.stderr


def test_the_table_by_hand() -> None:
    target, top1 = np.array([0, 0, 0, 1, 1, -1]), np.array([0, 2, 2, 1, 0, 1])
    answers = ImagePredictions(target, top1, top1, top1 == target, np.ones(6, np.float32), np.ones(6, np.float32), 6)
    table = PerClass.of(answers.target, answers.top1, 4)
    assert table.images.tolist() == [3, 2, 0, 0] and table.correct.tolist() == [1, 1, 0, 0] and table.answered.tolist() == [2, 1, 2, 0]
    assert table.mistaken.tolist() == [2, 0, -1, -1] and table.times.tolist() == [2, 1, 0, 0]
    assert table.precision.tolist() == [0.5, 1.0, 0.0, 0.0] and table.worst() == [0, 1]
    assert table.macro() == pytest.approx(((1 / 3 + 1 / 2) / 2, 0.75, (2 / 5 + 2 / 3) / 2))
    assert table.csv(list("abcd"))[:].splitlines()[3] == "c,0,0,,0.000000,,2,,0"
    assert answers.evaluation().line == "top1 40.00 top5 40.00 loss 1.0000 (2 of 5)"
    assert dataclasses.replace(answers, choices=5).evaluation().line == "top1 40.00 loss 1.0000 (2 of 5)"


def sorted_by_answer(world: Path, folder: Path, names: list[str]) -> list[int]:
    """Put every validation image into the folder that ``names`` has for the class the model takes it for: 100 % are right."""
    answers = logits_of(world / "b.pth")[0].argmax(1).tolist()
    files = sorted((world / "data/val").rglob("*.png"))
    for number, (file, answer) in enumerate(zip(files, answers, strict=True)):
        (folder / names[answer]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / names[answer] / f"ILSVRC2012_val_{number + 1:08d}.png")
    return answers


def test_numbered_folders_are_positions_whatever_their_order_as_text(world: Path, program) -> None:
    """As in ImageNet-V2, handed out without val/; sorted as text 10 would be the third class."""
    answers = sorted_by_answer(world, program.folder / "v2", [str(i) for i in range(12)])
    assert len(set(answers) - {0, 1}) >= 3  # as text these would all be elsewhere
    for i in range(12):
        (program.folder / f"v2/{i}").mkdir(exist_ok=True)
    done = program("--eval", "--resume", world / "b.pth", "--data-path", "v2")
    assert last(done.stdout) == (36, 36), done.stdout
    assert "has no val/" in done.stdout and "order of their letters" not in done.stdout
    absent = len(set(range(12)) - set(answers))
    if absent:
        refused = program("--eval", "--resume", world / "b.pth", "--data-path", "v2", "--labels", "v2")
        assert refused.returncode == 3 and f"lacks {absent} of the classifier's 12 classes" in refused.stderr
    refused = program("--eval", "--resume", world / "b.pth", "--labels", "v2")
    assert refused.returncode == 3 and "are numbers, these are not" in refused.stderr
    # A checkpoint whose classes stand in another order: the numbers count the sorted names.
    write_checkpoint(str(program.folder / "turned.pth"), turned(world / "b.pth"))
    for number in range(12):
        paint(program.folder / f"v2/{number}/more.png", number, 7)
    one = program("--eval", "--resume", world / "b.pth", "--data-path", "v2", "--labels", "v2")
    other = program("--eval", "--resume", "turned.pth", "--data-path", "v2", "--labels", "v2")
    assert last(one.stdout) == last(other.stdout) and last(one.stdout)[0] >= 36 and last(one.stdout)[1] == 48


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_is_not_taken_for_a_set_of_its_own(split: str, world: Path, program) -> None:
    """Or the training images would be evaluated where the data's folder was meant."""
    done = program("--eval", "--resume", world / "a.pth", "--data-path", world / "data" / split)
    assert done.returncode == 3 and "looks like one split" in done.stderr


def test_other_data_are_judged_whole_and_by_the_split_that_is_asked_for(world: Path, program) -> None:
    """The checkpoint's own DATA.DATASET and DATA.VAL_FRACTION are about the images it was trained on, wherever these lie now."""
    paths = sorted((world / "data/val").glob("*/*.png"))
    shutil.copytree(world / "data/val", program.folder / "holdout")
    shutil.make_archive(str(program.folder / "holdout"), "zip", program.folder, "holdout")
    (program.folder / "holdout.csv").write_text("image_file,kind,split\n" + "".join(
        f"{path},{path.parent.name},{'test' if i % 3 else 'other'}\n" for i, path in enumerate(paths)))
    (program.folder / "plain.csv").write_text("image_file,kind\n" + "".join(f"{path},{path.parent.name}\n" for path in paths))
    shutil.copytree(world / "data/train", program.folder / "whole")
    content = load(world / "a.pth")
    content["config"] = content["config"].replace("  DATASET: imagenet\n", "  DATASET: folder\n").replace("  FOLD: ''\n", "  FOLD: 2/4\n")
    content["data_path"] = str(program.folder / "whole")
    with contextlib.closing(build_loaders(config_from_text(content["config"], ["DATA.DATA_PATH", content["data_path"]]), splits=("val",),
                                          classes=content["classes"])) as loaders:
        content["image_fingerprints"] = loaders.fingerprints()
    write_checkpoint(str(program.folder / "fold.pth"), content)
    assert last(program("--eval", "--resume", "fold.pth").stdout)[1] == 12  # a fold of 48
    (program.folder / "whole").rename(program.folder / "moved")
    assert last(program("--eval", "--resume", "fold.pth", "--data-path", "moved").stdout)[1] == 12
    right = last(program("--eval", "--resume", world / "a.pth").stdout)
    for place in ("holdout", "holdout.zip", "plain.csv"):
        done = program("--eval", "--resume", "fold.pth", "--data-path", place)
        assert last(done.stdout) == right and "DATA.FOLD 2/4" in done.stderr + done.stdout, place
    assert last(program("--eval", "--resume", "fold.pth", "--data-path", "plain.csv", "--opts", "DATA.FOLD", "1/4").stdout)[1] == 9
    done = program("--eval", "--resume", "fold.pth", "--data-path", "holdout.csv", "--split", "test")
    assert last(done.stdout)[1] == 24 and "12 of its 36 rows are left out" in done.stdout
    assert "of 36 images" in program("--compare", "fold.pth", world / "a.pth", "--data-path", "plain.csv").stdout
    refused = program("--eval", "--resume", "fold.pth", "--data-path", "holdout.csv")
    assert refused.returncode == 3 and "test (24), other (12)" in refused.stderr and "--split all" in refused.stderr
    assert last(program("--eval", "--resume", "fold.pth", "--data-path", "holdout.csv", "--split", "all").stdout) == right
    assert last(program("--eval", "--resume", world / "a.pth", "--data-path", world / "data/val", "--split", "all").stdout) == right
    assert last(program("--eval", "--resume", world / "a.pth", "--split", "train").stdout)[1] == 48


def test_subsets_are_judged_among_their_classes_and_among_all(world: Path, program) -> None:
    logits, targets = logits_of(world / "a.pth")
    chosen = [1, 4, 10]
    for i in chosen:
        shutil.copytree(world / "data/val" / NAMES[i], program.folder / "few/val" / NAMES[i])
    inside = torch.isin(targets, torch.tensor(chosen))
    unmasked = int((logits.argmax(1) == targets)[inside].sum())
    masked = int((torch.tensor(chosen)[logits[:, chosen].argmax(1)] == targets)[inside].sum())
    assert masked > unmasked
    command = ["--eval", "--resume", world / "a.pth", "--data-path", "few"]
    auto = program(*command)
    assert last(auto.stdout) == (unmasked, 9)
    assert re.search(rf"^predictions from the 3 classes with images alone: top1 .*\({masked} of 9\)$", auto.stdout, re.M)
    explicit = program(*command, "--labels", "r", "--per-class", "few.csv")
    assert last(explicit.stdout) == (masked, 9)
    assert re.search(rf"^predictions from all 12 classes: top1 .*\({unmasked} of 9\)$", explicit.stdout, re.M)
    assert [row["class"] for row in csv.DictReader((program.folder / "few.csv").open())] == [NAMES[i] for i in chosen]
    (program.folder / "names.txt").write_text("".join(NAMES[i] + "\n" for i in chosen))
    listed = program("--eval", "--resume", world / "a.pth", "--labels", "names.txt")  # on all images: the others do not count
    assert last(listed.stdout) == (masked, 9)
    compared = program("--compare", world / "a.pth", world / "a.pth", "--labels", "names.txt").stdout
    assert f"A {world / 'a.pth'}: {listed.stdout.strip().splitlines()[-1]}, 95 % interval" in compared
    assert f"both {masked}, A alone 0, B alone 0, neither {9 - masked}, of 9 images" in compared
    assert re.search(r"^raw, all images and classes: top1 .* of 36\)$", listed.stdout, re.M)
    for label, words in (("imagenet", "lacks 9 of the classifier's 12"), ("sketch", "lacks 9")):
        refused = program(*command, "--labels", label)
        assert refused.returncode == 3 and words in refused.stderr
    refused = program("--eval", "--resume", world / "a.pth", "--labels", "a")
    assert refused.returncode == 3 and "holds all of the classifier's 12 classes" in refused.stderr
    refused = program(*command, "--labels", "imagenet-r")
    assert refused.returncode == 2 and "choose from auto, imagenet" in refused.stderr


def test_real_labels_go_by_the_number_in_the_name(world: Path, program) -> None:
    """Any of an image's labels is right, images without do not count, and the file's order is the images' own, not the folders'."""
    answers = sorted_by_answer(world, program.folder / "real/val", [NAMES[11 - i] for i in range(12)])  # all original labels wrong
    real = [[answer, (answer + 1) % 12] for answer in answers]
    real[3], real[20], real[7], real[8] = [], [], [(answers[7] + 1) % 12], [(answers[8] + 5) % 12]
    (program.folder / "real.json").write_text(json.dumps(real))
    done = program("--eval", "--resume", world / "b.pth", "--data-path", "real", "--labels", "real", "--real-labels", "real.json")
    assert done.returncode == 0, done.stderr
    assert last(done.stdout) == (32, 34) and "images without a label, left out: 2" in done.stdout
    assert re.search(r"^by the original labels: top1 .*\(0 of 36\)", done.stdout, re.M)
    for name, words in (("[[1], 2]", "no list of lists"), ("[[1", "not valid JSON"), (json.dumps(real[:30]), "go by the images' names"),
                        (json.dumps([[12]] * 36), "class 12, the classifier has 12")):
        (program.folder / "bad.json").write_text(name)
        refused = program("--eval", "--resume", world / "b.pth", "--data-path", "real", "--labels", "real", "--real-labels", "bad.json")
        assert refused.returncode == 3 and words in refused.stderr, refused
    assert program("--eval", "--resume", world / "b.pth", "--real-labels", "real.json").returncode == 2


def test_published_weights_know_the_thousand_classes() -> None:
    """Of weights without class names: folders named by number, by a subset of the WordNet ids, or otherwise."""
    from data.sources.classes import imagenet_classes
    from utils.evaluation.label_sets import Labels
    wnids = imagenet_classes()
    assert len(wnids) == 1000 and wnids == sorted(wnids) and wnids[0] == "n01440764"
    labels = Labels(config_from_text(""))
    assert labels.naming(None, thousand=True)(()) is None and labels.naming(["b", "a"], thousand=False)(()) == ["b", "a"]  # streams
    assert labels.naming(None, thousand=True)([str(i) for i in range(1000)]) == wnids
    assert labels.naming(None, thousand=True)(wnids[5:9]) == wnids
    assert labels.naming(None, thousand=True)(["cat", "dog"]) is None and labels.naming(None, thousand=False)(wnids) is None


def test_comparison_is_paired_and_exact(world: Path, program) -> None:
    (a, targets), (b, _) = logits_of(world / "a.pth"), logits_of(world / "b.pth")
    right_a, right_b = a.argmax(1) == targets, b.argmax(1) == targets
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    assert only_b > only_a
    done = program("--compare", world / "a.pth", world / "b.pth")
    assert done.returncode == 0, done.stderr
    both, neither = int((right_a & right_b).sum()), int((~right_a & ~right_b).sum())
    assert f"right: both {both}, A alone {only_a}, B alone {only_b}, neither {neither}, of 36 images" in done.stdout
    assert f"p = {mcnemar(only_a, only_b):.3g}" in done.stdout
    low, high = bootstrap_difference(only_a, only_b, 36)
    assert f"points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}" in done.stdout
    assert re.search(rf"^A \S+: top1 \S+ .*\({int(right_a.sum())} of 36\)", done.stdout, re.M)
    (program.folder / "asks.yaml").write_text(f"COMPARE: {{FILES: ['{world / 'a.pth'}', '{world / 'b.pth'}']}}\n")
    assert program("--cfg", "asks.yaml").stdout == done.stdout  # a file may ask for it too
    # The same weights with their classes in another order, and another way to prepare images: one pass and two.
    content = turned(world / "b.pth")
    write_checkpoint(str(program.folder / "turned.pth"), content)
    again = program("--compare", world / "b.pth", "turned.pth")
    assert f"right: both {int(right_b.sum())}, A alone 0, B alone 0" in again.stdout and "p = 1;" in again.stdout
    content["config"] = content["config"].replace("FIT: crop", "FIT: squash")
    write_checkpoint(str(program.folder / "squashed.pth"), content)
    squashed = program("--compare", world / "b.pth", "squashed.pth")
    expected = program("--eval", "--resume", "squashed.pth")
    assert "two passes over the data" in squashed.stdout
    assert f"({last(expected.stdout)[0]} of 36)" in next(line for line in squashed.stdout.splitlines() if line.startswith("B "))
    content["classes"] = [*NAMES[:-1], "other"]
    write_checkpoint(str(program.folder / "other.pth"), content)
    assert "has other classes" in program("--compare", world / "b.pth", "other.pth").stderr
    assert "COMPARE.FILES" in program("--compare", world / "b.pth").stderr
    assert "no such checkpoint file" in program("--compare", world / "b.pth", "absent.pth").stderr


def test_verdict_by_hand() -> None:
    n = 40
    target = np.zeros(n, np.int64)
    a, b = np.ones(n, np.int64), np.ones(n, np.int64)
    a[:20], b[18:22] = 0, 0  # A alone: 18, both: 2, B alone: 2
    answers = [ImagePredictions(target, top1, top1, top1 == 0, np.ones(n), np.ones(n), 2) for top1 in (a, b)]
    lines = report(["x", "y"], *answers)
    assert "right: both 2, A alone 18, B alone 2, neither 18, of 40 images" in lines[2] and "+40.00 points" in lines[3]
    assert lines[4].startswith(f"McNemar's exact test: p = {mcnemar(18, 2):.3g}; A is better")


def test_answers_stand_in_the_order_of_the_images() -> None:
    class Loader:
        class batch_sampler:
            low, high = 0, 5
    recorder = PredictionRecorder(np.array([1, 2]))
    recorder(torch.tensor([[9.0, 1.0, 0.0], [0.0, 1.0, 2.0], [5.0, 0.0, 4.0]]), torch.tensor([0, 2, -1]))
    recorder(torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), torch.tensor([1, 1, -1]))
    answers = recorder.predictions(Loader())
    assert answers.target.tolist() == [0, 2, -1, 1, 1] and answers.top1.tolist() == [1, 2, 2, 1, 2]
    assert answers.second.tolist() == [2, 1, 1, 2, 1] and answers.choices == 2
    assert answers.right.tolist() == [False, True, False, True, False]
    assert answers.confidence[1] == pytest.approx(1 / (1 + np.exp(-1)))


def test_the_answers_of_two_ranks_are_those_of_one(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 18 images in batches of 5, the last filled up; what ranks exchange is put together by hand here."""
    content = load(world / "a.pth")
    config = config_from_text(content["config"], ["DATA.BATCH_SIZE", 5])
    model = build_model(config, 12).eval()
    model.load_state_dict(content["ema"])

    def of_rank(rank: int, world_size: int) -> tuple[PredictionRecorder, object]:
        recorder, loader = PredictionRecorder(), build_loaders(config, rank, world_size, splits=("val",), classes=content["classes"]).val
        evaluate(build_task(config), [model], loader, torch.device("cpu"), Precision(torch.device("cpu")),
                 record=lambda outputs, batch: recorder(outputs, batch[1]))
        return recorder, loader

    recorder, loader = of_rank(0, 1)
    alone = recorder.predictions(loader)
    parts: list[list[np.ndarray]] = []
    for rank in range(2):
        recorder, loader = of_rank(rank, 2)
        monkeypatch.setattr("utils.runtime.distributed.gather_objects", lambda columns: parts.append(columns) or parts)
        together = recorder.predictions(loader)
        monkeypatch.undo()
    assert [len(columns[0]) for columns in parts] == [18, 18]
    assert np.array_equal(alone.target, together.target) and np.array_equal(alone.top1, together.top1)
    assert alone.target.tolist() == [i for i in range(12) for _ in range(3)]


def test_a_full_disk_costs_the_file_not_the_figures(world: Path, program, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    for key in ("TEST.PER_CLASS", "TEST.PREDICTIONS"):
        lost = program("--eval", "--resume", world / "a.pth", "--opts", key, "figures")
        assert lost.returncode == 1 and "figures: No space left" in lost.stderr and last(lost.stdout)[1] == 36, lost
        assert not any(program.folder.iterdir())


def test_names_of_classes_stay_on_their_line() -> None:
    answers = ImagePredictions(np.array([0, 1]), np.array([1, 1]), np.array([0, 0]), np.ones(2, bool), np.ones(2), np.ones(2), 2)
    table = PerClass.of(answers.target, answers.top1, 2)
    names = ["a\ntop1 99.99", "b\udcff"]
    told = describe(answers, table, names)
    assert all("\n" not in line for line in told) and r"a\ntop1 99.99: 0 of 1 right, mostly confused with b\udcff" in told[-1]


def test_either_weights_of_a_run_are_evaluated_predicted_and_exported(world: Path, program) -> None:
    """Raw ones that know nothing beside averaged ones that do, and a file without an average."""
    content = load(world / "a.pth")
    content["model"] = {name: torch.zeros_like(tensor) for name, tensor in content["model"].items()}
    write_checkpoint(str(program.folder / "both.pth"), content)
    write_checkpoint(str(program.folder / "one.pth"), dict(content, model=content["ema"], ema={}))
    right = {weights: last(program("--eval", "--resume", "both.pth", "--weights", weights).stdout) for weights in ("auto", "raw", "ema")}
    assert right["auto"] == right["ema"] != right["raw"] and right["ema"] == last(program("--eval", "--resume", "one.pth").stdout)
    image = next((world / "data/val").rglob("*.*"))
    told = [program("--predict", image, "--resume", "both.pth", "--weights", weights, "--json", "-").stdout for weights in ("ema", "raw")]
    shares = [json.loads(line)["top"][0]["probability"] for line in told]
    assert shares[1] == pytest.approx(1 / 12, abs=1e-5) and shares[0] > shares[1]
    assert program("--export", "raw.pt2", "--resume", "both.pth", "--weights", "raw").returncode == 0
    refused = program("--eval", "--resume", "one.pth", "--weights", "ema")
    assert refused.returncode == 2 and "one.pth" in refused.stderr and "--weights" in refused.stderr
