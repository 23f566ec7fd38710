"""Outputs of dense models become objects and maps in the file's own pixels, as slower, plainer ways have them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import ConfigError
from utils.inference import found as module
from utils.inference.found import (
    boxes_of,
    encode_window,
    found_of_detections,
    found_of_queries,
    map_of_logits,
    map_of_queries,
    panoptic_of_queries,
    pasted,
)

decode = pytest.importorskip("pycocotools.mask").decode


def test_boxes_are_scaled_by_axis_and_clipped_and_the_likeliest_comes_first() -> None:
    output = dict(boxes=torch.tensor([[0.0, 0, 10, 10], [-4, 2, 60, 90]]), scores=torch.tensor([0.2, 0.9]), labels=torch.tensor([3, 1]))
    found = found_of_detections([output], torch.tensor([[40, 50]]), torch.tensor([[80, 25]]))[0]
    assert found.boxes.tolist() == [[0, 4, 25, 80], [0, 0, 5, 20]] and found.boxes.dtype == np.float32
    assert found.labels.tolist() == [1, 3] and found.scores.tolist() == pytest.approx([0.9, 0.2]) and found.masks is None
    assert found.above(0.5).labels.tolist() == [1] and len(found.above(0.95)) == 0


def test_masks_are_pasted_as_grid_sample_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    height, width, differing = 50, 70, 0
    for _ in range(20):
        x, y = (torch.rand(2, generator=generator) * size for size in (width, height))
        box = torch.stack([x.min(), y.min(), x.max(), y.max()])
        mask = torch.rand(1, 1, 28, 28, generator=generator)
        grid = torch.stack(torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")[::-1], dim=-1)
        grid = (grid - box[:2]) / (box[2:] - box[:2]) * 2 - 1
        expected = F.grid_sample(mask, grid[None], align_corners=False)[0, 0]
        ours = decode(pasted(mask[0, 0].numpy(), box.double().numpy(), height, width))
        sure = (expected - 0.5).abs() > 1e-4
        assert np.array_equal(ours[sure], (expected >= 0.5).numpy()[sure])
        differing += int((~sure).sum())
    assert differing < 20
    empty = pasted(np.ones((28, 28)), np.array([5.0, 5, 5, 9]), height, width)
    assert empty["size"] == [50, 70] and not decode(empty).any()


def test_windows_are_encoded_as_pycocotools_encodes_the_whole_mask() -> None:
    generator = np.random.RandomState(0)
    for top, left, rows, columns in [(0, 0, 6, 9), (2, 3, 4, 5), (0, 2, 6, 3), (5, 8, 1, 1)]:
        for window in (generator.rand(rows, columns) > 0.4, np.ones((rows, columns), bool), np.zeros((rows, columns), bool)):
            whole = np.zeros((6, 9), np.uint8)
            whole[top:top + rows, left:left + columns] = window
            assert encode_window(window, left, top, 6, 9) == module.mask_library().encode(np.asfortranarray(whole))


def queries(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two images, five queries, three classes; masks are smooth blobs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 5, 3, 4, generator=generator) * 4
    return dict(class_logits=torch.randn(2, 5, 4, generator=generator) * 2, mask_logits=F.interpolate(coarse, size=(12, 16)))


SIZES, ORIGINALS, PADDED = torch.tensor([[40, 64], [48, 50]]), torch.tensor([[20, 32], [60, 41]]), (48, 64)


def enlarged(logits: torch.Tensor, image: int) -> torch.Tensor:
    """One image's masks, all at once."""
    (height, width), original = SIZES[image].tolist(), ORIGINALS[image].tolist()
    whole = F.interpolate(logits[image][None], size=PADDED, mode="bilinear", align_corners=False)
    return F.interpolate(whole[..., :height, :width], size=original, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("values", [1, 1 << 25])
def test_queries_give_the_top_pairs_of_query_and_class(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VALUES", values)
    outputs = queries()
    outputs["mask_logits"][0, 2] = -5  # a mask without a pixel
    for image, found in enumerate(found_of_queries(outputs, SIZES, ORIGINALS, PADDED, top=9)):
        logits, likely = enlarged(outputs["mask_logits"], image), outputs["class_logits"][image].softmax(1)[:, :3]
        pairs = sorted(((float(likely[q, c]), q, c) for q in range(5) for c in range(3)), reverse=True)[:9]
        rows = sorted(((p * float(logits[q].sigmoid()[logits[q] > 0].mean()), c, q) for p, q, c in pairs if (logits[q] > 0).any()),
                      reverse=True)
        assert len(rows) == len(found) and found.labels.tolist() == [c for _, c, _ in rows]
        assert found.scores.tolist() == pytest.approx([score for score, *_ in rows], abs=1e-6)
        for mask, box, (_, _, q) in zip(found.masks, found.boxes, rows, strict=True):
            assert np.array_equal(decode(mask), (logits[q] > 0).numpy())
            y, x = np.nonzero(decode(mask))
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert boxes_of([]).shape == (0, 4)


@pytest.mark.parametrize("values", [1, 1 << 25])
def test_maps_are_the_argmax_of_cropped_and_resized_scores(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VALUES", values)
    logits = torch.randn(2, 3, *PADDED, generator=torch.Generator().manual_seed(1))
    outputs = queries()
    for image, (found, of_queries) in enumerate(zip(map_of_logits(logits, SIZES, ORIGINALS),
                                                    map_of_queries(outputs, SIZES, ORIGINALS, PADDED), strict=True)):
        assert found.dtype == torch.uint8 and torch.equal(found.long(), enlarged(logits, image).argmax(0))
        masks = F.interpolate(outputs["mask_logits"], size=PADDED, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", outputs["class_logits"].softmax(2)[..., :3], masks)
        assert (of_queries.long() == enlarged(scores, image).argmax(0)).float().mean() > 0.999


def test_panoptic_segments_do_not_overlap_and_stuff_of_a_class_is_one() -> None:
    """Four queries: two halves of stuff, a thing, and the same thing again, which gets too little of its mask; the fifth is no object."""
    masks = torch.full((1, 5, 4, 6), -9.0)
    masks[0, 0, :, :3] = masks[0, 1, :, 3:] = 3.0
    masks[0, 2, 1:3, 1:5] = 9.0
    masks[0, 3, 1:3, 1:5] = 8.0
    logits = torch.zeros(1, 5, 3)
    logits[0, :2, 0] = logits[0, 2:4, 1] = logits[0, 4, 2] = 9
    logits[0, 1, 0] = 8
    size = torch.tensor([[4, 6]])
    found = panoptic_of_queries(dict(class_logits=logits, mask_logits=masks), size, size, (4, 6), [False, True])[0]
    assert found.labels.tolist() == [1] and found.segments.sum() == 8  # the stuff keeps too little of each half as well
    found = panoptic_of_queries(dict(class_logits=logits, mask_logits=masks), size, size, (4, 6), [False, True], overlap=0.6)[0]
    assert found.labels.tolist() == [0, 1] and found.segments.tolist()[1] == [1, 2, 2, 2, 2, 1] and found.segments.min() == 1
    assert found.scores[0] == pytest.approx(float(logits[0, 0].softmax(0)[0]))
    nothing = panoptic_of_queries(dict(class_logits=logits[:, 4:], mask_logits=masks[:, 4:]), size, size, (4, 6), [False, True])[0]
    assert not nothing.segments.any() and len(nothing.labels) == 0


def test_without_pycocotools_a_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match="requirements-extras.txt"):
        module.mask_library()
