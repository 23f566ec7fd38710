"""What was probably meant by an unknown flag, file or stray word."""

from __future__ import annotations

import argparse
import difflib
import glob
import os
import re
from collections.abc import Sequence

from config import COMMANDS, KEY, PROGRAM_FOLDER, ConfigError

# What other trainers call it, and what to write here. (words without dashes, as they are typed there; advice)
ELSEWHERE: list[tuple[str, str]] = [
    ("learning-rate base-lr blr", "--lr"),
    ("wd", "--weight-decay"),
    ("lr-find lr-finder auto-lr lr-range-test", "--find-lr FILE.png"),
    ("bs b batch batchsize train-batch-size per-device-train-batch-size", "--batch-size"),
    ("grad-accum grad-accum-steps accum-iter gradient-accumulation-steps update-freq iters-to-accumulate", "--accumulation-steps"),
    ("data data-dir dataset-path root imagenet", "--data-path"),
    ("dataset", "--data-set (or --data-path for the folder)"),
    ("input-size image-size imgsz size crop-size", "--img-size"),
    ("workers j num-worker", "--num-workers"),
    ("checkpoint ckpt load initial-checkpoint", "--resume to continue or evaluate, --pretrained to start from weights"),
    ("finetune fine-tune", "--pretrained FILE, which replaces the head where it does not fit"),
    ("model arch a name model-name", "--cfg configs/<model>.yaml, or --opts MODEL.TYPE timm MODEL.NAME <timm's name>"),
    ("config cfg-file config-file c", "--cfg"),
    ("evaluate evaluation test validate val only-eval test-only", "--eval"),
    ("train do-train", "no flag: without --eval and the like it trains"),
    ("optimizer opt", "--optim"),
    ("opt-eps", "--opts TRAIN.OPTIMIZER.EPS"),
    ("opt-betas", "--opts TRAIN.OPTIMIZER.BETAS"),
    ("opt-kwargs optim-args", "--opts TRAIN.OPTIMIZER.ARGS"),
    ("llrd layer-wise-decay", "--opts TRAIN.LAYER_DECAY"),
    ("warmup warmup-epoch", "--warmup-epochs"),
    ("class-map class-names class-to-idx", "--opts DATA.CLASS_NAMES FILE, a line a class in the classifier's order (MODEL.CLASS_MAP is "
     "another thing: rows of a larger pretrained classifier)"),
    ("clip-mode", "nothing: gradients are clipped by their norm (--opts TRAIN.CLIP_GRAD)"),
    ("early-stopping patience-epochs", "--opts TRAIN.PATIENCE"),
    ("teacher teacher-model distill distillation kd", "--opts TRAIN.DISTILLATION.TEACHER <checkpoint, or timm's name>"),
    ("teacher-path", "--opts TRAIN.DISTILLATION.WEIGHTS"),
    ("distillation-type", "--opts TRAIN.DISTILLATION.TYPE"),
    ("distillation-alpha", "--opts TRAIN.DISTILLATION.ALPHA"),
    ("distillation-tau", "--opts TRAIN.DISTILLATION.TEMPERATURE"),
    ("eval-metric", "--opts TRAIN.BEST_METRIC"),
    ("interpolation train-interpolation", "--opts DATA.INTERPOLATION"),
    ("crop-pct", "--opts TEST.CROP (or False: squashed)"),
    ("drop dropout", "--opts MODEL.DROP_RATE"),
    ("aug-repeats repeated-aug", "--opts DATA.REPEATED_AUG"),
    ("no-aug", "--opts AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0 AUG.REPROB 0 AUG.MIXUP 0 AUG.CUTMIX 0"),
    ("pin-mem", "--opts DATA.PIN_MEMORY True"),
    ("channels-last no-prefetcher", "nothing: it is chosen by the device"),
    ("torchcompile torchscript", "--compile"),
    ("cuda-graph cuda-graphs", "--compile graphs"),
    ("log-wandb wandb", "--opts TRACKER wandb"),
    ("recovery-interval save-interval", "--opts TRAIN.SAVE_EVERY_STEPS"),
    ("iters max-iters max-iter max-steps num-steps total-iters", "--iterations"),
    ("warmup-iters", "--warmup-steps"),
    ("sched scheduler lr-scheduler", "--opts TRAIN.LR_SCHEDULER.NAME"),
    ("amp fp16 bf16 half native-amp", "--precision fp16 (or bf16, fp32)"),
    ("gpu gpus cuda gpu-id", "--device cuda:0, or torchrun --nproc_per_node for several"),
    ("no-cuda cpu", "--device cpu"),
    ("save-dir output-dir work-dir exp log-dir", "--output, and --tag for the run's name"),
    ("experiment run-name exp-name", "--tag"),
    ("drop-path drop-path-rate", "--opts MODEL.DROP_PATH_RATE"),
    ("smoothing label-smoothing", "--opts MODEL.LABEL_SMOOTHING"),
    ("mixup", "--opts AUG.MIXUP"),
    ("cutmix", "--opts AUG.CUTMIX"),
    ("aa auto-augment", "--opts AUG.AUTO_AUGMENT"),
    ("reprob", "--opts AUG.REPROB"),
    ("clip-grad clip-grad-norm max-grad-norm", "--opts TRAIN.CLIP_GRAD"),
    ("model-ema ema", "--opts TRAIN.EMA_DECAY 0.9999"),
    ("num-classes nb-classes", "nothing: classes are counted in the data (or --opts MODEL.NUM_CLASSES)"),
    ("log-interval print-freq", "--opts PRINT_FREQ"),
    ("grad-checkpointing", "--use-checkpoint"),
    ("tta flip", "--test-flip"),
    ("sync-bn", "--opts TRAIN.SYNC_BN True"),
    ("nproc-per-node nnodes master-port", "before main.py: torchrun --nproc_per_node N main.py ..."),
]


