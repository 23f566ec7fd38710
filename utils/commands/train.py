"""Training, from wherever the run stands to its last epoch, and the report at its end."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch
from yacs.config import CfgNode

from data.messages import NOTICE
from utils.checkpoints.folder import CheckpointFolder
from utils.checkpoints.run_folder import open_run_folder, require_room
from utils.loggers.console import RESULT, tell
from utils.reporting.run_reader import read_run
from utils.reporting.write import write_plots, write_report
from utils.runtime import distributed
from utils.runtime.stop_signals import StopRequest
from utils.training.loop import open_run, train
from utils.training.setup import introduce, prepare


def train_run(config: CfgNode, resume_content: Any, device: torch.device, logger: logging.Logger) -> None:
    """Train to the last epoch, from wherever the run stands. Nothing is written before everything has been checked."""
    with StopRequest() as stop:
        _train(config, resume_content, device, stop, logger)


def _train(config: CfgNode, resume_content: Any, device: torch.device, stop: StopRequest, logger: logging.Logger) -> None:
    ready = prepare(config, resume_content, device, logger)
    if ready is None:
        return
    config, folder, start, loaders, state = ready.config, ready.folder, ready.start, ready.loaders, ready.state
    require_room(config, folder, state.size(), loaders.train.batch_sampler.epochs, logger)
    if start.content is not None:
        logger.info(f"resumed {start.path} at step {state.step}", extra=RESULT)

    distributed.begin_phase("opening the run's folder")
    with open_run_folder(folder, logger):
        files = CheckpointFolder(folder, config.TRAIN.KEEP_CHECKPOINTS, os.path.expanduser(config.MODEL.RESUME),
                                 config.TRAIN.CHECKPOINT_BUDGET)
        here = start.content is not None and files.holds(start.path)
        if distributed.is_main():
            if (aside := files.set_aside(state.step if here else -1)) is not None:
                logger.log(NOTICE, f"what an earlier run left here{f' beyond step {state.step}' if here else ''} is moved to {aside}")
            files.note_job()
            if here:
                files.relink(start.content)
            if not os.path.exists(os.path.join(folder, "best.pth")):
                state.best = {}  # its weights lie elsewhere, if anywhere: the best of this folder is still to come
        if start.content is not None:
            start.content.clear()  # a gigabyte that is no longer needed
        introduce(ready, logger)
        run = open_run(config, state, ready.plan, loaders, ready.global_batch, files, stop, logger, saved=here)
        with contextlib.closing(loaders):
            train(run, distributed.wrap(state.model, device, config.TRAIN.ACCUMULATION_STEPS, config.TRAIN.GRAD_COMPRESSION))
        if distributed.is_main() and config.TRAIN.REPORT != "none":
            distributed.stop_watching()  # the report may take long
            _report(folder, config.TRAIN.REPORT == "png", logger)


def _report(folder: str, plots: bool, logger: logging.Logger) -> None:
    try:
        runs = [read_run(folder)]
        logger.info(f"report {write_report(runs)}")
        if plots:
            tell(logger, [write_plots(runs, folder)])
    except Exception as error:  # the run stands, whatever becomes of its report
        logger.warning(f"no report was written ({type(error).__name__}: {str(error)[:200]}); --report {folder} tries again")
