"""A run as its folder tells it, for reports and comparisons. Imports no torch; what is missing or damaged is left out, and said."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from config import COMMAND_LINE, DENSE_TASKS, KEYS, ConfigError, of_the_command, read_text_file, yaml_tree
from utils.evaluation.dense_predictions_file import DenseFile, read_dense_predictions
from utils.evaluation.label_predictions_file import LabelPredictionsFile
from utils.evaluation.predictions_file import FILE, MOST_IMAGES, PredictionsFile, PredictionsFileError
from utils.loggers.metrics_files import CONFIG, EPOCHS, EVENTS, EVIDENCE, SOURCES, STEPS, read_rows
from utils.runtime.files import LARGEST_RECORD, read_json

_DEFAULTS = {key: default for key, default, *_ in KEYS}


@dataclass(frozen=True)
class ReportedMetric:
    """A metric as a run's start event tells of it (``utils.evaluation.metrics.Metric``, without its torch), and its unit."""

    name: str
    label: str
    higher_is_better: bool = True
    digits: int = 4
    unit: str = ""

    def shown(self, value: Any) -> str:
        return f"{value:.{self.digits}f}{self.unit}" if _is_number(value) else "none yet"


# Of runs of versions that did not record their metrics, and how these are spelled in reports.
_CLASSIFICATION = {"top1": ReportedMetric("top1", "top-1", digits=2, unit=" %"),
                   "top5": ReportedMetric("top5", "top-5", digits=2, unit=" %"),
                   "val_loss": ReportedMetric("val_loss", "loss", higher_is_better=False)}


# Of dense tasks, what decides; a checkpoint alone, or a run without its history, does not spell it.
_DECIDING = {name: ReportedMetric(name, label, digits=2) for name, label in (
    ("mask_ap", "mask AP"), ("box_ap", "box AP"), ("miou", "mIoU"), ("pq", "PQ"))}
_ENDS = ("finished", "stopped", "failed", "start")
# What reads the file of a task's last evaluation.
_READERS = dict.fromkeys(DENSE_TASKS, read_dense_predictions) | {"classification": PredictionsFile.read,
                                                                 "multilabel": LabelPredictionsFile.read}


@dataclass
class Run:
    """A run folder's records.

    Attributes:
        name: MODEL.NAME/TAG, or the folder's.
        config: values by dotted key; empty where there is no config.yaml.
        sources: key -> [(source, value), ...] of those who set it, the last one counting (``config.history``).
        rows: an epoch each; ``steps``: a line of the log each; ``events``: a start, rollback or end each; ``evidence``: a skipped
            step each.
        predictions: of the run's last evaluation, or None.
        problems: sentences about what could not be read.
    """

    folder: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    evidence: list[dict[str, Any]] = field(default_factory=list)
    predictions: PredictionsFile | LabelPredictionsFile | DenseFile | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts, first one first."""
        return [event for event in self.events if event.get("event") == "start"]

    @property
    def task(self) -> str:
        """The name of what was trained for; classification where nothing tells."""
        task = self.config.get("TASK")
        return str(self._told("task", task if isinstance(task, str) and task != "auto" else "classification"))

    @property
    def metrics(self) -> list[ReportedMetric]:
        """What an evaluation gives, in the task's order."""
        told = self._told("metrics", None)
        if isinstance(told, list):
            return [_metric(row) for row in told if _mapping(row).get("name")]
        return [metric for name, metric in _DECIDING.items() if any(name in row for row in self.rows)] or list(_CLASSIFICATION.values())

    @property
    def telling_metrics(self) -> list[ReportedMetric]:
        """Those of ``metrics`` that can differ: of five classes all are among the first five."""
        few = self.predictions is not None and len(self.predictions.classes) <= 5
        return [metric for metric in self.metrics if not (few and metric.name == "top5")]

    @property
    def ended(self) -> bool:
        """Whether the run was over at its end, by its epochs or by TRAIN.PATIENCE."""
        ends = [event for event in self.events if event.get("event") in _ENDS]
        return bool(ends) and ends[-1]["event"] == "finished"

    @property
    def length(self) -> tuple[Any, Any, str]:
        """(done, planned, "epochs" or "steps"), as the config counts."""
        row, iterations = self.rows[-1] if self.rows else {"epoch": 0, "step": 0}, self.config.get("TRAIN.ITERATIONS")
        if _is_number(iterations) and iterations:
            return row.get("step", "?"), iterations, "steps"
        return row.get("epoch", "?"), self.config.get("TRAIN.EPOCHS", "?"), "epochs"

    @property
    def deciding(self) -> ReportedMetric:
        """The metric that decides which evaluation is the best."""
        name = str(self._told("best", next((name for name in _DECIDING if any(name in row for row in self.rows)), "top1")))
        return next((metric for metric in self.metrics if metric.name == name), _DECIDING.get(name) or ReportedMetric(name, name))

    def _told(self, key: str, default: Any) -> Any:
        """What the last start that tells of it says."""
        return next((start[key] for start in reversed(self.starts) if start.get(key)), default)

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The rows of epochs that were evaluated."""
        name = self.deciding.name
        return [row for row in self.rows if _is_number(row.get(name))]

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best evaluation, of equals the one that the run's second metric prefers, else the first."""
        second = next((metric for metric in self.metrics if metric.name == self._told("tie_break", None)), None)
        deciding = [metric for metric in (self.deciding, second) if metric is not None]

        def rank(row: dict[str, Any]) -> list[float]:
            return [(1 if metric.higher_is_better else -1) * row[metric.name] if _is_number(row.get(metric.name)) else -math.inf
                    for metric in deciding]

        return max(self.evaluated, key=rank, default=None)

    @property
    def seconds(self) -> float | None:
        """Time that the run's processes were at work, over all its starts; None where nothing tells."""
        total, begun = 0.0, None
        times = [event for event in self.events if _is_number(event.get("time"))]
        if not times:
            return sum(row.get("seconds") or 0 for row in self.rows) or None
        for event in times:
            if event.get("event") == "start":
                if begun is not None and _is_number(event.get("before")):
                    total += max(0.0, event["before"] - begun)
                begun = event["time"]
            elif begun is not None and event.get("event") != "rollback":
                total, begun = total + event["time"] - begun, None
        if begun is not None:
            seen = max((row["time"] for row in self.steps if _is_number(row.get("time"))), default=begun)
            total += max(0.0, seen - begun)
        return total