def primary(action: argparse.Action) -> str:
    """The spelling of a flag that is shown: with dashes."""
    return next((option for option in action.option_strings if option.startswith("--")), action.option_strings[0])


def unknown(word: str, parser: argparse.ArgumentParser) -> ConfigError:
    """The sentence for an argument that the parser does not know."""
    if not word.startswith("-"):
        return ConfigError(f"unexpected argument {word}{_stray(word)}")
    flag, _, value = word.partition("=")
    name = flag.lstrip("-").replace("_", "-").lower()
    if advice := next((advice for words, advice in ELSEWHERE if name in words.split()), None):
        return ConfigError(f"unknown flag {flag}; here it is {advice}")
    shown = {option: primary(action) for action in parser._actions for option in action.option_strings}
    if f"--{name}" in shown:
        return ConfigError(f"unknown flag {flag}; did you mean {shown[f'--{name}']}?")
    key = name.replace("-", "_").upper()
    if near := [k for k in KEY if key in (k, k.rpartition(".")[2]) or flag.lstrip("-").upper() == k]:
        return ConfigError(f"unknown flag {flag}; it is a key: {_keys_to_set(near, value or '...')}")
    close = difflib.get_close_matches(flag.replace("_", "-"), shown, n=4, cutoff=0.7)  # the closest first
    ratio = {option: difflib.SequenceMatcher(None, option, flag).ratio() for option in close}
    names = list(dict.fromkeys(shown[option] for option in close if ratio[option] > ratio[close[0]] - 0.15))[:3]
    return ConfigError(f"unknown flag {flag}" + (f"; did you mean {', '.join(names)}?" if names else "; see --help"))


def _keys_to_set(keys: Sequence[str], value: str) -> str:
    """``--opts KEY VALUE``, or the choice where several keys end alike: each family of models has its own numbers."""
    families = [key for key in keys if key.count(".") == 2 and key.startswith("MODEL.")]
    if len(families) > 1:
        return (f"--opts MODEL.<FAMILY>.{families[0].rpartition('.')[2]} {value}, with the family of MODEL.TYPE "
                f"({', '.join(key.split('.')[1] for key in families)})")
    return " or ".join(f"--opts {key} {value}" for key in keys[:3])


def _stray(word: str) -> str:
    key = word.partition("=")[0]
    if word.lower().endswith((".yaml", ".yml")):
        return f"; a configuration file stands after its flag: --cfg {word}"
    if word.lower().endswith((".pth", ".pt", ".safetensors", ".bin", ".tar")):
        return f"; weights stand after a flag: --resume {word} (continue, or with --eval evaluate) or --pretrained {word}"
    if key.upper() in KEY or re.fullmatch(r"(DATA|MODEL|TRAIN|AUG|TEST)\.[A-Za-z_.]+", key):
        return f"; keys and their values stand after --opts: --opts {key} {word.partition('=')[2] or '...'}"
    if word in ("train", "training", "fit"):
        return "; training is what is done without a flag such as --eval"
    flag = f"--{dict(test='eval', val='eval').get(word, word)}"
    if flag in ("--help", "--version", *(command.flag.name for command in COMMANDS)):
        return f"; write {flag}"
    if os.path.isdir(word):
        return f"; a folder of data stands after its flag: --data-path {word}"
    return "; see --help"


def require_pairs(opts: Sequence[str]) -> None:
    """Raise ``ConfigError`` for ``KEY=VALUE`` where ``KEY VALUE`` is read, and for a key without a value."""
    joined = next((item for item in opts[::2] if "=" in item), None)
    if joined is not None:
        key, _, value = joined.partition("=")
        raise ConfigError(f"--opts: {joined}: write key and value apart: --opts {key} {value or '...'}")
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE; {opts[-1]!r} has no partner")


def require_config_file(path: str) -> None:
    """Raise ``ConfigError`` with the nearest file's name for a configuration that is not there as it is written."""
    if os.path.isfile(path):
        return
    here = os.path.join(PROGRAM_FOLDER, "configs")
    there = sorted({*glob.glob("configs/*.yaml"), *glob.glob(os.path.join(glob.escape(os.path.dirname(path) or "."), "*.y*ml")),
                    *(glob.glob(os.path.join(glob.escape(here), "*.yaml")) if not os.path.isdir("configs") else [])})
    by_stem = {os.path.splitext(os.path.basename(file))[0]: file for file in there if os.path.isfile(file)}
    stem = re.sub(r"\.ya?ml$", "", os.path.basename(path))
    near = difflib.get_close_matches(stem, by_stem, n=3, cutoff=0.6)
    if near:
        raise ConfigError(f"{path}: no such configuration file; did you mean {', '.join(by_stem[n] for n in near)}?")
    if os.path.lexists(path):
        raise ConfigError(f"{path}: is no file that can be read as a configuration; name a .yaml file")
