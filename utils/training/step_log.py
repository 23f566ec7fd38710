"""The lines and the live line of training."""

from __future__ import annotations

import math


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
