"""What training steps took on a GPU, where one was at hand: to compare the roofline with."""

from __future__ import annotations

# Measured 2026-11-27 on one NVIDIA H200 with 16 slow virtual cores, torch 2.11, bf16, batch 256, eager, without mixup, at commit COMMIT.
COMMIT = "0bcd31b"
IMAGES_PER_SECOND = {"crossformer_small": 2831.0, "shunted_s": 1494.0, "mpvit_small": 818.0, "cvt_13": 3048.0, "pvt_small": 2903.0,
                     "swin_tiny": 2303.0}

# Of crossformer_small: milliseconds of kernels a step, by the operation that launched them (in place or not), and all launches.
MODEL, BATCH = "crossformer_small", 256
LAUNCHES, MILLISECONDS = 1874, 88.05
BY_OPERATION = {
    "copy": 13.648, "native_layer_norm": 10.889, "native_layer_norm_backward": 10.385, "mm": 8.850, "convolution_backward": 7.695,
    "_efficient_attention_backward": 6.859, "sum": 5.855, "addmm": 5.189, "_efficient_attention_forward": 3.408, "add": 2.771,
    "gelu_backward": 2.588, "convolution": 1.941, "gelu": 1.911, "addcmul": 1.790, "cat": 1.735, "mul": 1.581, "_fused_adamw": 0.4}
