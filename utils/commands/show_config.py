"""``--print-config`` and ``--diff``: settings with their sources, and how two runs differ. Imports torch for checkpoints only."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import yaml
from yacs.config import CfgNode

from config import KEYS, ConfigError, get_config, history, lookup
from utils.reporting.run_reader import Run, circumstances, config_differences, fact_names, facts, flatten, read_run, shown


def print_config(config: CfgNode, logger: logging.Logger) -> int:
    """The config as YAML that ``--cfg`` reads again, each value with its source as a comment; the exit status."""
    for line in annotated(config):
        logger.info(line)
    return 0


def annotated(config: CfgNode) -> Iterator[str]:
    """Lines of YAML; what another value has replaced is named too."""
    told = history(config)
    lines, above = [], []
    # A section's own values come before its subsections. What asks for this printing would ask for it again under --cfg.
    keys = [key for key, *_ in KEYS if not key.startswith("REPORT.") and key != "BASE"]
    for key in sorted(keys, key=lambda key: _place(key, keys)):
        *sections, leaf = key.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(sections, above, strict=False)) if a != b), min(len(sections), len(above)))
        lines += [("  " * depth + f"{sections[depth]}:", "") for depth in range(shared, len(sections))]
        above = sections
        *replaced, (source, _) = told.get(key, [("default", None)])
        before = "".join(f", over {shown(value)} of {origin}" for origin, value in reversed(replaced))
        lines.append(("  " * len(sections) + f"{leaf}: {shown(lookup(config, key))}", " ".join(f"# {source}{before}".split())))
    width = min(60, max(len(text) for text, _ in lines))
    return (f"{text:<{width}}  {comment}" if comment else text for text, comment in lines)


def _place(key: str, keys: Sequence[str]) -> list[tuple[bool, int]]:
    """Sort key: in the order of ``keys``, but values before sections."""
    parts = key.split(".")
    starts = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return [(n < len(parts), next(i for i, k in enumerate(keys) if k == start or k.startswith(start + ".")))
            for n, start in enumerate(starts, 1)]


def print_differences(config: CfgNode, logger: logging.Logger) -> int:
    """How the two of REPORT.DIFF differ in config, circumstances and results, as a table; the exit status.

    Raises:
        ConfigError: one of them is no run, checkpoint or YAML file.
        CheckpointError: a checkpoint is damaged.
    """
    runs = [describe(path) for path in config.REPORT.DIFF]
    for line in differences(runs, config.REPORT.DIFF):
        logger.info(line)
    return 0


def describe(path: str) -> Run:
    """What a run folder, a checkpoint or a YAML file tells of a run.

    Raises:
        ConfigError: it is neither.
        CheckpointError: the checkpoint is damaged, or of somebody else.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return read_run(path)
    if path.lower().endswith((".yaml", ".yml")):
        return Run("", path, flatten(get_config(path)))
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such run folder, checkpoint or YAML file")
    from utils.checkpoints.exported import read_trained
    from utils.checkpoints.file_format import require_own

    content = require_own(read_trained(path), path)
    start = dict(event="start", **{key: content.get(key) for key in ("step", "versions", "git_commit", "global_batch", "steps_per_epoch")})
    best = content.get("best") or {}
    start["best"] = next((key for key in best if key not in ("epoch", "step")), None)
    rows = [dict(best)] if best else []
    return Run("", path, flatten(yaml.safe_load(content["config"])), rows=rows, events=[start])


def differences(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    """Lines of a table of what is not alike, and of the results, alike or not."""
    parts = {
        "config": [(key, [shown(value) for value in values]) for key, values in config_differences([run.config for run in runs])],
        "circumstances": [(name, values) for name, values in circumstances(runs) if any(value != values[0] for value in values)],
    }
    if any(run.rows for run in runs):
        results = [facts(run) for run in runs]
        parts["results"] = [(name, [result.get(name, "–") for result in results]) for name in fact_names(results)]
    rows = [row for part in parts.values() for row in part]
    widths = [max((len(text) for text in column), default=0) for column in
              ([name for name, _ in rows] + ["circumstances"], [values[0] for _, values in rows] + [names[0]])]
    yield f"{'':<{widths[0]}}  {names[0]:<{widths[1]}}  {names[1]}"
    for title, part in parts.items():
        yield f"{title}" + ("" if part else ": no difference")
        for name, (first, second) in part:
            yield f"{name:<{widths[0]}}  {first:<{widths[1]}}  {second}"


