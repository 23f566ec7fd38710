"""Batches whose files the device decodes: one batch ahead of its augmentation, in a thread, since decoding waits for the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from data.loading.corrupt_images import Failure
from data.loading.dataset import Batch, TrainImages, empty_in_shared_memory
from data.loading.sampler import Key
from data.transforms.encoded import Encoded, EncodedTrainPipeline, decode_crops

Count = Callable[[list[Failure], tuple[int, ...]], None]  # takes in images that could not be read, and how many were decoded how
# Columns of a batch's plan (B, 10): bytes of the file, 0 where the worker has decoded it; crop; size; key.
_LENGTH, _CROP, _SIZE, _KEY = 0, slice(1, 5), slice(5, 7), slice(7, 10)


class EncodedTrainImages(TrainImages):
    """As ``TrainImages``; a worker hands over (bytes of files (n,), crops of the images that it has decoded (F, H, W, C), the plan (B, 10),
    parameters, targets).

    A sample is a function of (seed, key) as ever; a file that the device does not decode is decoded, or replaced, as by a worker.
    """

    pipeline: EncodedTrainPipeline

    def __getitems__(self, keys: list[Key]) -> Batch:
        failures: list[Failure] = []
        images, rows, targets = zip(*(self._read(key, None, failures) for key in keys), strict=True)
        plan = torch.zeros(len(keys), 10, dtype=torch.int64)
        plan[:, _KEY] = torch.tensor(keys)
        for row, image in zip(plan, images, strict=True):
            if isinstance(image, Encoded):
                row[_LENGTH], row[_CROP], row[_SIZE] = len(image.data), torch.tensor(image.crop), torch.tensor(image.size)
        files = b"".join(image.data for image in images if isinstance(image, Encoded))
        crops = [image for image in images if not isinstance(image, Encoded)]
        data = empty_in_shared_memory((max(1, len(files)),), torch.uint8, self.pipe)  # which is never of no bytes
        data[:len(files)] = torch.frombuffer(bytearray(files), dtype=torch.uint8) if files else 0
        decoded = empty_in_shared_memory((max(1, len(crops)), *self.pipeline.shape), torch.uint8, self.pipe)
        for row, crop in zip(decoded, crops, strict=False):
            row.copy_(crop)
        return self._batch((data, decoded, plan, torch.stack(rows), torch.stack([torch.as_tensor(t) for t in targets])), failures)

    def ahead(self, batches: Iterable[tuple[Tensor, ...]], device: torch.device, count: Count) -> Iterator[tuple[Tensor, ...]]:
        stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        with ThreadPoolExecutor(1, "decoding") as thread:
            pending: tuple[tuple[Tensor, ...], Future] | None = None
            for parts in batches:
                following = parts, thread.submit(self._decode, parts, device, stream)
                if pending is not None:
                    yield self._complete(*pending, stream, count)
                pending = following
            if pending is not None:
                yield self._complete(*pending, stream, count)

    def move(self, parts: tuple[Any, ...], device: torch.device) -> Any:
        if parts[0].is_cuda:  # its memory is that of the stream that decoded it
            parts[0].record_stream(torch.cuda.current_stream(device))
        return super().move(parts, device)

    def _decode(self, parts: tuple[Tensor, ...], device: torch.device, stream: torch.cuda.Stream | None) -> tuple[Tensor, list[int]]:
        """(crops (B, H, W, C) on ``device``, places of those that are not there), in the thread."""
        data, decoded, plan, *_ = parts
        lengths = plan[:, _LENGTH]
        here, there = lengths.nonzero()[:, 0], (lengths == 0).nonzero()[:, 0]
        files = data[:int(lengths.sum())].split(lengths[here].tolist()) if len(here) else ()
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            crops, failed = decode_crops(files, plan[here, _CROP].tolist(), plan[here, _SIZE].tolist(), self.pipeline.augmentation, device)
            images = torch.empty(len(plan), *self.pipeline.shape, dtype=torch.uint8, device=device)
            images[here.to(device)] = crops
            images[there.to(device)] = decoded[:len(there)].to(device)
        if stream is not None:
            stream.synchronize()  # the bytes may be given back, and whoever takes the images need not wait
        return images, here[failed].tolist()

    def _complete(self, parts: tuple[Tensor, ...], job: Future, stream: torch.cuda.Stream | None, count: Count) -> tuple[Tensor, ...]:
        """(images, parameters, targets) of a batch, with what the device did not decode read again, by this process as by a worker."""
        (images, missing), (_, _, plan, rows, targets) = job.result(), parts
        failures: list[Failure] = []
        for place in missing:
            sample = functools.partial(self._sample, out=None, prepare=self.pipeline.decoded)
            image, row, target = self.corrupt_policy.read(tuple(plan[place, _KEY].tolist()), failures, sample)
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                images[place] = image.to(images.device)
            rows[place], targets[place] = row, torch.as_tensor(target)
        if missing and stream is not None:
            stream.synchronize()
        counted = self.pipeline.counts() if missing else (0, 0)
        count(failures, (*counted, int((plan[:, _LENGTH] > 0).sum()) - len(missing)))
        return images, rows, targets
