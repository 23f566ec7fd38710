"""Which samples make which step. Training is one stream of steps; an epoch is a range of them.

A key is (epoch, index, copy): with the run's seed it determines a training sample's augmentation completely, so neither
the number of workers nor a restart can change what a step sees. The samplers are our own because torch's yield no such keys and
cannot start at a given step without drawing all that precedes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data import seeds

Key = tuple[int, int, int]


class StepSampler:
    """Batch sampler of the training stream: for each step, the keys of this rank's slice of the global batch.

    Iteration starts at step ``start``, at no cost. The order of an epoch is a permutation derived from (seed, epoch); the
    remainder below a global batch is dropped, a different one each epoch. A data set smaller than the global batch makes
    one short batch an epoch.

    Args:
        size: images in the training set.
        global_batch: images of an optimizer step over all ranks.
        repeats: consecutive copies of each image in the order; the epoch keeps its length, so it sees about size / repeats
            different images ("repeated augmentation", Hoffer et al. 2020, as DeiT uses it).
    """

    def __init__(self, size: int, global_batch: int, epochs: int, seed: int, rank: int = 0, world_size: int = 1,
                 repeats: int = 1):
        self.size, self.seed, self.rank, self.world_size, self.repeats = size, seed, rank, world_size, repeats
        self.images_per_step = min(global_batch, size)
        self.steps_per_epoch = max(1, size // global_batch)
        self.total_steps = epochs * self.steps_per_epoch
        self.start = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.keys(step) for step in range(self.start, self.total_steps))

    def local_images(self) -> int:
        """Images of a step on this rank; ranks differ by one at most, and only in a short batch."""
        low, high = self._slice(self.rank)
        return high - low

    def keys(self, step: int, rank: int | None = None) -> list[Key]:
        """The keys of a rank's slice of step ``step``."""
        epoch, within = divmod(step, self.steps_per_epoch)
        low, high = self._slice(self.rank if rank is None else rank)
        first = within * self.images_per_step
        order = self.order(epoch)
        return [(epoch, int(order[p // self.repeats]), p % self.repeats) for p in range(first + low, first + high)]

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch."""
        if self._order[0] != epoch:
            generator = np.random.RandomState(seeds.derive32(self.seed, seeds.ORDER, epoch))
            self._order = (epoch, generator.permutation(self.size))
        return self._order[1]

    def _slice(self, rank: int) -> tuple[int, int]:
        n, world = self.images_per_step, self.world_size
        return rank * n // world, (rank + 1) * n // world


class ShardSampler:
    """Batch sampler of evaluation: each image exactly once over all ranks, in contiguous shards without padding."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.low, self.high = rank * size // world_size, (rank + 1) * size // world_size
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-(self.high - self.low) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(i, min(i + self.batch_size, self.high))) for i in range(self.low, self.high, self.batch_size))
