"""The doctor: reads a whole data set before a run and says what is wrong with it; the data itself is never changed.

``diagnose`` does it all: ``survey`` opens the splits and reads every image with a ``crew`` of processes, ``examine`` makes a row of
each, ``findings`` judges (with ``twins``, ``similar`` and ``strays``), and ``facts`` sums up. Nothing here needs torch or a model.
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
from data.doctor.finding import ERROR, SEVERITIES, WARNING, Finding, Images, many
from data.doctor.image_record import MODES, ROW, SEEN, format_of
from data.doctor.survey import Split, Survey, base_of, open_survey, read_all
from data.loading.workers import usable_cpus, worker_count
from data.sources.index_cache import Index, keep, names_of, store_names
from data.sources.packed_names import PackedNames

# What timm's random crop, RandAugment, normalisation and erasing take for an image of 224 x 224 on one core, measured.
_AUGMENT_SECONDS = 0.0019
_PARTS = (0, 5, 50, 95, 100)  # percentiles


@dataclass
class Diagnosis:
    """A survey, what was found in it, and its sums."""

    survey: Survey
    found: list[Finding]
    facts: dict[str, Any]

    @property
    def grave(self) -> bool:
        return any(finding.severity == ERROR for finding in self.found)


def diagnose(config: CfgNode, begun: Callable[[Survey], None], progress: Callable[[int], None],
             earlier: Mapping[str, Index] | None = None) -> Diagnosis:
    """Read everything and judge.

    Args:
        begun: hears what was found before the images are read.
        progress: hears how many images have been read.
        earlier: manifests of an earlier time, by split; files whose content has changed since are a finding.

    Raises:
        ConfigError: no data path.
    """
    survey = open_survey(config)
    survey.processes = max(1, config.DATA.NUM_WORKERS) if config.DATA.NUM_WORKERS >= 0 else usable_cpus()
    begun(survey)
    started = time.perf_counter()
    read_all(survey, survey.processes, config.DATA.TIMEOUT, progress)
    survey.seconds = time.perf_counter() - started
    found = findings(survey, config.DOCTOR.NEAR)
    for name, manifest in (earlier or {}).items():
        changed = _changed_since(manifest, survey, name) if name in survey.splits else None
        if changed is not None and len(changed):
            offset = len(survey.splits["train"].rows) if name == "val" and "train" in survey.splits else 0
            found.append(Images(survey, changed + offset).finding(
                "changed", WARNING, f"{many(len(changed))} of {name} changed since the last report, under the same name",
                "a disk that loses bits shows like this; compare with a copy"))
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Diagnosis(survey, found, _facts(survey, found))


def _facts(survey: Survey, found: list[Finding]) -> dict[str, Any]:
    grave = {severity: sum(finding.severity == severity for finding in found) for severity in SEVERITIES}
    return dict(data=survey.root, status="errors" if grave[ERROR] else "warnings" if grave[WARNING] else "clean",
                exit_status=3 if grave[ERROR] else 0, counts=grave,
                splits={name: _split_facts(split) for name, split in survey.splits.items()}, speed=_speed(survey))


def _split_facts(split: Split) -> dict[str, Any]:
    rows = split.rows[split.readable]
    percentiles = {}
    if len(rows):
        for name, values in (("width", rows["width"]), ("height", rows["height"]),
                             ("shorter_side", np.minimum(rows["width"], rows["height"])), ("bytes", rows["bytes"])):
            percentiles[name] = dict(zip(("min", "p5", "median", "p95", "max"), np.percentile(values, _PARTS).round().astype(int).tolist(),
                                         strict=True))
    kinds = [{str(name): int(count) for name, count in sorted(zip(*counted, strict=True), key=lambda kind: -kind[1])}
             for counted in (_counted([MODES[i] for i in range(len(MODES))], rows["mode"]), _formats(rows))]
    return dict(layout=split.layout, place=split.source.root, images=len(split.rows), readable=len(rows), classes=len(split.classes),
                bytes=int(split.rows["bytes"].sum(dtype=np.int64)), sizes=percentiles, modes=kinds[0], formats=kinds[1])


def _counted(names: list[str], codes: np.ndarray) -> tuple[list[str], list[int]]:
    counts = np.bincount(codes, minlength=len(names))
    return [names[i] for i in np.flatnonzero(counts)], counts[counts > 0].tolist()


def _formats(rows: np.ndarray) -> tuple[list[str], list[int]]:
    codes, first, counts = np.unique(rows["format"], return_index=True, return_counts=True)
    return [format_of(rows[i]) for i in first.tolist()], counts.tolist()


def _speed(survey: Survey) -> dict[str, Any]:
    """What reading took, and what that makes of the run that is planned."""
    rows = [split.rows[split.readable] for split in survey.splits.values()]
    rows = np.concatenate(rows) if rows else np.zeros(0, dtype=ROW)
    if not len(rows):
        return {}
    decode, read = (float(rows[name].mean(dtype=np.float64)) / 1e6 for name in ("decode_us", "read_us"))
    config, workers = survey.config, worker_count(survey.config)
    cores = min(max(1, workers), usable_cpus())
    height, width = image_size(config)
    augment = _AUGMENT_SECONDS * height * width / 224**2
    train = survey.splits.get("train")
    images = int(len(train.rows) * config.DATA.SUBSET) * config.DATA.REPEATED_AUG if train else 0
    return dict(processes=survey.processes, seconds=round(survey.seconds, 2),
                images_per_second=round(survey.images / max(survey.seconds, 1e-9), 1),
                decode_ms=round(decode * 1e3, 3), read_ms=round(read * 1e3, 3), decoded_per_second_and_core=round(1 / max(decode, 1e-6), 1),
                plan=dict(images=images, epochs=config.TRAIN.EPOCHS, batch_size=config.DATA.BATCH_SIZE, workers=workers, cores=cores,
                          batch_seconds=round(config.DATA.BATCH_SIZE * (decode + read) / cores, 3),
                          epoch_seconds=round(images * (decode + read) / cores, 2),
                          augmented_epoch_seconds=round(images * (decode + read + augment) / cores, 2)))


# --------------------------------------------------------------------------------------------------
# Manifests
# --------------------------------------------------------------------------------------------------

def manifests(survey: Survey) -> dict[str, Index]:
    """For each split the arrays of its manifest: names, targets, classes, and of every file the size, pixels and SHA-256.

    Where the split was opened from an index, that index is kept for training with the same sums (``data/index.py``):
    training takes its list of files from there as long as no folder and no archive has changed.
    """
    made, kept = {}, {}
    for name, split in survey.splits.items():
        base, indices = base_of(split.source)
        content: Index = dict(targets=split.targets, **_sums(split.rows))
        store_names(content, "names", PackedNames.of(split.source.path(i) for i in range(len(split.rows))))
        store_names(content, "classes", PackedNames.of(survey.classes))
        made[name] = content
        if split.entry is not None and split.entry.path is not None:
            entry, rows = kept.setdefault(split.entry.path, (split.entry, np.zeros(len(base), dtype=ROW)))
            rows[slice(None) if indices is None else indices] = split.rows
    for entry, rows in kept.values():
        if np.all(rows["flags"] & SEEN):  # a part of a source says nothing about the rest
            keep(entry, _sums(rows))
    return made


def _sums(rows: np.ndarray) -> Index:
    return {name: np.ascontiguousarray(rows[name]) for name in ("sha256", "bytes", "width", "height", "flags")}


def _changed_since(manifest: Index, survey: Survey, name: str) -> np.ndarray | None:
    """Positions of images whose content is not what an earlier manifest says; None where it lists other files."""
    split = survey.splits[name]
    try:
        names = names_of(manifest, "names")
        same = len(names) == len(split.rows) and all(names[i] == split.source.path(i) for i in range(len(names)))
        return np.flatnonzero(np.any(manifest["sha256"] != split.rows["sha256"], axis=1)) if same else None
    except (KeyError, IndexError, ValueError):
        return None
