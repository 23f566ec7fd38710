"""What a user types and what the program answers: help, old flags, and mistakes."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, write_images

import main
from config import COMMAND, COMMANDS, KEY, ConfigError, command_of, get_config
from data.messages import NOTICE
from utils.cli import parser
from utils.cli.flags import all_flags


def test_help_begins_with_commands_and_lists_every_flag() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "main.py"), "--help"], env=environment(), capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0 and not re.search(r"\| +(torch|timm|numpy)$", done.stderr, re.M)
    for word in ("weights and runs:", "understood from other trainers:", "exit status", "--help-keys"):
        assert word in done.stdout
    commands = [line.split() for line in done.stdout.split("options:")[0].splitlines() if "main.py --" in line and "usage" not in line]
    assert len(commands) >= 5
    for command in commands:
        parser.parse(command[command.index("main.py") + 1:])
    for flag in all_flags():
        assert re.search(rf"^  {flag.name}\b", done.stdout, re.M), flag


def stopped(program, *arguments: str) -> str:
    done = program(*arguments)
    assert done.returncode == 0 and not done.stderr
    return done.stdout


def test_keys_are_listed_and_searched(program) -> None:
    everything, few = stopped(program, "--help-keys"), stopped(program, "--help-keys", "mixup")
    assert "TRAIN.LR_SCHEDULER.WARMUP_PREFIX" in everything
    assert "AUG.MIXUP_PROB" in few and "WARMUP_PREFIX" not in few and all("mixup" in line.lower() for line in few.splitlines())


def test_version_and_environment_name_no_person_and_no_place(program, monkeypatch: pytest.MonkeyPatch) -> None:
    import platform
    import socket

    import timm
    import torch
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TORCH_HOME", "/home/somebody/cache")
    versions, text = stopped(program, "--version"), stopped(program, "--env")
    for output in (versions, text):
        assert platform.python_version() in output
        assert timm.__version__ in output and torch.__version__.partition("+")[0] in output and (torch.version.cuda or "") in output
    assert "OMP_NUM_THREADS=3" in text and "somebody" not in text
    assert str(ROOT) not in text and socket.gethostname() not in text.replace("localhost", "") and str(Path.home()) not in text


def test_completion_in_bash(program) -> None:
    """The script, run by bash: flags, words, YAML files alone after --cfg, keys and values in turn after --opts."""
    (program.folder / "done.bash").write_text(stopped(program, "--completion", "bash"))
    for name in ("a.yaml", "b.yml", "c.txt", "with blank.pth"):
        (program.folder / name).write_text("")
    script = """source done.bash
        try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _trainer_main_py; printf '%s,' "${COMPREPLY[@]}"; echo; }
        try python main.py --epo
        try python main.py --eval --cfg ''
        try ./main.py --precision b
        try python main.py --opts TRAIN.EPO
        try python main.py --opts TRAIN.EPOCHS TRAIN
        try python main.py --opts TRAIN.EPOCHS 3 MODEL.TYPE cro
        try python main.py --resume with
        try python main.py --epochs ''
        try python other.py --epo"""
    done = subprocess.run(["bash", "-c", script], cwd=program.folder, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and not done.stderr, done
    assert [set(line.strip(",").split(",")) for line in done.stdout.splitlines()] == [
        {"--epochs"}, {"a.yaml", "b.yml"}, {"bf16"}, {"TRAIN.EPOCHS"}, {""}, {"crossformer"}, {"with blank.pth"}, {""}, {""}]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_of_other_shells_are_sound(shell: str, program) -> None:
    text = stopped(program, "--completion", shell)
    assert "precision" in text and "auto fp32 bf16 fp16" in text and "TRAIN.EPOCHS" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (program.folder / "done").write_text(text)
    assert subprocess.run([shell, "-n", "done"], cwd=program.folder, capture_output=True, timeout=30, check=False).returncode == 0


def test_no_flag_beats_the_yaml_unless_given() -> None:
    assert parser.parse([]) == (None, [], [])
    cfg, opts, advice = parser.parse(["--cfg", "a.yaml", "--opts", "TAG", "x", "--epochs", "3", "--disable_amp", "--tag", "y"])
    assert (cfg, advice) == ("a.yaml", [])
    assert opts == ["TAG", "x", "TAG", "y", "TRAIN.EPOCHS", "3", "AMP_ENABLE", "False"]


@pytest.mark.parametrize("flags", [
    "--batch-size 8 --data-path x --resume r --pretrained p --accumulation-steps 2 --use-checkpoint --disable_amp --output o --tag t "
    "--throughput --optim sgd",
    "--img_size 96 --num_workers 1 --epochs 30 --lr 1e-3 --min_lr 1e-6 --warmup_lr 1e-7 --warmup_epochs 2 --weight_decay 0.1 "
    "--data-set imagenet",
])
def test_flags_of_the_old_trainers(flags: str) -> None:
    _, opts, advice = parser.parse(flags.split())
    get_config(None, opts)
    assert advice == []


@pytest.mark.parametrize("flags", ["--amp-opt-level O1", "--zip", "--cache-mode part", "--local_rank 3", "--local-rank 3",
                                   "--fused_window_process", "--fused_layernorm"])
def test_old_flags_are_accepted_with_one_line_of_advice(flags: str) -> None:
    _, opts, advice = parser.parse(flags.split())
    get_config(None, opts)
    assert len(advice) == 1 and advice[0].level == NOTICE and advice[0].startswith("--")


@pytest.mark.parametrize(("arguments", "words"), [
    (["--epoch", "3"], ["unknown flag --epoch", "did you mean --epochs?"]),
    (["--batchsize=8"], ["unknown flag --batchsize", "--batch-size"]),
    (["--batch-siz", "8"], ["did you mean --batch-size?"]),
    (["stray"], ["unexpected argument stray"]),
    (["--epochs"], ["--epochs needs a value"]),
    (["--batch-size"], ["--batch-size needs a value"]),
    (["--export", "", "--resume", "x.pth"], ["--export was given an empty value"]),
    (["--show-batch", ""], ["--show-batch was given an empty value"]),
    (["--eval", "--resume", ""], ["--resume was given an empty value"]),
    (["--pretrained", ""], ["--pretrained was given an empty value"]),
    (["--predict", "a.jpg", ""], ["--predict was given an empty value"]),
    (["--compare"], ["--compare needs at least one value"]),
    (["--eval=yes"], ["--eval takes no value", "yes"]),
    (["--epochs", "ten"], ["--epochs takes a whole number, not 'ten'"]),
    (["--learning-rate", "0.1"], ["here it is --lr"]),
    (["--class-map", "a.txt"], ["here it is --opts DATA.CLASS_NAMES"]),
    (["--clip-mode", "agc"], ["TRAIN.CLIP_GRAD"]),
    (["--depths=[2, 2]"], ["MODEL.<FAMILY>.DEPTHS [2, 2]", "SWIN", "CVT"]),
    (["--output", "s3://bucket/run"], ["--output takes a path on this machine's disks", "s3://bucket/run"]),
    (["--export", "gs://b/m.onnx"], ["--export takes a path"]),
    (["-j", "4"], ["here it is --num-workers"]),
    (["--model", "swin"], ["--cfg configs/", "MODEL.TYPE timm"]),
    (["--drop_path", "0.1"], ["--opts MODEL.DROP_PATH_RATE"]),
    (["--TRAIN.CLIP_GRAD", "5"], ["it is a key: --opts TRAIN.CLIP_GRAD"]),
    (["--Epochs", "3"], ["did you mean --epochs?"]),
    (["TRAIN.LR", "0.1"], ["--opts TRAIN.LR"]),
    (["--opts", "TRAIN.EPOCHS=3"], ["write key and value apart", "--opts TRAIN.EPOCHS 3"]),
    (["--opts", "TRAIN.EPOCHS", "--tag", "x"], ["'TRAIN.EPOCHS' has no partner"]),
    (["configs/swin_t.yaml"], ["--cfg configs/swin_t.yaml"]),
    (["best.pth"], ["--resume best.pth"]),
    (["train"], ["training is what is done without"]),
    (["test"], ["write --eval"]),
    (["--completion", "tcsh"], ["choose from"]),
    (["--help-keys", "nonsense"], ["no key"]),
])
def test_mistakes_name_what_was_meant(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parser.parse(arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_advice_names_flags_and_keys_that_exist() -> None:
    from utils.cli.suggestions import ELSEWHERE
    flags = {flag.name for flag in all_flags()} | {"--cfg", "--opts"}
    for words, advice in ELSEWHERE:
        assert set(re.findall(r"--[a-z][a-z-]+(?![a-z_])", advice.replace("--nproc_per_node", ""))) <= flags, advice
        assert set(re.findall(r"\b[A-Z]+[._][A-Z_.]*[A-Z]\b", advice)) <= set(KEY), advice
        assert not any(f"--{word}" in flags for word in words.split()), words


def test_the_nearest_configuration_file_is_named(program) -> None:
    (program.folder / "configs").mkdir()
    (program.folder / "configs/mine.yaml").write_text("")
    for asked in ("mine", "configs/mne.yaml", "mine.yml"):
        done = program("--cfg", asked)
        assert done.returncode == 2 and "did you mean configs/mine.yaml?" in done.stderr
    (program.folder / "configs/folder.yaml").mkdir()
    done = program("--cfg", "configs/folder.yaml")
    assert done.returncode == 2 and "is no file" in done.stderr and "did you mean" not in done.stderr
    done = program("--cfg", "elsewhere/other.yaml")
    assert done.returncode == 2 and "no such configuration file" in done.stderr


def test_mistakes_are_one_sentence_with_their_status(tiny_cfg: Path, images: Path, program) -> None:
    """Every row: arguments, status, words. Nothing may be left in the output folder but what a run leaves."""
    here = program.folder
    write_images(here / "flat", "train", {"a": 2})
    (here / "flat/val").mkdir()
    write_images(here / "noval", "train", {"a": 2, "b": 2})
    write_images(here / "deep/imagenet", "train", {"a": 2})
    write_images(here / "deep/imagenet", "val", {"a": 2})
    write_images(here / "strange", "train", {"a": 9, "b": 9})
    write_images(here / "strange", "val", {"a": 2, "z": 2})
    write_images(here / "classes", "", {"a": 2, "b": 2})
    (here / "empty").mkdir()
    (here / "bytes.pth").write_bytes(b"not a checkpoint at all")
    (here / "nothing.pth").write_bytes(b"")
    (here / "file").write_text("")
    cfg = ["--cfg", tiny_cfg]
    rows = [
        ([*cfg, "--data-path", here / "absent"], 3, ["absent: no such data folder", "--data-path"]),
        ([*cfg, "--data-path", here / "empty"], 3, ["empty: holds no train/ folder", "the folder is empty"]),
        ([*cfg, "--data-path", here / "file"], 3, ["is a file"]),
        ([*cfg, "--data-path", here / "flat"], 3, ["flat/val: holds no class folders"]),
        ([*cfg, "--data-path", here / "noval"], 3, ["holds no val/ or validation/ folder"]),
        ([*cfg, "--data-path", here / "deep"], 3, ["holds no train/ folder", "deep/imagenet holds them"]),
        ([*cfg, "--data-path", images / "val"], 3, ["this looks like one split", str(images)]),
        ([*cfg, "--data-path", here / "classes"], 3, ["classes without a split"]),
        ([*cfg, "--data-path", here / "strange"], 3, ["class 'z' is unknown to the training classes"]),
        ([*cfg, "--opts", "MODEL.NUM_CLASSES", 7], 2, ["MODEL.NUM_CLASSES is 7", "has 4 classes"]),
        ([*cfg, "--accumulation-steps", 9], 2, ["longer than an epoch", "at most 6"]),
        ([*cfg, "--device", "cuda:3"], 2, ["DEVICE is cuda:3"] if not _cuda() else []),
        ([*cfg, "--device", "tpu"], 2, ["choose auto, cpu, cuda"]),
        ([*cfg, "--optim", "adamx"], 2, ["TRAIN.OPTIMIZER.NAME is 'adamx'", "did you mean adam"]),
        ([*cfg, "--output", here / "file"], 2, ["cannot be written", "--output"]),
        ([*cfg, "--resume", here / "absent.pth"], 3, ["absent.pth: no such checkpoint file"]),
        ([*cfg, "--resume", here / "nothing.pth"], 3, ["is empty"]),
        ([*cfg, "--resume", here / "bytes.pth"], 3, ["damaged or not a checkpoint"]),
        ([*cfg, "--pretrained", here / "bytes.pth"], 3, ["damaged or not a checkpoint"]),
        ([*cfg, "--resume", here / "empty"], 3, ["is a folder"]),
        ([*cfg, "--opts", "AUG.AUTO_AUGMENT", "nonsense"], 2, ["AUG.AUTO_AUGMENT"]),
        ([*cfg, "--opts", "MODEL.TYPE", "timm", "MODEL.NAME", "resnet81"], 2, ["no model of timm", "resnet"]),
        (["--eval"], 2, ["--eval needs weights", "--resume FILE"]),
        (["--cfg", here / "absent.yaml"], 2, ["no such configuration file"]),
        ([], 2, ["DATA.DATA_PATH is empty", "--data-path"]),
    ]
    for arguments, status, words in rows:
        done = program(*arguments)
        assert done.returncode == status, (arguments, done)
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), (arguments, done.stderr)
        assert all(word in lines[0] for word in words), (arguments, lines)
    assert not list(here.rglob("*.tmp*")) and not list(here.rglob("ckpt_*"))


def test_missing_gpu_and_sizes_a_model_cannot_take(tiny_cfg: Path, program) -> None:
    for more in ((), ("--fit",)):
        done = program("--cfg", tiny_cfg, *more, "--opts", "MODEL.TYPE", "timm", "MODEL.NAME", "levit_128s", "DATA.IMG_SIZE", 100)
        assert done.returncode == 2 and "levit_128s" in done.stderr and "IMG_SIZE" in done.stderr
    if not _cuda():
        done = program("--cfg", tiny_cfg, "--device", "cuda")
        assert done.returncode == 2 and "finds no CUDA GPU" in done.stderr


def _cuda() -> bool:
    import torch
    return torch.cuda.is_available()


def test_imports_go_by_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(ImportError), main._uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


# --------------------------------------------------------------------------------------------------
# Commands: one row of one table
# --------------------------------------------------------------------------------------------------

NEW_COMMAND = """
import sys, types
sys.path.insert(0, {root!r})
import config
count = config.Command(config.Flag("--count-keys", "COUNT.WORD", "count the keys that hold WORD", metavar="WORD"), "count_keys.count_keys",
                       keys=(config.Key("COUNT.WORD", "", config._str, "what the keys must hold"),), light=True)
