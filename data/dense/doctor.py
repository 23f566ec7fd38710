"""The doctor's look at data of dense tasks: annotations beside images."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from yacs.config import CfgNode

from config import with_values
from data.dense.base import Fault
from data.dense.layouts import flat_objects, open_dense_sources
from data.dense.objects import ObjectSource
from data.doctor.checks import findings
from data.doctor.finding import ERROR, SEVERITIES, WARNING, Finding, Images, many, start_of
from data.doctor.image_record import EXIF_ROTATED
from data.doctor.survey import Split, Survey, base_of
from data.errors import DataError
from data.sources.base import Source
from data.sources.label_sets import LabelSets

# What matters to classification alone: one class can be found, images are resized whole, and classes are not balanced image by image.
_NOT_DENSE = ("one-class", "long", "tiny", "large", "imbalance")


def open_dense_survey(config: CfgNode) -> Survey:
    """As ``data.doctor.survey.open_survey``, with all images, those without objects too.

    Raises:
        ConfigError: DATA.DATA_PATH is empty, keys do not fit the data, or a package is missing.
    """
    survey = Survey(os.path.expanduser(config.DATA.DATA_PATH), config)
    whole = with_values(config, {"DATA.DENSE.EMPTY": True, "DATA.SUBSET": 1.0}, "the doctor")
    for name in ("train", "val"):
        known = survey.classes if "train" in survey.splits else None
        try:
            sources, layout = open_dense_sources(whole, (name,), known)
            source = sources[name]
        except DataError as error:
            survey.failures[name] = str(error)
            continue
        if not survey.splits:
            survey.classes, survey.known = list(source.classes), len(source.classes)
        survey.configure(source)
        source.labels = _class_sets(source)
        survey.splits[name] = Split(name, layout, source, list(source.classes), source.targets, np.zeros(0))
    return survey


def _class_sets(source: Source) -> LabelSets | None:
    """Of which classes each image has objects; None where files would have to be read."""
    found = flat_objects(source)
    if found is None:
        return None
    there = np.zeros((len(source), len(source.classes)), dtype=np.int8)
    there[found] = 1
    table, which = np.unique(there, axis=0, return_inverse=True)
    return LabelSets(table, which.reshape(-1))


def dense_findings(survey: Survey, distance: int) -> list[Finding]:
    """As ``data.doctor.checks.findings``, with the faults of annotations."""
    found = [finding for finding in findings(survey, distance) if finding.code not in _NOT_DENSE]
    told: list[Fault] = []
    for split in survey.splits.values():
        for fault in split.source.faults:
            if all(fault is not other for other in told):  # both parts of data without a split have the same
                told.append(fault)
                found.append(_of_fault(fault, split))
        found += _sizes(survey, split)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _of_fault(fault: Fault, split: Split) -> Finding:
    """An error where more was lost than there is left."""
    base = base_of(split.source)[0]
    left = len(base) if fault.kind.startswith("image") or not isinstance(base, ObjectSource) else len(base.label_of)
    code = "annotations-" + "-".join("".join(c if c.isalnum() else " " for c in fault.kind.lower()).split())
    title = f"annotations of {split.name}: {fault.kind}, {many(fault.count, 'time')}"
    return Finding(code, ERROR if fault.count > left else WARNING, title, len(fault.examples),
                   lambda i: dict(name=fault.examples[i], detail=""), fault.remedy)


def _sizes(survey: Survey, split: Split) -> Iterator[Finding]:
    """Images of another size than their annotations are of, which training takes for unreadable."""
    rows, sizes = split.rows, split.source.sizes
    if not isinstance(base_of(split.source)[0], ObjectSource):
        return  # maps are compared with their images when they are listed
    stored = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
    turned = survey.config.DATA.EXIF & ((rows["flags"] & EXIF_ROTATED) > 0)
    same = (stored == sizes).all(axis=1) | (turned & (stored[:, ::-1] == sizes).all(axis=1))
    if len(bad := np.flatnonzero(split.readable & ~same)):
        budget = survey.config.DATA.CORRUPT_BUDGET
        over = split.name == "train" and len(bad) > int(budget * len(rows) if budget < 1 else budget)
        images = Images(survey, bad + start_of(survey, split.name), lambda split, i: (
            f"{split.rows['width'][i]} x {split.rows['height'][i]}, annotated as {split.source.sizes[i][1]} x {split.source.sizes[i][0]}"))
        yield images.finding("annotations-size", ERROR if over or len(bad) == len(rows) else WARNING,
                             f"{many(len(bad))} of {split.name} of another size than the annotations say: they are not used",
                             "put the images back that were annotated, or annotate these", ["--opts DATA.EXIF True"] if (
                                 (stored[bad][:, ::-1] == sizes[bad]).all() and not survey.config.DATA.EXIF) else [])
