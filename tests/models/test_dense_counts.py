"""The table of scripts/dense_counts.py beside the papers'."""

from __future__ import annotations

import dense_counts


def test_larger_groups_cost_as_much_more_as_in_the_paper() -> None:
    """301.0 - 291.1 = 9.9 G for Mask R-CNN on CrossFormer-S at 1280 x 800, at equal weights."""
    small, large = (dense_counts.build("mask_rcnn", "crossformer_small", large) for large in (False, True))
    assert abs(dense_counts.multiply_adds(large, 800, 1280) - dense_counts.multiply_adds(small, 800, 1280) - 9.9) < 0.1
    assert dense_counts.parameters(small) == dense_counts.parameters(large)
    assert {name: x.shape for name, x in small.state_dict().items()} == {name: x.shape for name, x in large.state_dict().items()}


def test_the_table_names_each_head_and_variant_once_a_setting() -> None:
    rows = [row[:3] for row in dense_counts.PUBLISHED]
    assert len(set(rows)) == len(rows) and {head for head, *_ in rows} == set(dense_counts.TASKS)
