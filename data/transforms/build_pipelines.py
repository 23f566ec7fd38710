"""Which pipeline a config asks for, in training and in evaluation."""

from __future__ import annotations

import torch
from yacs.config import CfgNode

from config import ConfigError, input_channels
from data.decoding import nvjpeg
from data.messages import Notice
from data.transforms.build import build_eval_transform, build_train_transform, preprocessing
from data.transforms.encoded import EncodedTrainPipeline
from data.transforms.params import Augmentation, leave_out_colour
from data.transforms.pipeline import EvalPipeline, PillowPipeline, Pipeline, TrainPipeline


def build_train_pipeline(config: CfgNode, device: torch.device) -> tuple[Pipeline, list[str]]:
    """(the pipeline that DATA.DECODER, DATA.AUGMENT_ON and the policy ask for, messages for the user).

    Raises:
        ConfigError: augmentation or decoding is asked for on the device, which does not support all of it.
    """
    transform, where, channels = build_train_transform(config), config.DATA.AUGMENT_ON, input_channels(config)
    if config.DATA.DECODER == "pillow":
        if where == "device":
            raise ConfigError("DATA.AUGMENT_ON device cannot be used with DATA.DECODER pillow; set one of them to auto")
        return PillowPipeline(transform), []
    by_device = config.DATA.DECODER == "nvjpeg"
    if by_device and where == "worker":
        raise ConfigError("DATA.AUGMENT_ON worker cannot be used with DATA.DECODER nvjpeg; set one of them to auto")
    if by_device:
        nvjpeg.require(device)
    notices: list[str] = []
    try:
        if channels != 3 and (left_out := leave_out_colour(transform)):
            notices.append(Notice(f"left out of the augmentation, since it needs RGB: {', '.join(left_out)} (MODEL.IN_CHANS {channels})"))
        augmentation = Augmentation(transform)
    except LookupError as reason:
        if channels != 3:
            raise _needs_rgb(reason, channels) from None
        if where == "device" or by_device:
            asked = "DATA.DECODER is nvjpeg" if by_device else "DATA.AUGMENT_ON is device"
            raise ConfigError(f"{asked}, which does not support this augmentation ({reason.args[0]}); set it to auto, or take a "
                              "rand- policy in AUG.AUTO_AUGMENT") from None
        return PillowPipeline(transform), [Notice(f"this augmentation ({reason.args[0]}) is timm's own on Pillow, about half as fast "
                                                  "as that of a rand- policy")]
    on_device = by_device or where == "device" or (where == "auto" and device.type == "cuda")
    pipeline = EncodedTrainPipeline(augmentation) if by_device else TrainPipeline(augmentation, on_device)
    if pipeline.on_device and device.type == "cuda" and torch.cuda.is_available() and (reason := pipeline.finish.compile(device)):
        notices.append(Notice(f"augmentation on the device is one operation at a time, which slows training down: it needs Triton and a C "
                              f"compiler ({reason})"))
    return pipeline, notices


def build_eval_pipeline(config: CfgNode, device: torch.device, published: bool) -> tuple[Pipeline, list[str]]:
    """(the pipeline that DATA.DECODER asks for, messages for the user).

    Args:
        published: the weights were published by others: but for DATA.DECODER fast they get Pillow's pixels, as their authors evaluated.
    """
    transform = build_eval_transform(preprocessing(config))
    channels = input_channels(config)
    if config.DATA.DECODER == "pillow" or (published and config.DATA.DECODER != "fast" and channels == 3):
        return PillowPipeline(transform), []
    try:
        return EvalPipeline(transform, on_device=device.type == "cuda"), []
    except LookupError as reason:
        if channels != 3:
            raise _needs_rgb(reason, channels) from None
        return PillowPipeline(transform), [Notice(f"evaluation images are prepared by Pillow ({reason.args[0]})")]


def _needs_rgb(reason: LookupError, channels: int) -> ConfigError:
    return ConfigError(f"{reason.args[0]} is Pillow's, which does not prepare images of {channels} channels; set DATA.INTERPOLATION to "
                       "bicubic or bilinear")
