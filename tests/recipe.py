"""Weights and images that anyone can make again: the reference outputs in tests/reference were computed on them.

Every array is a standard normal stream whose seed is the CRC-32 of the array's name, so it depends on nothing else.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

PROBE_INPUT = 0.01  # factor on the images that go with ``eps_probe``


def _normal(name: str, shape: Sequence[int]) -> np.ndarray:
    return np.asarray(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)), dtype=np.float64)


def deterministic_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Weights by name, float32, scaled so that activations neither die nor explode."""
    state = {}
    for name, shape in shapes.items():
        x = _normal(name, shape)
        if x.ndim >= 2:
            x /= np.sqrt(x[0].size)
        elif name.endswith("running_var"):
            x = 1 + 0.1 * np.abs(x)
        elif name.endswith(".weight"):
            x = 1 + 0.1 * x
        else:
            x = 0.1 * x
        state[name] = x.astype(np.float32)
    return state


def deterministic_input(batch: int, channels: int, height: int, width: int) -> np.ndarray:
    """A batch of images, float32."""
    return _normal("input", (batch, channels, height, width)).astype(np.float32)


def eps_probe(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights with all 1-D arrays shrunk: activations become so small that the eps of every norm shows."""
    def factor(name: str, x: np.ndarray) -> float:
        return 1.0 if x.ndim >= 2 else 1e-4 if name.endswith("running_var") else 1e-2
    return {name: (x.astype(np.float64) * factor(name, x)).astype(np.float32) for name, x in state.items()}


def relative_error(ours: Tensor, reference: np.ndarray | Tensor) -> float:
    """Largest difference over the reference's largest value."""
    reference = torch.as_tensor(reference)
    return float((ours - reference).abs().max() / reference.abs().max())


def published_pvt_v2(name: str) -> str:
    """The published name of a tensor of timm's PVTv2."""
    name = re.sub(r"^patch_embed\.", "patch_embed1.", name)
    name = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d+)\.blocks\.", lambda m: f"block{int(m[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d+)\.norm\.", lambda m: f"norm{int(m[1]) + 1}.", name)
    return name.replace(".dwconv.", ".dwconv.dwconv.")


def published_swin(name: str) -> str:
    """The published name of a tensor of timm's Swin."""
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
    return name.replace("head.fc.", "head.")


def published_state(model: nn.Module, family: str) -> dict[str, Tensor]:
    """The state dict under the names of the family's published files."""
    rename = dict(pvt_v2=published_pvt_v2, swin=published_swin).get(family, str)
    return {rename(name): x for name, x in model.state_dict().items()}
