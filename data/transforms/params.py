"""The random parameters of a training sample's augmentation: crop, flips, operations with their magnitudes, erased boxes.

The distributions are read from timm's own transform, and every number is drawn from the same global generators in the same order
as timm draws it while it augments: with the same seed a sample here is the one that timm would make.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from data.transforms.fit import ProportionalCrop, relative
from data.transforms.randaugment import BRIGHTNESS, COLOR, CONTRAST, OPERATIONS

Box = tuple[int, int, int, int]  # top, left, height, width
_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
_FLIPS, _OP, _BOX = 2, 2, 4  # numbers that a packed row holds for the flips, for an operation, for a box


def leave_out_colour(transform: transforms.Compose) -> list[str]:
    """Take out of timm's training transform what needs red, green and blue, and return its names."""
    left_out = []
    for part in list(transform.transforms):
        if isinstance(part, RandAugment):
            kept = [place for place, op in enumerate(part.ops) if not op.name.startswith("Color")]
            left_out += [op.name for op in part.ops if op.name.startswith("Color")]
            if part.choice_weights is not None:
                weights = np.asarray(part.choice_weights)[kept]
                part.choice_weights = weights / weights.sum()
            part.ops = [part.ops[place] for place in kept]
        elif isinstance(part, transforms.ColorJitter):
            left_out += [name for name in ("saturation", "hue") if getattr(part, name) is not None]
            part.saturation = part.hue = None
        elif isinstance(part, (AutoAugment, AugMixAugment)):
            left_out.append(type(part).__name__)
            transform.transforms.remove(part)
    return left_out


@dataclass
class AugmentParams:
    """The random parameters of one sample; ``operations`` are (operation of ``randaugment``, argument), applied in turn."""

    crop: Box
    hflip: bool
    vflip: bool
    operations: list[tuple[int, float]]
    boxes: list[Box]


