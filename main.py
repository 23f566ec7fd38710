"""Train, evaluate and ship hierarchical vision transformers: one process or many, CPU or GPU.

    python main.py --cfg configs/quickstart.yaml
        a small model on handwritten digits, two minutes on two CPU cores; the same command again continues a run that was stopped
    torchrun --nproc_per_node 8 main.py --cfg configs/crossformer_t.yaml --data-path imagenet
        train on eight GPUs; on one GPU or a CPU: python main.py ... --fit; what it will take: --plan
    python main.py --resume output/crossformer_tiny/default/last.pth --epochs 400
        go on from a checkpoint, which holds its recipe; any key can be changed: --opts TRAIN.BASE_LR 1e-4 AUG.MIXUP 0
    python main.py --eval --resume output/crossformer_tiny/default/best.pth
        judge a checkpoint; nothing else is needed
    python main.py --predict cat.jpg photos/ --resume output/crossformer_tiny/default/best.pth
        name what is in images; --export model.onnx ships the model
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from config import KEYS, ConfigError, converted, get_config, lookup, takes_standard_output
from data.messages import Notice
from utils.cli.completion import SHELLS
from utils.cli.parser import Formatter, Parser, Tell, metavar
from utils.cli.suggestions import odd_opts, require_config_file, unknown

EXIT_FAILURE, EXIT_USAGE, EXIT_DATA, EXIT_NUMBERS, EXIT_STOPPED = 1, 2, 3, 4, 75

MANY = "*"  # the flag takes one argument or more, a list

# One table from flags to keys: (group, flags, key, fixed value or None for an argument or MANY, help). Both spellings with dash and
# underscore are understood. No flag has a default, so none beats the YAML unless it is given.
FLAGS: list[tuple[str, str, str, str | None, str]] = [
    ("instead of training", "--eval", "EVAL_MODE", "True", "judge a checkpoint; with --resume nothing else is needed"),
    ("instead of training", "--compare", "COMPARE.FILES", MANY, "judge two checkpoints on the same images, with a paired test"),
    ("instead of training", "--predict", "PREDICT.PATHS", MANY,
     "classes of images: files, folders, 'patterns/*.png', lists in .txt files (a path a line, relative to the list), - for a list on "
     "standard input; with --resume; status 3 if any cannot be read, after the others"),
    ("instead of training", "--export", "EXPORT.FILE", None,
     "write the model as file.onnx, file.pt2, or a folder that timm opens; with --resume"),
    ("instead of training", "--plan", "PLAN.RUN", "True",
     "dry run: memory, speed, time and disk that the run will take; status 1: it does not fit"),
    ("instead of training", "--doctor", "DOCTOR_MODE", "True", "read all images, say what is wrong and what mends it; status 3: errors"),
    ("instead of training", "--throughput", "THROUGHPUT_MODE", "True", "measure speed and memory of the model, on made-up images"),
    ("instead of training", "--report", "REPORT.RUNS", MANY, "write a run folder's report.html; of several runs a comparison"),
    ("instead of training", "--diff", "REPORT.DIFF", MANY, "show how two runs, checkpoints or YAML files differ"),
    ("instead of training", "--print-config", "REPORT.CONFIG", "True", "print the config with the source of every value"),
    ("instead of training", "--show-batch", "SHOW.BATCH", None, "PNG file: the first training batch with its labels, as the model sees it"),
    ("instead of training", "--show-attention", "SHOW.ATTENTION", None, "image: draw which tokens of it a CrossFormer's token attends to"),
    ("of --predict", "--topk", "PREDICT.TOPK", None, "classes told for an image (5)"),
    ("of --predict", "--csv", "PREDICT.CSV", None, "file for the predictions as a table; - is standard output"),
    ("of --predict", "--json", "PREDICT.JSON", None, "file for the predictions, a line of JSON an image; - is standard output"),
    ("of --predict", "--features", "PREDICT.FEATURES", None, "file.npy or file.safetensors for the features before the classifier"),
    ("of --predict", "--sheet", "PREDICT.SHEET", None, "file.png for a picture of the images and their classes"),
    ("of --eval", "--labels", "TEST.LABELS", None, "ImageNet's variants: auto, imagenet, v2, a, r, sketch, real, or a file of classes"),
    ("of --eval", "--real-labels", "TEST.REAL_LABELS", None, "real.json, where another than timm's is to be used"),
    ("of --eval", "--per-class", "TEST.PER_CLASS", None, "CSV file for the figures of each class"),
    ("of --eval", "--test-flip", "TEST.FLIP", "logits", "judge the mean logits of each image and its mirror image"),
    ("of --doctor, --show-attention", "--doctor-json", "DOCTOR.JSON", None, "file for the doctor's report as JSON; - is standard output"),
    ("of --doctor, --show-attention", "--show-token", "SHOW.TOKEN", None, "y,x in pixels of the input: that token, not the central one"),
    ("of --doctor, --show-attention", "--show-file", "SHOW.FILE", None, "PNG file for the attention; else attention.png"),
    ("data", "--data-path", "DATA.DATA_PATH", None, "folder with train/ and val/"),
    ("data", "--data-set", "DATA.DATASET", None, "imagenet, folder, lists, zip, tar, huggingface or digits"),
    ("data", "--batch-size", "DATA.BATCH_SIZE", None, "images per process and micro-batch"),
    ("data", "--img-size", "DATA.IMG_SIZE", None, "input size in pixels, or [height,width]"),
    ("data", "--num-workers", "DATA.NUM_WORKERS", None, "loading processes per process"),
    ("weights and runs", "--resume", "MODEL.RESUME", None, "checkpoint to continue, or to judge with --eval"),
    ("weights and runs", "--pretrained", "MODEL.PRETRAINED", None, "weights to start from; the head is replaced when it does not fit"),
    ("weights and runs", "--restart", "TRAIN.AUTO_RESUME", "False", "begin anew in a used run folder; its checkpoints are moved aside"),
    ("weights and runs", "--accept-changes", "TRAIN.ACCEPT_CHANGES", "True", "continue although the recipe differs from the run's"),
    ("weights and runs", "--output", "OUTPUT", None, "folder of all runs"),
    ("weights and runs", "--tag", "TAG", None, "name of this run"),
    ("weights and runs", "--seed", "SEED", None, "seed of everything random"),
    ("training", "--epochs", "TRAIN.EPOCHS", None, "passes over the training images"),
    ("training", "--lr", "TRAIN.BASE_LR", None, "peak learning rate for a global batch of 512"),
    ("training", "--min-lr", "TRAIN.MIN_LR", None, "learning rate at the end"),
    ("training", "--warmup-lr", "TRAIN.WARMUP_LR", None, "learning rate of the first step"),
    ("training", "--warmup-epochs", "TRAIN.WARMUP_EPOCHS", None, "epochs of warm-up"),
    ("training", "--weight-decay", "TRAIN.WEIGHT_DECAY", None, "weight decay"),
    ("training", "--optim", "TRAIN.OPTIMIZER.NAME", None, "adamw, sgd or any timm optimizer"),
    ("training", "--accumulation-steps", "TRAIN.ACCUMULATION_STEPS", None, "micro-batches per optimizer step"),
    ("training", "--fit", "PLAN.FIT", "True", "the largest micro-batch that fits into memory, accumulated to the recipe's global batch"),
    ("training", "--global-batch", "TRAIN.GLOBAL_BATCH", None, "images a step over all processes, for --fit to keep"),
    ("training", "--use-checkpoint", "TRAIN.USE_CHECKPOINT", "True", "activation checkpointing, to save memory"),
    ("device", "--device", "DEVICE", None, "auto, cpu, cuda, cuda:N or mps"),
    ("device", "--precision", "PRECISION", None, "auto, fp32, bf16 or fp16"),
    ("device", "--compile", "COMPILE", None, "off, blocks or model: torch.compile"),
    ("device", "--disable-amp", "AMP_ENABLE", "False", "compute in fp32"),
]

# The modes, in the order they are looked at; training is what is left. (key that asks for it, module, function). A function takes
# (config, content of --resume's file or None, device, logger) and returns an exit status, or nothing for 0.
MODES: list[tuple[str, str, str]] = [
    ("THROUGHPUT_MODE", "utils.commands.throughput", "measure_throughput"),
    ("SHOW.BATCH", "utils.commands.show_batch", "show_batch"),
    ("SHOW.ATTENTION", "utils.commands.show_attention", "show_attention"),
    ("COMPARE.FILES", "utils.commands.compare", "compare_run"),
    ("PREDICT.PATHS", "utils.commands.predict", "predict_run"),
    ("EXPORT.FILE", "utils.commands.export", "export_run"),
    ("EVAL_MODE", "utils.commands.evaluate", "evaluate_run"),
    ("PLAN.RUN", "utils.commands.plan", "plan_run"),
]

# Modes that need neither a model nor a device, nor torch where --resume names no checkpoint; they are looked at first.
# (key, module, function); a function takes (config, logger) and returns an exit status.
QUICK_MODES: list[tuple[str, str, str]] = [
    ("REPORT.CONFIG", "utils.commands.show_config", "print_config"),
    ("REPORT.DIFF", "utils.commands.show_config", "print_differences"),
    ("REPORT.RUNS", "utils.commands.report", "report_runs"),
    ("DOCTOR_MODE", "utils.commands.doctor", "examine_run"),
]

# Flags of the Swin and CrossFormer trainers that mean something else here: the key they set, and one line of advice.
OLD_FLAGS: list[tuple[str, str, str | None, str]] = [
    ("--amp-opt-level", "AMP_OPT_LEVEL", None, "--amp-opt-level is apex's; --precision fp32, bf16 or fp16 says the same"),
    ("--zip", "DATA.ZIP_MODE", "True", "--zip reads train.zip and val.zip; archives are recognised without it too"),
    ("--cache-mode", "DATA.CACHE_MODE", None, "--cache-mode has no effect: the system's page cache serves"),
    ("--local-rank", "LOCAL_RANK", None, "--local_rank has no effect: the launcher's environment decides"),
    ("--fused-window-process", "FUSED_WINDOW_PROCESS", "True", "--fused_window_process has no effect: no extra kernel is built"),
    ("--fused-layernorm", "FUSED_LAYERNORM", "True", "--fused_layernorm takes NVIDIA apex's layer norm where apex is installed"),
]


# Flags that print something and stop, before torch is imported: (flag, how many values, module, function, metavar, help).
ABOUT: list[tuple[str, int | str, str, str, str | None, str]] = [
    ("--help-keys", "?", "utils.cli.parser", "keys_text", "WORD", "list the keys for --opts and YAML files, or those that hold WORD"),
    ("--version", 0, "utils.cli.environment_info", "version_text", None, "print the versions of this program, Python, torch and timm"),
    ("--env", 0, "utils.cli.environment_info", "environment_text", None, "describe this machine for a bug report, without names or paths"),
    ("--completion", 1, "utils.cli.completion", "completion_text", "SHELL", "print a completion script for bash, zsh or fish"),
]


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag sets a key of the config, or prints something and stops."""
    parser = Parser(
        prog="main.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        epilog=f"{len(KEYS)} keys for --opts and YAML files: --help-keys lists them, --help-keys MIXUP those with that word.\n"
               "Flags may be written with underscores too.\n\n"
               "exit status: 0 done, 1 failure, 2 usage or configuration, 3 data or checkpoint unusable,\n"
               "4 loss, gradients or weights are no longer finite, 75 stopped by a signal with a checkpoint written\n"
               "(the same command continues); torchrun reports 1 for any of them")
    parser.add_argument("--cfg", metavar="FILE", help="YAML file of the config tree; its BASE files are merged first")
    parser.add_argument("--opts", metavar="KEY VALUE", nargs="*", action="extend", help="any keys of the tree (--help-keys)")
    for flag, values, module, function, name, meaning in ABOUT:
        parser.add_argument(flag, action=Tell, nargs=values if values != 1 else None, module=module, function=function, metavar=name,
                            help=meaning, choices=SHELLS if flag == "--completion" else None)
    groups: dict[str, Any] = {}
    for title, flag, _, fixed, meaning in FLAGS:
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        _add_flag(group, flag, fixed, meaning)
    old = parser.add_argument_group("understood from other trainers")
    for flag, _, fixed, advice in OLD_FLAGS:
        _add_flag(old, flag, fixed, advice.partition(" ")[2])
    return parser


