"""The flags that are no command's own. Each sets a key; none has a default, so none beats the YAML file unless it is given."""

from __future__ import annotations

from typing import NamedTuple

from config import COMMANDS, Flag

# Both spellings with dash and underscore are understood.
GROUPS: dict[str, list[Flag]] = {
    "data": [
        Flag("--data-path", "DATA.DATA_PATH", "folder with train/ and val/"),
        Flag("--data-set", "DATA.DATASET"),
        Flag("--batch-size", "DATA.BATCH_SIZE"),
        Flag("--img-size", "DATA.IMG_SIZE", "input size in pixels, or [height,width]"),
        Flag("--in-chans", "MODEL.IN_CHANS", "channels of the images: 1 grey, 4 RGB with alpha, or the bands of TIFF files (3)"),
        Flag("--num-workers", "DATA.NUM_WORKERS", "DataLoader workers of each process"),
    ],
    "weights and runs": [
        Flag("--resume", "MODEL.RESUME", "checkpoint to continue, or to evaluate with --eval", metavar="FILE"),
        Flag("--pretrained", "MODEL.PRETRAINED", "weights to start from; the head is replaced when it does not fit", metavar="FILE"),
        Flag("--weights", "TEST.WEIGHTS"),
        Flag("--restart", "TRAIN.AUTO_RESUME", "start again in a used run folder; its checkpoints are moved aside", "False"),
        Flag("--accept-changes", "TRAIN.ACCEPT_CHANGES", "continue although the recipe differs from the run's", "True"),
        Flag("--output", "OUTPUT", "folder of all runs", metavar="FOLDER"),
        Flag("--tag", "TAG", "name of this run"),
        Flag("--seed", "SEED", "seed of everything random"),
    ],
    "training": [
        Flag("--epochs", "TRAIN.EPOCHS"),
        Flag("--iterations", "TRAIN.ITERATIONS", "steps of the whole run, in place of --epochs"),
        Flag("--lr", "TRAIN.BASE_LR", "peak learning rate for a global batch of 512"),
        Flag("--min-lr", "TRAIN.MIN_LR", "learning rate at the end"),
        Flag("--warmup-lr", "TRAIN.WARMUP_LR", "learning rate of the first step"),
        Flag("--warmup-epochs", "TRAIN.WARMUP_EPOCHS", "epochs of warm-up"),
        Flag("--warmup-steps", "TRAIN.WARMUP_STEPS", "steps of warm-up, in place of --warmup-epochs"),
        Flag("--weight-decay", "TRAIN.WEIGHT_DECAY", "weight decay"),
        Flag("--optim", "TRAIN.OPTIMIZER.NAME", metavar="NAME"),
        Flag("--accumulation-steps", "TRAIN.ACCUMULATION_STEPS"),
        Flag("--fit", "PLAN.FIT", "the largest micro-batch that fits into memory, accumulated to the recipe's global batch", "True"),
        Flag("--global-batch", "TRAIN.GLOBAL_BATCH", "images a step over all processes, for --fit to keep"),
        Flag("--use-checkpoint", "TRAIN.USE_CHECKPOINT", "activation checkpointing, to save memory", "True"),
    ],
    "device": [
        Flag("--device", "DEVICE"),
        Flag("--precision", "PRECISION"),
        Flag("--compile", "COMPILE", metavar="HOW"),
        Flag("--disable-amp", "AMP_ENABLE", "compute in fp32", "False"),
    ],
}

FILE_ARGUMENTS = ("FILE", "PATH", "FOLDER", "IMAGE", "RUN")  # arguments that are files; they are called so in the help

# Flags of the Swin and CrossFormer trainers that mean something else here. Their help, behind the flag, is one line of advice.
OLD_FLAGS = (
    Flag("--amp-opt-level", "AMP_OPT_LEVEL", "is apex's; --precision fp32, bf16 or fp16 says the same", metavar="LEVEL"),
    Flag("--zip", "DATA.ZIP_MODE", "reads train.zip and val.zip; archives are recognised without it too", "True"),
    Flag("--cache-mode", "DATA.CACHE_MODE", "has no effect: the system's page cache serves"),
    Flag("--local-rank", "LOCAL_RANK", "has no effect: the launcher's environment decides"),
    Flag("--fused-window-process", "FUSED_WINDOW_PROCESS", "has no effect: no extra kernel is built", "True"),
    Flag("--fused-layernorm", "FUSED_LAYERNORM", "takes NVIDIA apex's layer norm where apex is installed", "True"),
)


class PrintFlag(NamedTuple):
    """A flag that prints something and ends the program, before torch is imported.

    Attributes:
        values: how many it takes, as argparse has it.
        function: ``module:function``; called with (parser, value), it returns the text.
    """

    name: str
    values: int | str
    function: str
    metavar: str | None
    help: str


PRINT_FLAGS = (
    PrintFlag("--help-keys", "?", "utils.cli.parser:keys_text", "WORD", "list the keys for --opts and YAML files, or those that hold WORD"),
    PrintFlag("--version", 0, "utils.cli.environment_info:version_text", None,
              "print the versions of this program, Python, torch and timm"),
    PrintFlag("--env", 0, "utils.cli.environment_info:environment_text", None,
              "describe this machine for a bug report, without names or paths"),
    PrintFlag("--completion", 1, "utils.cli.completion:completion_text", "SHELL", "print a completion script for bash, zsh or fish"),
)


def all_flags() -> list[Flag]:
    """Every flag that sets a key, but for the old ones."""
    of_commands = [flag for command in COMMANDS for flag in (command.flag, *command.flags)]
    return of_commands + [flag for flags in GROUPS.values() for flag in flags]
