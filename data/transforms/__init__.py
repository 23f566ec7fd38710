"""Crops, RandAugment, random erasing and mixup, on DataLoader workers or on the device."""