def _add_flag(group: Any, flag: str, fixed: str | None, meaning: str) -> None:
    spellings = [flag] if flag.replace("_", "-").count("-") == 2 else [flag, "--" + flag[2:].replace("-", "_")]
    destination = flag[2:].replace("-", "_")
    if fixed in (None, MANY):
        # "+": at least one; repeated flags add up
        several = dict(nargs="+", action="extend") if fixed == MANY else {}
        group.add_argument(*spellings, dest=destination, metavar=metavar(flag), help=meaning, **several)
    else:
        group.add_argument(*spellings, dest=destination, action="store_const", const=fixed, help=meaning)


def parse(argv: Sequence[str] | None = None) -> tuple[str | None, list[str], list[str]]:
    """(YAML file, ``[KEY, VALUE, ...]``, lines of advice) of a command line.

    Raises:
        ConfigError: an unknown flag, with the nearest known ones.
    """
    parser = build_parser()
    args, left_over = parser.parse_known_args(argv)
    if left_over:
        raise unknown(left_over[0], parser)
    given = vars(args)
    opts, advice = list(given.get("opts", [])), []
    modes = {key for key, *_ in (*MODES, *QUICK_MODES)}
    odd_opts(opts)
    for _, flag, key, _, _ in FLAGS:
        if (value := given.get(flag[2:].replace("-", "_"))) is not None:
            if value == "" and key in modes:  # it would train instead
                raise ConfigError(f"{flag} was given an empty value; give {metavar(flag)}, or leave {flag} out")
            converted(key, value, flag)  # a mistake is told under the name that was typed
            opts += [key, value]
    for flag, key, _, line in OLD_FLAGS:
        if (value := given.get(flag[2:].replace("-", "_"))) is not None:
            opts += [key, value]
            advice.append(Notice(line))
    return given.get("cfg"), opts, advice