def _metric(row: dict[str, Any]) -> ReportedMetric:
    name, digits = str(row["name"]), row.get("digits")
    return _CLASSIFICATION.get(name) or ReportedMetric(name, str(row.get("label", name)), bool(row.get("higher_is_better", True)),
                                                       int(digits) if digits in range(10) else 4)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(folder: str) -> Run:
    """The records in ``folder``.

    Raises:
        ConfigError: no such folder, or it holds no run.
    """
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder}: no such run folder; name the folder that holds config.yaml and metrics.jsonl")
    if not any(os.path.exists(os.path.join(folder, name)) for name in (CONFIG, EPOCHS, STEPS)):
        raise ConfigError(f"{folder}: holds no run ({CONFIG}, {EPOCHS}); runs lie in OUTPUT/MODEL.NAME/TAG")
    run = Run(folder, os.path.basename(os.path.abspath(folder)))
    if (text := _text(run, CONFIG)) is not None:
        try:
            run.config = flatten(yaml_tree(text) or {})
            run.name = f"{run.config['MODEL.NAME']}/{run.config['TAG']}"
        except (ValueError, KeyError, AttributeError):
            run.problems.append(f"{CONFIG} is damaged or of another program")
    if (text := _text(run, SOURCES)) is not None:
        try:
            run.sources = {str(key): [(str(source), value) for source, value in entries] for key, entries in read_json(text).items()}
        except (ValueError, TypeError, AttributeError):
            run.problems.append(f"{SOURCES} is damaged")
    for name, rows in ((EPOCHS, run.rows), (STEPS, run.steps), (EVENTS, run.events), (EVIDENCE, run.evidence)):
        try:
            rows += read_rows(os.path.join(folder, name))
        except OSError as error:
            run.problems.append(f"{name}: {error.strerror}")
    if not run.rows and not run.steps:
        run.problems.append(f"no figures yet ({EPOCHS} and {STEPS} are missing or empty)")
    elif not run.steps:
        run.problems.append(f"{STEPS} is missing: curves have a point an epoch")
    _read_predictions(run)
    return run


def _read_predictions(run: Run) -> None:
    path = os.path.join(run.folder, FILE)
    try:
        run.predictions = _READERS.get(run.task, PredictionsFile.read)(path)
    except PredictionsFileError as error:
        missing = not os.path.exists(path)
        if missing and run.task not in _READERS:
            return
        remedy = (f"a run keeps it of its last evaluation, of {MOST_IMAGES:,} images at most" if run.task in DENSE_TASKS else
                  f"main.py --eval --resume {os.path.join(run.folder, 'best.pth')} --opts TEST.PREDICTIONS {path} makes it")
        run.problems.append((f"{FILE} is missing" if missing else str(error)) + f": nothing about single classes and images; {remedy}")


def _text(run: Run, name: str) -> str | None:
    try:
        return read_text_file(os.path.join(run.folder, name), LARGEST_RECORD, "replace")
    except OSError as error:
        run.problems.append(f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}")
        return None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings by dotted key."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def source_of(run: Run, key: str) -> str:
    """Where the value of ``key`` comes from, in words."""
    return run.sources[key][-1][0] if run.sources.get(key) else "default" if run.sources else "not recorded"


