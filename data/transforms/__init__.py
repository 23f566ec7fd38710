"""Crops, RandAugment, random erasing and mixup, on workers and on the device."""
