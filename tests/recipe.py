"""Weights and images that anyone can make again: the reference outputs in tests/reference were computed on them.

Every array is a standard normal stream whose seed is the CRC-32 of the array's name, so it depends on nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import timm
import torch
from timm.optim import param_groups_weight_decay
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


def off(ours: Tensor, reference: np.ndarray) -> float:
    """Largest difference over the reference's largest value."""
    return float(np.abs(ours.numpy() - reference).max() / np.abs(reference).max())


def check_names_and_counts(name: str, parameters: int, decayed: int, keys: int, digest: int) -> None:
    """A variant's parameters, those that are decayed, and its state dict's keys with their shapes, of which ``digest`` is the CRC-32."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = model.state_dict()
    assert len(state) == keys
    assert zlib.crc32("".join(f"{key} {list(x.shape)}\n" for key, x in state.items()).encode()) == digest
    plain, decay = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert plain["weight_decay"] == 0 and sum(p.numel() for p in plain["params"]) == parameters - decayed
    assert sum(p.numel() for p in decay["params"]) == decayed
    for module in (model.default_cfg["classifier"], model.default_cfg["first_conv"]):
        assert isinstance(model.get_submodule(module), (nn.Linear, nn.Conv2d))