def beside_preset(run: Run) -> list[tuple[str, Any, Any, str]]:
    """(key, value in the YAML file or default, value here, source) of what the run's command changed in its preset."""
    changed = []
    for key, entries in sorted(run.sources.items()):
        source, value = entries[-1]
        files = [entry for entry in entries if not _no_file(entry[0])]
        preset = files[-1][1] if files else _DEFAULTS.get(key)
        found = source in ("derived from MODEL.TYPE", "derived from the data")
        if _no_file(source) and not found and not of_the_command(key) and value != preset:
            changed.append((key, preset, value, source))
    return changed


def _no_file(source: str) -> bool:
    return source.startswith((COMMAND_LINE, "derived", "checkpoint"))


def config_differences(configs: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(key, value in each) of the settings that are not alike in all; one command's own are left out. Absent ones are ``...``."""
    keys = dict.fromkeys((*_DEFAULTS, *(key for config in configs for key in config)))
    rows = [(key, [config.get(key, ...) for config in configs]) for key in keys if not of_the_command(key) and key != "BASE"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def shown(value: Any) -> str:
    """A setting as YAML writes it."""
    if value is ...:
        return "(absent)"
    value = dict(value) if isinstance(value, Mapping) else value  # a node of the config
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def duration(seconds: float | None) -> str:
    """``3 h 05 min``, ``12 min``, ``41 s``."""
    if seconds is None:
        return "unknown"
    minutes = round(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes else f"{seconds:.0f} s"


_DETAIL = re.compile("_(ar[0-9]+|small|medium|large|things|stuff)$")  # metrics of dense tasks that a few tiles have no room for


def facts(run: Run, brief: bool = False) -> dict[str, str]:
    """What a run came to, in words by name; of a checkpoint alone (``folder`` empty) only what it knows.

    Args:
        brief: without the last figures of a detail, such as AP of large objects.
    """
    metric, best = run.deciding, run.best
    found = {f"best {metric.label}": metric.shown(best[metric.name]) if best else "none yet",
             "best epoch": str(best.get("epoch", "?")) if best else "none yet"}
    if not run.folder:
        return found if best else {}
    last = run.evaluated[-1] if best else {}
    found |= {f"last {metric.label}": metric.shown(last.get(metric.name)) for metric in run.telling_metrics
              if metric.name != "val_loss"  # it stands beside that of training among the curves
              and not (_DETAIL.search(metric.name) and (brief or last.get(metric.name) is None))}
    done, planned, unit = run.length
    speeds = sorted(row["images_per_s"] for row in run.steps or run.rows if _is_number(row.get("images_per_s")))
    skipped = (row["skipped_steps"] for row in run.rows if _is_number(row.get("skipped_steps")))
    found |= {
        unit: f"{done} of {planned}",
        "training time": duration(run.seconds),
        "images/s (median)": f"{speeds[len(speeds) // 2]:,.1f}" if speeds else "unknown",
        "restarts": str(max(0, len(run.starts) - 1)),
        "skipped steps": str(max(len({row["step"] for row in run.evidence}), sum(skipped))),
    }
    ends = [event for event in run.events if event.get("event") in _ENDS]
    if ends:
        found["state"] = {"start": "running, or killed"}.get(ends[-1]["event"], ends[-1]["event"])
    return found


def fact_names(columns: Sequence[Mapping[str, str]]) -> list[str]:
    """The names in the ``facts`` of several runs, what is best first."""
    return sorted(dict.fromkeys(name for column in columns for name in column), key=lambda name: not name.startswith("best "))


def circumstances(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(name, value in each run) of what a run does not choose by its config: versions, device, commit, data."""
    columns = [_surroundings(run) for run in runs]
    return [(name, [column.get(name, "not recorded") for column in columns]) for name in dict.fromkeys(n for c in columns for n in c)]


def _surroundings(run: Run) -> dict[str, str]:
    start = run.starts[-1] if run.starts else {}
    found = {name: str(version) for name, version in _mapping(start.get("versions")).items()}
    for name, key in (("device", "device"), ("precision", "precision"), ("processes", "processes"),
                      ("global batch", "global_batch"), ("steps an epoch", "steps_per_epoch")):
        if start.get(key) not in (None, ""):
            found[name] = str(start[key])
    if start.get("git_commit"):
        found["git commit"] = str(start["git_commit"])[:12]
    for split, data in _mapping(start.get("data")).items():
        found[f"{split} images"] = f"{_mapping(data).get('images', '?')} (fingerprint {_mapping(data).get('fingerprint', '?')})"
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