class Augmentation:
    """timm's training transform as data: samples the random parameters, and knows what the operations need.

    Attributes:
        size: (height, width) of the result.
        mode: interpolation of the crop and of the geometric operations, bicubic or bilinear.
        fill: (R, G, B) of what a geometric operation uncovers.
        proportional: ratios of the crop are relative to the image's own (``data/transforms/fit.py``).
        padding: (R, G, B) around a crop that keeps its shape; None where it is resized to ``size``.
        mean, std: (3,) float tensors of the normalisation.
        erase: what fills an erased box: ``"pixel"`` (noise), ``"rand"`` (a random colour) or ``"const"`` (zeros).
    """

    def __init__(self, transform: transforms.Compose):
        """Read timm's transform.

        Raises:
            LookupError: a part of it is not supported here; the message names it.
        """
        self.hflip = self.vflip = 0.0
        self.policy: RandAugment | None = None
        self.jitter: transforms.ColorJitter | None = None
        self.erasing: RandomErasing | None = None
        self.fill = (128, 128, 128)
        for part in transform.transforms:
            self._read(part)

    def _read(self, part: Any) -> None:
        if isinstance(part, RandomResizedCropAndInterpolation):
            mode = getattr(part.interpolation, "value", "random")
            if mode not in _MODES.values():
                raise LookupError(f"interpolation {mode}")
            self.size, self.mode, self.scale, self.ratio = part.size, mode, part.scale, part.ratio
            self.proportional = isinstance(part, ProportionalCrop)
            self.padding = part.fill if self.proportional else None
        elif isinstance(part, transforms.RandomHorizontalFlip):
            self.hflip = part.p
        elif isinstance(part, transforms.RandomVerticalFlip):
            self.vflip = part.p
        elif isinstance(part, RandAugment):
            for op in part.ops:
                if op.name not in OPERATIONS:
                    raise LookupError(f"operation {op.name}")
                if _MODES.get(op.kwargs["resample"]) != self.mode:
                    raise LookupError("mixed interpolation")
            self.policy, self.fill = part, tuple(part.ops[0].kwargs["fillcolor"])
        elif isinstance(part, transforms.ColorJitter):
            if part.hue is not None:
                raise LookupError("hue jitter")
            self.jitter = part
        elif isinstance(part, transforms.Normalize):
            self.mean, self.std = torch.as_tensor(part.mean), torch.as_tensor(part.std)
        elif isinstance(part, RandomErasing):
            self.erasing = part
        elif not isinstance(part, transforms.ToTensor):
            raise LookupError(type(part).__name__)

    @property
    def erase(self) -> str:
        if self.erasing is None:
            return "const"
        return "pixel" if self.erasing.per_pixel else "rand" if self.erasing.rand_color else "const"

    def sample(self, width: int, height: int) -> AugmentParams:
        """Random parameters for an image of that size, from the global generators, which the caller has seeded."""
        crop = self._sample_crop(width, height)
        hflip = self.hflip > 0 and torch.rand(1).item() < self.hflip
        vflip = self.vflip > 0 and torch.rand(1).item() < self.vflip
        operations = self._sample_policy() if self.policy is not None else []
        if self.jitter is not None:
            operations += self._sample_jitter()
        return AugmentParams(crop, hflip, vflip, operations, self._sample_boxes() if self.erasing is not None else [])

    def _sample_crop(self, width: int, height: int) -> Box:
        whole, ratio = width * height, relative(self.ratio, width, height) if self.proportional else self.ratio
        low, high = math.log(ratio[0]), math.log(ratio[1])
        for _ in range(10):
            area = random.uniform(*self.scale) * whole
            aspect = math.exp(random.uniform(low, high))
            w, h = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
            if w <= width and h <= height:
                top = random.randint(0, height - h)  # drawn before the column, as timm does
                return top, random.randint(0, width - w), h, w
        w, h = width, height  # the centre of an image too long for the ratios
        if width / height < min(ratio):
            h = int(round(w / min(ratio)))
        elif width / height > max(ratio):
            w = int(round(h * max(ratio)))
        return (height - h) // 2, (width - w) // 2, h, w

    def _sample_policy(self) -> list[tuple[int, float]]:
        policy, operations = self.policy, []
        if policy.choice_weights is None:
            chosen = np.random.randint(0, len(policy.ops), policy.num_layers)  # what choice() draws, without its overhead
        else:
            chosen = np.random.choice(len(policy.ops), policy.num_layers, replace=False, p=policy.choice_weights)
        for op in (policy.ops[i] for i in chosen):
            if op.prob < 1.0 and random.random() > op.prob:
                continue
            magnitude = op.magnitude
            if op.magnitude_std == math.inf:
                magnitude = random.uniform(0, magnitude)
            elif op.magnitude_std > 0:
                magnitude = random.gauss(magnitude, op.magnitude_std)
            magnitude = max(0.0, min(magnitude, op.magnitude_max or 10.0))
            argument = op.level_fn(magnitude, op.hparams)[0] if op.level_fn is not None else 0
            if op.name in ("TranslateXRel", "TranslateYRel"):
                argument *= self.size[1 if op.name == "TranslateXRel" else 0]  # in pixels, as the other two
            operations.append((OPERATIONS[op.name], argument))
        return operations

    def _sample_jitter(self) -> list[tuple[int, float]]:
        order, *factors = transforms.ColorJitter.get_params(self.jitter.brightness, self.jitter.contrast, self.jitter.saturation, None)
        numbers = (BRIGHTNESS, CONTRAST, COLOR)
        return [(numbers[i], factors[i]) for i in order.tolist() if i < 3 and factors[i] is not None]

    def _sample_boxes(self) -> list[Box]:
        erasing, (height, width), boxes = self.erasing, self.size, []
        if random.random() > erasing.probability:
            return boxes
        count = erasing.min_count
        if erasing.min_count != erasing.max_count:
            count = random.randint(erasing.min_count, erasing.max_count)
        for _ in range(count):
            for _ in range(10):
                area = random.uniform(erasing.min_area, erasing.max_area) * (height * width) / count
                aspect = math.exp(random.uniform(*erasing.log_aspect_ratio))
                h, w = int(round(math.sqrt(area * aspect))), int(round(math.sqrt(area / aspect)))
                if w < width and h < height:
                    boxes.append((random.randint(0, height - h), random.randint(0, width - w), h, w))
                    break
        return boxes

    # -- parameters as rows of numbers, for the device -------------------------------------------------

    @property
    def max_operations(self) -> int:
        return (self.policy.num_layers if self.policy is not None else 0) + (3 if self.jitter is not None else 0)

    @property
    def max_boxes(self) -> int:
        return self.erasing.max_count if self.erasing is not None else 0

    @property
    def row_length(self) -> int:
        return _FLIPS + _OP * self.max_operations + _BOX * self.max_boxes + 1

    def pack(self, params: AugmentParams, noise: int) -> Tensor:
        """All parameters but the crop as one row (R,) float64: flips; operation and argument of each operation, -1 for none; boxes,
        zeros for none; and the seed of the noise that fills them, below 2**53."""
        row = np.zeros(self.row_length)
        row[:_FLIPS] = params.hflip, params.vflip
        row[_FLIPS:_FLIPS + _OP * self.max_operations:_OP] = -1
        for i, operation in enumerate(params.operations):
            row[_FLIPS + _OP * i:_FLIPS + _OP * (i + 1)] = operation
        first = _FLIPS + _OP * self.max_operations
        for i, box in enumerate(params.boxes):
            row[first + _BOX * i:first + _BOX * (i + 1)] = box
        row[-1] = noise
        return torch.from_numpy(row)

    def unpack(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The parts of packed rows (B, R): flips (B, 2), operations (B, L, 2), boxes (B, C, 4), noise seeds (B,)."""
        first = _FLIPS + _OP * self.max_operations
        return (rows[:, :_FLIPS], rows[:, _FLIPS:first].reshape(len(rows), self.max_operations, _OP),
                rows[:, first:-1].reshape(len(rows), self.max_boxes, _BOX), rows[:, -1])
