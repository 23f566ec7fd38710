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

    Iteration starts at step ``start``, at no cost. The order of an epoch is derived from (seed, epoch): a permutation of all images, or
    where classes are sampled otherwise an equally long draw. The remainder below a global batch is dropped, a different one each
    epoch. A data set smaller than the global batch makes one short batch an epoch.

    Args:
        size: images in the training set.
        global_batch: images of an optimizer step over all ranks.
        iterations: steps of the whole run, in place of ``epochs``; 0: these count.
        repeats: consecutive copies of each image in the order; the epoch keeps its length, so it sees about size / repeats
            different images ("repeated augmentation", Hoffer et al. 2020, as DeiT uses it).
        targets: class of each image (size,), for another ``sampling`` than natural: as DATA.SAMPLING has it.

    Attributes:
        draws: of each class (C,), mean number of its images in an epoch; None without ``targets``.
    """

    def __init__(self, size: int, global_batch: int, epochs: int, seed: int, rank: int = 0, world_size: int = 1,
                 repeats: int = 1, targets: np.ndarray | None = None, sampling: str = "natural", iterations: int = 0):
        self.size, self.seed, self.rank, self.world_size, self.repeats = size, seed, rank, world_size, repeats
        self.images_per_step = min(global_batch, size)
        self.steps_per_epoch = max(1, size // global_batch)
        self.total_steps = iterations or epochs * self.steps_per_epoch
        self.start = 0
        self._order: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        self.draws = None if targets is None else _draws(np.bincount(targets), sampling)
        self._members: list[np.ndarray] = []  # the images of each class, where they are sampled by class
        if targets is not None and sampling != "natural":
            self._members = np.split(np.argsort(targets, kind="stable"), np.cumsum(np.bincount(targets))[:-1])

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, the last of which may be cut short."""
        return -(-self.total_steps // self.steps_per_epoch)

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
        order, copies = self.order(epoch)
        places = [divmod(place, self.repeats) for place in range(first + low, first + high)]
        return [(epoch, int(order[at]), int(copies[at]) * self.repeats + repeat) for at, repeat in places]

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(images of an epoch (size,), how often each has come before where it comes again (size,))."""
        if self._order[0] != epoch:
            generator = np.random.RandomState(seeds.derive32(self.seed, seeds.ORDER, epoch))
            order = generator.permutation(self.size)
            images, copies = self._drawn(generator) if self._members else (order, np.zeros_like(order))
            self._order = (epoch, images[order], copies[order]) if self._members else (epoch, images, copies)
        return self._order[1:]

    def _drawn(self, generator: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """As ``order``, class by class: each image of a class comes equally often, but for a part of them that once more."""
        ends = np.floor(np.round(np.cumsum(self.draws), 6) + generator.random_sample()).astype(np.int64)
        images, copies = [], []
        for members, count in zip(self._members, np.diff(ends, prepend=0).tolist(), strict=True):
            whole, rest = divmod(count, max(1, len(members)))
            images += [np.tile(members, whole), generator.permutation(members)[:rest]]
            copies += [np.repeat(np.arange(whole), len(members)), np.full(rest, whole)]
        return np.concatenate(images), np.concatenate(copies)

    def _slice(self, rank: int) -> tuple[int, int]:
        n, world = self.images_per_step, self.world_size
        return rank * n // world, (rank + 1) * n // world


def _draws(images: np.ndarray, sampling: str) -> np.ndarray:
    """Mean number of images of each class (C,) in an epoch, from those it has (C,)."""
    shares = images ** dict(natural=1.0, sqrt=0.5, balanced=0.0)[sampling] * (images > 0)
    return shares * (images.sum() / shares.sum())


class ShardSampler:
    """Batch sampler of evaluation: each image exactly once over all ranks, in contiguous shards without padding."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.low, self.high = rank * size // world_size, (rank + 1) * size // world_size
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-(self.high - self.low) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(i, min(i + self.batch_size, self.high))) for i in range(self.low, self.high, self.batch_size))
