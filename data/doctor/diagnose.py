"""The doctor: reads a whole data set before a run and reports what is wrong with it; the data itself is never changed.

``survey`` opens the splits and has a ``worker_pool`` read every image; ``image_record`` makes a row of each. ``checks`` makes findings
of the rows, with ``duplicate_checks`` (by ``image_hashes``) and ``ignored_files``. Nothing here needs torch or a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from yacs.config import CfgNode

from config import image_size
from data.doctor.checks import findings
from data.doctor.finding import ERROR, SEVERITIES, WARNING, Finding, Images, many, start_of
from data.doctor.image_record import MODES, ROW, SEEN, format_of
from data.doctor.survey import Split, Survey, base_of, open_survey, read_all
from data.loading.workers import usable_cpus, worker_count
from data.sources.index_cache import Index, names_of, store_names, write_with_checksums
from data.sources.packed_names import PackedNames

_AUGMENT_SECONDS = 0.0019  # of timm's crop, RandAugment, normalisation and erasing for 224 x 224 pixels on one core, measured
_PERCENTILES = dict(min=0, p5=5, median=50, p95=95, max=100)


@dataclass
class Diagnosis:
    """A survey, its findings, and the figures of the report as plain data."""

    survey: Survey
    found: list[Finding]
    facts: dict[str, Any]

    @property
    def grave(self) -> bool:
        return any(finding.severity == ERROR for finding in self.found)


def diagnose(config: CfgNode, begun: Callable[[Survey], None], progress: Callable[[int], None],
             earlier: Mapping[str, Index] | None = None, open_data: Callable[[CfgNode], Survey] = open_survey,
             check: Callable[[Survey, int], list[Finding]] = findings) -> Diagnosis:
    """Read every image of the config's data and check it.

    Args:
        open_data, check: find the data's splits, and make findings of them once they are read.
        begun: called with the survey before the images are read.
        progress: called now and then with the number of images read.
        earlier: manifests of an earlier report, by split; files whose content has changed since are a finding.

    Raises:
        ConfigError: DATA.DATA_PATH is empty.
    """
    survey = open_data(config)
    survey.processes = max(1, config.DATA.NUM_WORKERS) if config.DATA.NUM_WORKERS >= 0 else usable_cpus()
    begun(survey)
    started = time.perf_counter()
    read_all(survey, survey.processes, config.DATA.TIMEOUT, progress)
    survey.seconds = time.perf_counter() - started
    found = check(survey, config.DOCTOR.NEAR)
    for name, manifest in (earlier or {}).items():
        changed = _changed_since(manifest, survey, name) if name in survey.splits else None
        if changed is not None and len(changed):
            found.append(Images(survey, changed + start_of(survey, name)).finding(
                "changed", WARNING, f"{many(len(changed))} of {name} changed since the last report, under the same name",
                "a disk that loses bits shows like this; compare with a copy"))
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(survey, found, _facts(survey, found))


def _facts(survey: Survey, found: list[Finding]) -> dict[str, Any]:
    counts = {severity: sum(finding.severity == severity for finding in found) for severity in SEVERITIES}
    return dict(data=survey.root, status="errors" if counts[ERROR] else "warnings" if counts[WARNING] else "clean",
                exit_status=3 if counts[ERROR] else 0, counts=counts,
                splits={name: _split_facts(split) for name, split in survey.splits.items()}, speed=_speed(survey))


def _split_facts(split: Split) -> dict[str, Any]:
    rows = split.rows[split.readable]
    percentiles = {}
    if len(rows):
        for name, values in (("width", rows["width"]), ("height", rows["height"]),
                             ("shorter_side", np.minimum(rows["width"], rows["height"])), ("bytes", rows["bytes"])):
            values = np.percentile(values, list(_PERCENTILES.values())).round().astype(int).tolist()
            percentiles[name] = dict(zip(_PERCENTILES, values, strict=True))
    return dict(layout=split.layout, place=split.source.root, images=len(split.rows), readable=len(rows), classes=len(split.classes),
                bytes=int(split.rows["bytes"].sum(dtype=np.int64)), sizes=percentiles,
                modes=_counts(rows, "mode", lambda row: MODES[row["mode"]]), formats=_counts(rows, "format", format_of))


def _counts(rows: np.ndarray, column: str, name_of: Callable[[np.void], str]) -> dict[str, int]:
    """How many rows have each value of a column, the most frequent first."""
    _, first, counts = np.unique(rows[column], return_index=True, return_counts=True)
    return {name_of(rows[first[i]]): int(counts[i]) for i in np.argsort(-counts, kind="stable")}


def _epochs(config: CfgNode, images: int) -> int:
    """Of the planned run, by one process where TRAIN.ITERATIONS and not TRAIN.GLOBAL_BATCH is set."""
    batch = config.TRAIN.GLOBAL_BATCH or config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS
    return -(-config.TRAIN.ITERATIONS * batch // max(1, images)) or config.TRAIN.EPOCHS


def _speed(survey: Survey) -> dict[str, Any]:
    """How long reading took, and what follows for the run that is planned."""
    rows = [split.rows[split.readable] for split in survey.splits.values()]
    rows = np.concatenate(rows) if rows else np.zeros(0, dtype=ROW)
    if not len(rows):
        return {}
    decode, read = (float(rows[name].mean(dtype=np.float64)) / 1e6 for name in ("decode_us", "read_us"))  # seconds
    config, workers = survey.config, worker_count(survey.config.DATA.NUM_WORKERS)
    cores = min(max(1, workers), usable_cpus())
    height, width = image_size(config)
    augment = _AUGMENT_SECONDS * height * width / 224**2
    train = survey.splits.get("train")
    images = int(len(train.rows) * config.DATA.SUBSET) * config.DATA.REPEATED_AUG if train else 0
    return dict(processes=survey.processes, seconds=round(survey.seconds, 2),
                images_per_second=round(survey.images / max(survey.seconds, 1e-9), 1),
                decode_ms=round(decode * 1e3, 3), read_ms=round(read * 1e3, 3), decoded_per_second_and_core=round(1 / max(decode, 1e-6), 1),
                plan=dict(images=images, epochs=_epochs(config, images), batch_size=config.DATA.BATCH_SIZE, workers=workers, cores=cores,
                          batch_seconds=round(config.DATA.BATCH_SIZE * (decode + read) / cores, 3),
                          epoch_seconds=round(images * (decode + read) / cores, 2),
                          augmented_epoch_seconds=round(images * (decode + read + augment) / cores, 2)))


# --------------------------------------------------------------------------------------------------
# Manifests
# --------------------------------------------------------------------------------------------------

def manifests(survey: Survey) -> dict[str, Index]:
    """For each split the arrays of its manifest: names, targets, classes, and of every file the size, pixels and SHA-256.

    A split's list of files is also written to the index cache, with the same checksums (``data/sources/index_cache.py``): training
    takes it from there as long as no folder and no archive has changed.
    """
    contents, cached = {}, {}
    for name, split in survey.splits.items():
        base, indices = base_of(split.source)
        content: Index = dict(targets=split.targets, **_checksums(split.rows))
        store_names(content, "names", PackedNames.of(split.source.path(i) for i in range(len(split.rows))))
        store_names(content, "classes", PackedNames.of(survey.classes))
        contents[name] = content
        if split.entry is not None and split.entry.path is not None:
            entry, rows = cached.setdefault(split.entry.path, (split.entry, np.zeros(len(base), dtype=ROW)))
            rows[slice(None) if indices is None else indices] = split.rows
    for entry, rows in cached.values():
        if np.all(rows["flags"] & SEEN):  # not where only a part of the source was read
            write_with_checksums(entry, _checksums(rows))
    return contents


def _checksums(rows: np.ndarray) -> Index:
    return {name: np.ascontiguousarray(rows[name]) for name in ("sha256", "bytes", "width", "height", "flags")}


def _changed_since(manifest: Index, survey: Survey, name: str) -> np.ndarray | None:
    """Indices of images whose content is not that of an earlier manifest; None where it lists other files."""
    split = survey.splits[name]
    try:
        names = names_of(manifest, "names")
        same = len(names) == len(split.rows) and all(names[i] == split.source.path(i) for i in range(len(names)))
        return np.flatnonzero(np.any(manifest["sha256"] != split.rows["sha256"], axis=1)) if same else None
    except (KeyError, IndexError, ValueError):
        return None
