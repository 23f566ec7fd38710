"""The device's part of preparing a training batch, on noise: for the memory that it takes."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from data.loading.dataset import seed_generators
from data.transforms.build_pipelines import build_train_pipeline
from data.transforms.encoded import EncodedTrainPipeline, decode_crops
from data.transforms.pipeline import TrainPipeline

_USUAL = 500, 375  # width and height of most of ImageNet's files


def trial_images(config: CfgNode, images: int, device: torch.device) -> Tensor:
    """``images`` training images (B, C, H, W) float on ``device``, augmented there where the config has it so."""
    pipeline, _ = build_train_pipeline(config, device)
    if not isinstance(pipeline, TrainPipeline) or pipeline.finish is None:
        return torch.zeros(images, *pipeline.shape, device=device)
    seed_generators(config.SEED, (0, 0, 0))
    augmentation, (height, width, _) = pipeline.augmentation, pipeline.shape
    rows = torch.stack([augmentation.pack(augmentation.sample(width, height), number) for number in range(images)])
    if isinstance(pipeline, EncodedTrainPipeline):
        file = io.BytesIO()
        Image.effect_noise(_USUAL, 40).convert("RGB").save(file, "JPEG")
        data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        box = (0, 0, *reversed(_USUAL))
        crops, _ = decode_crops([data] * images, [box] * images, [(height, width)] * images, augmentation, device)
    else:
        crops = torch.randint(256, (images, *pipeline.shape), dtype=torch.uint8, device=device)
    return pipeline.finish(crops, rows)