place = types.ModuleType("utils.commands.count_keys")
place.count_keys = lambda config_, logger: logger.info(f"{{sum(config_.COUNT.WORD in key for key in config.KEY)}} keys") or 0
sys.modules[place.__name__] = place
# What an additional row in the file does.
config.COMMANDS = (*config.COMMANDS, count)
config.KEYS = (*config.KEYS, *(key._replace(scope=config.COMMAND) for key in count.keys))
config.KEY = {{key.name: key for key in config.KEYS}}
config._SECTIONS.add("COUNT")
import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_command_is_one_row(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", NEW_COMMAND.format(root=str(ROOT)), *arguments], cwd=tmp_path, env=environment(),
                              capture_output=True, text=True, timeout=60, check=False)

    assert run("--count-keys", "MIXUP_").stdout == "3 keys\n"
    assert re.search(r"^  --count-keys WORD +count the keys", run("--help").stdout, re.M)
    assert "--count-keys" in run("--completion", "bash").stdout
    both = run("--count-keys", "x", "--eval")
    assert both.returncode == 2 and "--eval and --count-keys" in both.stderr
    assert "write --count-keys" in run("count-keys").stderr
    (tmp_path / "a.yaml").write_text("COUNT: {WORD: AUG.}\n")
    assert run("--cfg", "a.yaml", "--print-config").returncode == 2  # two commands, one of them from the file


@pytest.mark.parametrize(("opts", "asked"), [
    (["EVAL_MODE", "True"], "--eval"), (["EVAL_MODE", "True", "THROUGHPUT_MODE", "True"], "--throughput"), ([], None)])
def test_which_command_is_meant(opts: list[str], asked: str | None) -> None:
    command = command_of(get_config(None, opts))
    assert (command.flag.name if command is not None else None) == asked
    with pytest.raises(ConfigError, match=r"--eval and --plan"):
        command_of(get_config(None, ["EVAL_MODE", "True", "PLAN.RUN", "True"]))


def test_what_is_of_a_command_is_no_part_of_the_recipe() -> None:
    """A checkpoint written under one command must not ask for it again."""
    assert all(KEY[key.name].scope == COMMAND for command in COMMANDS for key in command.keys)
    assert {flag.key for flag in all_flags()} <= set(KEY)
    assert not any(KEY[key].scope == COMMAND for key in ("TRAIN.EPOCHS", "DATA.BATCH_SIZE", "MODEL.NAME", "SEED"))
