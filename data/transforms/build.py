"""timm's transforms from an image to a tensor: augmentation for training, resize and crop for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import CenterCropOrPad
from yacs.config import CfgNode

from config import ConfigError, image_size, input_channels
from data.transforms.fit import ProportionalCrop, ResizeInside, mean_colour


def preprocessing(config: CfgNode) -> dict[str, Any]:
    """How evaluation prepares an image, as plain data that a checkpoint carries.

    Normalisation, interpolation and crop of a timm model are those that its authors published, unless the config says
    otherwise; of other channels than RGB no published values fit, and a run measures them (``data/sources/channel_statistics.py``).

    Raises:
        ConfigError: the timm model has no weights of the tag in ``MODEL.NAME``.
    """
    published: Any = None
    if config.MODEL.TYPE == "timm":
        import timm
        try:
            published = timm.get_pretrained_cfg(config.MODEL.NAME) if timm.is_model(config.MODEL.NAME) else None
        except RuntimeError:
            name, _, tag = config.MODEL.NAME.partition(".")
            known = [n.partition(".")[2] for n in timm.list_pretrained(name + ".*")]
            raise ConfigError(f"MODEL.NAME: timm's {name} has no weights tagged {tag!r}; leave the tag out"
                              + (f", or choose from {', '.join(known)}" if known else "")) from None
    (height, width), channels = image_size(config), input_channels(config)
    usual = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    mean, std = (getattr(published, "mean", None), getattr(published, "std", None)) if channels == 3 else (None, None)
    crop_mode = dict(squash="squash", pad="border").get(config.DATA.FIT, "center" if config.TEST.CROP else "squash")
    return dict(
        input_size=[channels, height, width],
        interpolation=config.DATA.INTERPOLATION or getattr(published, "interpolation", None) or "bicubic",
        mean=list(config.DATA.MEAN or mean or usual[0]),
        std=list(config.DATA.STD or std or usual[1]),
        crop_pct=(getattr(published, "crop_pct", None) or 224 / 256) if crop_mode == "center" else 1.0,
        crop_mode=crop_mode,
        **(dict(window=list(config.DATA.WINDOW)) if config.DATA.WINDOW else {}),
    )


def build_eval_transform(prepare: dict[str, Any]) -> Callable[[Image.Image], Any]:
    """The transform that ``preprocessing`` describes: from a PIL image to a normalised float tensor (3, H, W)."""
    interpolation = "bicubic" if prepare["interpolation"] == "random" else prepare["interpolation"]
    transform = create_transform(
        input_size=tuple(prepare["input_size"]), is_training=False, mean=tuple(prepare["mean"]), std=tuple(prepare["std"]),
        interpolation=interpolation,
        crop_pct=prepare["crop_pct"], crop_mode=prepare["crop_mode"])
    if prepare["crop_mode"] == "border":
        size = tuple(prepare["input_size"][1:])
        transform.transforms[:2] = ResizeInside(size, 1.0, interpolation), CenterCropOrPad(size, mean_colour(prepare["mean"]))
    return transform


def build_train_transform(config: CfgNode) -> Callable[[Image.Image], Any]:
    """timm's training transform, from a PIL image to a normalised float tensor (3, H, W): random crop, flips, RandAugment or colour
    jitter, normalisation, erasing.

    Raises:
        ConfigError: ``AUG.AUTO_AUGMENT`` is not a policy of timm's.
    """
    prepare, aug = preprocessing(config), config.AUG
    policy = None if aug.AUTO_AUGMENT.lower() in ("", "none") else aug.AUTO_AUGMENT
    try:
        transform = create_transform(
            input_size=tuple(prepare["input_size"]), is_training=True, auto_augment=policy,
            color_jitter=aug.COLOR_JITTER or None, scale=tuple(aug.SCALE), ratio=tuple(aug.RATIO), hflip=aug.HFLIP,
            vflip=aug.VFLIP, interpolation=prepare["interpolation"], mean=tuple(prepare["mean"]), std=tuple(prepare["std"]),
            re_prob=aug.REPROB, re_mode=aug.REMODE, re_count=aug.RECOUNT)
    except (AssertionError, ValueError, KeyError, IndexError):
        raise ConfigError(f"AUG.AUTO_AUGMENT is {aug.AUTO_AUGMENT!r}; give a timm policy such as "
                          "rand-m9-mstd0.5-inc1, augmix-m3-w3, original or none") from None
    _patch_operations(transform)
    if config.DATA.FIT != "crop":
        transform.transforms[0] = ProportionalCrop(transform.transforms[0],
                                                   mean_colour(prepare["mean"]) if config.DATA.FIT == "pad" else None)
    return transform


def _posterize_with_zero_bits(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    # Pillow from 13 on refuses 0 bits, which timm's increasing posterize asks for about once in 650 images; older Pillow
    # returned the black image that 0 bits mean.
    if bits_to_keep <= 0:
        return Image.fromarray(np.zeros_like(np.asarray(image)), image.mode)
    return posterize(image, bits_to_keep)


def _patch_operations(transform: Any) -> None:
    """Replace timm's posterize by the one above wherever a policy holds it; turn and shear by bicubic where Lanczos resizes: Pillow
    knows no affine transform by it."""
    if isinstance(transform, AugmentOp):
        if transform.aug_fn is posterize:
            transform.aug_fn = _posterize_with_zero_bits
        if transform.kwargs.get("resample") == Image.Resampling.LANCZOS:
            transform.kwargs["resample"] = Image.Resampling.BICUBIC
    elif isinstance(transform, (list, tuple)):
        for part in transform:
            _patch_operations(part)
    else:
        for attribute in ("transforms", "ops", "policy"):
            if hasattr(transform, attribute):
                _patch_operations(getattr(transform, attribute))
