"""The config of a command: from the YAML file, or from the checkpoint it names."""

from __future__ import annotations

import os
from typing import Any

from yacs.config import CfgNode

from config import ConfigError, command_of, config_for_another_command, converted, get_config, lookup, with_values
from data.build import has_label_sets
from models.safe_load import CheckpointError
from utils.checkpoints.exported import read_trained
from utils.checkpoints.file_format import is_own, require_own, task_of, with_found

# --------------------------------------------------------------------------------------------------
# Config and starting point
# --------------------------------------------------------------------------------------------------

def resolve_config(cfg_file: str | None, opts: list[str]) -> tuple[CfgNode, Any]:
    """(config, content of the file that MODEL.RESUME names, or None).

    Without a YAML file the config is the checkpoint's own, its data path made absolute; ``opts`` win over both.
    """
    asked = get_config(cfg_file, opts) if cfg_file else None
    if compared := _asked_value("COMPARE.FILES", asked, opts):
        return _resolve_each(cfg_file, opts, compared)
    resume = os.path.expanduser(_asked_value("MODEL.RESUME", asked, opts))
    config, content = _resolve(asked, opts, resume, read_trained(resume) if resume else None)
    _check_pretrained(config, opts)
    return config, content


def _check_pretrained(config: CfgNode, opts: list[str]) -> None:
    """A command other than training takes one file of weights: --pretrained beside --resume would be left aside unsaid."""
    command, path = command_of(config), _last_value(opts, "MODEL.PRETRAINED")
    if command is None or path in ("", "hub"):
        return
    if config.MODEL.RESUME:
        raise ConfigError(f"{command.flag.name} takes one file of weights, and both --resume {config.MODEL.RESUME} and --pretrained {path} "
                          "name one; leave one of them out")
    if not os.path.exists(os.path.expanduser(path)):
        raise CheckpointError(f"{path}: no such checkpoint file")


def _resolve(asked: CfgNode | None, opts: list[str], resume: str, content: Any) -> tuple[CfgNode, Any]:
    """``asked``: the config of the command's YAML file, if it names one."""
    config, content = _merged(asked, opts, resume, content)
    if config.TASK == "auto":
        own = content is not None and is_own(content)
        task = task_of(content) if own else "multilabel" if has_label_sets(config) else "classification"
        config = with_values(config, {"TASK": task}, f"checkpoint {resume}" if own else "derived from the data")
    return config, content


def _merged(asked: CfgNode | None, opts: list[str], resume: str, content: Any) -> tuple[CfgNode, Any]:
    if asked is not None:
        if content is not None and is_own(content) and not asked.DATA.DATA_PATH:
            asked = with_values(asked, {"DATA.DATA_PATH": content["data_path"]}, f"checkpoint {resume}")
        return asked if content is None else with_found(asked, content, resume), content
    if content is None:
        return get_config(None, opts), None
    if not is_own(content):
        raise ConfigError(f"{resume} holds weights without a config; add --cfg with the YAML file of its model")
    require_own(content, resume)
    return config_for_another_command(content["config"], content["data_path"], opts, resume), content


def _resolve_each(cfg_file: str | None, opts: list[str], files: Any) -> tuple[CfgNode, list[tuple[CfgNode, Any]]]:
    """(config of the first, [(config, content) of each]) of files to compare: each by its own config, bare weights by ``cfg_file``."""
    opts, found = [*opts, "COMPARE.FILES", files], []
    for path in map(os.path.expanduser, lookup(get_config(None, ["COMPARE.FILES", files]), "COMPARE.FILES")):
        content, own = read_trained(path), [*opts, "MODEL.RESUME", path]
        asked = get_config(cfg_file, own) if cfg_file and not is_own(content) else None
        found.append(_resolve(asked, own, path, content))
    return found[0][0], found


def _asked_value(key: str, asked: CfgNode | None, opts: list[str]) -> Any:
    return lookup(asked, key) if asked is not None else _last_value(opts, key)


def _last_value(opts: list[str], key: str) -> Any:
    values = [value for name, value in zip(opts[::2], opts[1::2], strict=False) if name == key]
    return converted(key, values[-1], f"--opts: {key}") if values else ""
