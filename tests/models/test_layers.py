"""Layers that several families share: the forms for a GPU have the plain form's values and gradients."""

from __future__ import annotations

import pytest
import torch
from gradients import close, gradients
from torch import Tensor

from models.layers import AddScaled, kept_samples


@pytest.mark.parametrize(("residual", "branch"), [(torch.float64, torch.float64), (torch.float32, torch.bfloat16),
                                                  (torch.bfloat16, torch.bfloat16)])
def test_scaled_branch_is_added_in_types_of_its_own(residual: torch.dtype, branch: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 4, 5).to(residual).requires_grad_(), torch.randn(6, 3, 4, 5).to(branch).requires_grad_()
    factor = kept_samples(0.5, x)

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() + y.double() * factor).to(residual)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(lambda x, y: AddScaled.apply(x, y, factor), x, y)
    assert [t.dtype for t in ours] == [residual, residual, branch]
    assert close(ours, gradients(plain, x, y), 1e-12 if residual == torch.float64 else 0.01)
    assert residual == torch.bfloat16 or torch.equal(ours[0], plain(x, y))


def test_drop_path_in_two_launches_has_the_same_distribution() -> None:
    torch.manual_seed(0)
    factor = kept_samples(0.25, torch.zeros(4000, 1, 1, 1, dtype=torch.bfloat16))
    assert factor.shape == (4000, 1, 1, 1) and factor.dtype == torch.float32
    assert set(factor.unique().tolist()) == {0.0, torch.tensor(1.0).div(0.75).item()} and factor.mean() == pytest.approx(1, abs=0.03)
