"""Which images make which batch: in training wide and tall ones apart, in evaluation those of one padded size together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data import seeds
from data.loading.sampler import StepSampler


class AspectStepSampler(StepSampler):
    """The training stream with steps of wide or of tall images alone, which pads them less; one step an epoch may mix what is left of both.

    An epoch has the images that it would have without. Their order is a function of (seed, epoch) and the global batch, which a run keeps
    however many processes and micro-batches share it.

    Args:
        wide: (images,) bool.
    """

    def __init__(self, wide: np.ndarray, global_batch: int, epochs: int, seed: int, rank: int = 0, world_size: int = 1,
                 iterations: int = 0):
        super().__init__(len(wide), global_batch, epochs, seed, rank, world_size, iterations=iterations)
        self.wide = wide

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._order[0] != epoch:
            generator = np.random.RandomState(seeds.derive32(self.seed, seeds.ORDER, epoch))
            order, step = generator.permutation(self.size), self.images_per_step
            used, dropped = np.split(order, [self.steps_per_epoch * step])
            kinds = [used[self.wide[used]], used[~self.wide[used]]]
            whole = [len(images) // step * step for images in kinds]
            parts = [np.split(images, [end]) for images, end in zip(kinds, whole, strict=True)]
            steps = np.concatenate([pure for pure, _ in parts] + [rest for _, rest in parts]).reshape(-1, step)
            images = np.concatenate([steps[generator.permutation(len(steps))].reshape(-1), dropped])
            self._order = (epoch, images, np.zeros_like(images))
        return self._order[1:]


class SizeSampler:
    """Batch sampler of evaluation: each image exactly once over all ranks, with its equals in padded size alone.

    Batches follow the order of their first images; ranks take contiguous parts of them. Which images make a batch does not hang on the
    number of ranks.

    Args:
        padded: (images, 2) padded height and width.
        neighbours: only images that follow each other, so that all come in their order.
    """

    def __init__(self, padded: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1, neighbours: bool = False):
        _, group = np.unique(padded, axis=0, return_inverse=True)
        group = group.reshape(-1)
        if neighbours:
            group = np.cumsum(np.diff(group, prepend=group[:1]) != 0)
        groups = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
        batches = [images[first:first + batch_size].tolist() for images in groups for first in range(0, len(images), batch_size)]
        batches.sort(key=lambda images: images[0])
        self.batches = batches[rank * len(batches) // world_size:(rank + 1) * len(batches) // world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)