def run(argv: Sequence[str] | None = None) -> int:
    """Read the command line and the config, choose the mode, do it."""
    cfg_file, opts, advice = parse(argv)
    if cfg_file:
        require_config_file(cfg_file)
    if "MODEL.RESUME" not in opts and any(key in opts[::2] for key, *_ in QUICK_MODES):
        config = get_config(cfg_file, opts)
        if (mode := _asked_for(QUICK_MODES, config)) and not config.MODEL.RESUME:
            return _quick(mode, config, advice)
    # torch and timm take seconds to import: not before the command line has been understood.
    with _uncollected():
        from utils.commands.resolve_config import resolve_config
        from utils.loggers.console import create_logger, tell
        from utils.runtime import distributed
        from utils.runtime.device import choose_device, keep_freed_memory
        from utils.runtime.stop_signals import exit_from_within

    config, content = resolve_config(cfg_file, opts)
    if mode := _asked_for(QUICK_MODES, config):
        return _quick(mode, config, advice)
    keep_freed_memory()
    device = choose_device(config.DEVICE, distributed.local_rank())
    distributed.init(device, config.DIST_TIMEOUT)
    logger = create_logger(distributed.is_main(), takes_standard_output(config))
    tell(logger, advice)
    _, module, function = _asked_for(MODES, config) or ("", "utils.commands.train", "train_run")
    with exit_from_within():
        status = getattr(importlib.import_module(module), function)(config, content, device, logger)
    distributed.shutdown()
    return status or 0


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Imports without the garbage collector, which would look at the modules' objects, a million of them and none garbage, again
    and again: a fifth of the time."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _asked_for(modes: Sequence[tuple[str, str, str]], config: Any) -> tuple[str, str, str] | None:
    return next((mode for mode in modes if lookup(config, mode[0])), None)


