"""Where training begins, and whether it may go on from there."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from config import KEYS, RECIPE, ConfigError, config_from_text, lookup
from data import Loaders
from data.messages import NOTICE
from models.safe_load import CheckpointError
from utils.checkpoints.file_format import require_training_state
from utils.checkpoints.folder import CheckpointFolder
from utils.loggers.console import tell
from utils.runtime import distributed


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    kind: str  # auto-resume, resume, pretrained or scratch
    path: str = ""
    content: Any = None


def choose_start(config: CfgNode, resume_content: Any, folder: str, logger: logging.Logger) -> Start:
    """By precedence: the run folder's own newest checkpoint, then --resume, then --pretrained, then fresh weights."""
    start, found = None, None
    files = CheckpointFolder(folder)
    if distributed.is_main() and (config.TRAIN.AUTO_RESUME or files.begun_by_this_job()):
        found = files.newest()
        tell(logger, found[2] if found is not None else ())
    # Rank 0 chooses: another machine may not see yet what was written a moment ago.
    if (shared := files.share(found)) is not None:
        start = Start("auto-resume", *shared)
    if start is None and config.MODEL.RESUME:
        start = Start("resume", config.MODEL.RESUME, require_training_state(resume_content, config.MODEL.RESUME))
    if start is None:
        start = Start("pretrained", os.path.expanduser(config.MODEL.PRETRAINED)) if config.MODEL.PRETRAINED else Start("scratch")
    steps = distributed.gather_objects((start.content or {}).get("step"))
    if any(step != steps[0] for step in steps):
        raise CheckpointError(f"the processes would start from different steps ({', '.join(map(str, steps))}, by rank); "
                              "put --output and what --resume names on a disk that all of them see")
    logger.info(f"start: {start.kind}{' ' + start.path if start.path else ''} (the first there is of: auto-resume from {folder}, "
                "--resume, --pretrained, scratch)")
    return start


def accept_changes(start: Start, config: CfgNode, logger: logging.Logger, beyond: bool = False) -> None:
    """Compare the recipe with that of the checkpoint a run continues from.

    More epochs or iterations are taken as they are, the rule being said; any other change must be meant.

    Args:
        beyond: the checkpoint has gone on for longer than is asked for, whose result it is not.

    Raises:
        ConfigError: the recipe differs and TRAIN.ACCEPT_CHANGES is not set.
    """
    try:
        old = config_from_text(start.content["config"])
    except ConfigError:
        logger.log(NOTICE, f"{start.path} was written with a config of another version; it is not compared")
        return
    pairs = [(key.name, lookup(old, key.name), lookup(config, key.name)) for key in KEYS if key.scope == RECIPE]
    changes = {key: f"{key} changed from {before} to {now}" for key, before, now in pairs if before != now}
    asked, before = config.MODEL.PRETRAINED, old.MODEL.PRETRAINED
    if start.kind == "auto-resume" and asked not in ("", before):
        changes["MODEL.PRETRAINED"] = f"MODEL.PRETRAINED changed from {before or 'none'} to {asked}"
    for key in () if beyond else ("TRAIN.EPOCHS", "TRAIN.ITERATIONS"):
        if (length := changes.pop(key, None)) is not None:
            logger.log(NOTICE, f"{length} since {start.path} was written; from its step on the learning rate follows the longer or "
                               "shorter schedule")
    _accept(start, "the recipe", changes.values(), config, logger)


def check_same_data(start: Start, config: CfgNode, loaders: Loaders, logger: logging.Logger) -> None:
    """Compare the images with those that the checkpoint was trained on.

    Raises:
        ConfigError: the classes or the number of steps of an epoch differ, or other images do and TRAIN.ACCEPT_CHANGES is not set.
    """
    then, now, steps = start.content["classes"], loaders.classes, loaders.train.batch_sampler.steps_per_epoch
    if then != now:
        raise ConfigError(f"{start.path}: was trained on {len(then)} classes ({', '.join(then[:3])}, ...), the data has {len(now)} "
                          f"({', '.join(now[:3])}, ...); {new_run(start)}")
    if start.content["steps_per_epoch"] != steps:
        raise ConfigError(f"{start.path}: its epochs had {start.content['steps_per_epoch']} steps, with this data they have {steps}, so "
                          f"the training images are others; {new_run(start)}")
    known, found = start.content.get("image_fingerprints", {}), loaders.fingerprints()  # older files have none
    names = dict(train="training", val="validation")
    changed = [f"the {names[split]} images are others" for split in found if known.get(split, found[split]) != found[split]]
    _accept(start, "the data", changed, config, logger)


def _accept(start: Start, what: str, changes: Iterable[str], config: CfgNode, logger: logging.Logger) -> None:
    """Tell ``changes`` where TRAIN.ACCEPT_CHANGES means them; raise ``ConfigError`` for them elsewhere."""
    changes = list(changes)
    if changes and not config.TRAIN.ACCEPT_CHANGES:
        raise ConfigError(f"{what} is not that of {start.path}: {'; '.join(changes)}; go on all the same with --accept-changes, or "
                          f"{new_run(start)}")
    for line in changes:
        logger.log(NOTICE, f"{line} since {start.path} was written")


def new_run(start: Start) -> str:
    """How to have a run of its own instead of continuing ``start``; the run's folder would be continued again by the same --tag."""
    if start.kind == "auto-resume":
        return (f"start a new run with another --tag (and --pretrained {start.path} to begin with its weights), or start again in this "
                "folder with --restart")
    return f"start a new run from its weights with --pretrained {start.path} in place of --resume"