def _quick(mode: tuple[str, str, str], config: Any, advice: Sequence[str]) -> int:
    from utils.loggers.console import create_logger, tell

    logger = create_logger(True, takes_standard_output(config))
    tell(logger, advice)
    return getattr(importlib.import_module(mode[1]), mode[2])(config, logger)


def main(argv: Sequence[str] | None = None) -> int:
    """``run``, with every mistake a user can make turned into a sentence and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows every line
    try:
        try:
            return run(argv)
        finally:
            if progress := sys.modules.get("utils.loggers.progress"):
                progress.clear_live_line()  # what is said next begins on a clean line
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except ConfigError as error:
        return _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        return _fail("stopped by Ctrl-C; what was saved before is intact", EXIT_FAILURE)
    except BrokenPipeError:
        return EXIT_FAILURE
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    from data import DataError
    from models.safe_load import CheckpointError
    from utils.commands.export import ExportError
    from utils.runtime import distributed
    from utils.runtime.compile import compile_error
    from utils.runtime.memory import is_out_of_memory
    from utils.runtime.stop_signals import Stopped
    from utils.training.batch_size import Unfit
    from utils.training.engine import NumericError
    from utils.training.loop import SaveError

    text = str(error)
    if isinstance(error, (DataError, CheckpointError)):
        # A worker process wraps the sentence into its traceback.
        return _fail(text.rpartition("DataError: ")[2].strip(), EXIT_DATA, everywhere=True)
    if isinstance(error, NumericError):
        return _fail(text, EXIT_NUMBERS)
    if isinstance(error, Stopped):
        return _fail(text, EXIT_STOPPED)
    if isinstance(error, (SaveError, ExportError, Unfit)):
        return _fail(text, EXIT_FAILURE)
    if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(error, RuntimeError) and any(
            word in text for word in ("gloo", "NCCL", "Connection reset", "Connection closed", "DistBackendError", "Broken pipe")):
        culprit = distributed.blame()
        if culprit:
            return _fail(culprit, EXIT_FAILURE, everywhere=True)
        return EXIT_FAILURE if culprit == "" else _fail("another process of this job stopped; its own message says why", EXIT_FAILURE,
                                                        everywhere=True)
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in text:
        return _fail("batch norm needs more than one value a channel; raise --batch-size or --img-size", EXIT_USAGE)
    if is_out_of_memory(error):
        return _fail("out of memory; add --fit, which takes a smaller micro-batch and keeps the recipe, or --use-checkpoint",
                     EXIT_FAILURE, everywhere=True)
    if (reason := compile_error(error)) is not None:
        return _fail(reason, EXIT_USAGE)
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'file system'}: {error.strerror or text}; what was saved before is intact",
                     EXIT_FAILURE, everywhere=True)
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
        return _fail("a data loading process was killed, mostly for lack of memory or of /dev/shm (docker: --shm-size=8g); "
                     "use fewer --num-workers", EXIT_FAILURE, everywhere=True)
    traceback.print_exc()
    return _fail(f"unexpected {type(error).__name__}, please report it with the lines above", EXIT_FAILURE, everywhere=True)


def _fail(sentence: str, status: int, everywhere: bool = False) -> int:
    """Say it once: rank 0, or with its number any rank that may be alone in its trouble."""
    from utils.loggers.console import printable
    rank, local, place = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0"), ""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        place = f" (rank {rank})"
        if status not in (EXIT_USAGE, EXIT_STOPPED) and (distributed := sys.modules.get("utils.runtime.distributed")):
            distributed.announce_failure(sentence)
            place = f" ({distributed.place()})"
    if rank == "0" or everywhere or local == "0":
        print(f"error{place if rank != '0' or everywhere else ''}: {printable(sentence)}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    code = main()
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    if code and threading.active_count() > 1:
        # A save may be under way, which Ctrl-C twice does not wait for; other ranks may be inside a collective, where leaving
        # the group in good order would wait for them.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(code)
    sys.exit(code)
