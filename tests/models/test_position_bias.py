"""Relative position biases: offsets, gradients, and the cache of evaluation, which is never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from gradients import gradients
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from models import position_bias
from models.crossformer import CrossFormer
from models.position_bias import DynamicPositionBias, RelativePositionBias, _BiasOfPairs, relative_index, relative_offsets


def tiny() -> CrossFormer:
    torch.manual_seed(0)
    return CrossFormer(embed_dim=32, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),),
                       num_classes=5, drop_path_rate=0.0)


def test_offsets_and_index_agree() -> None:
    group = 4
    offsets = relative_offsets(group, torch.device("cpu"))[relative_index(group, torch.device("cpu"))]
    position = [(i // group, i % group) for i in range(group * group)]
    expected = [[a[0] - b[0], a[1] - b[1]] for a in position for b in position]
    assert offsets.tolist() == expected


@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_bias_of_pairs_has_the_gradient_of_a_selection(group: int) -> None:
    index, tokens = relative_index(group, torch.device("cpu")), group * group

    def select(table: Tensor) -> Tensor:
        return table.index_select(0, index).view(tokens, tokens, -1).permute(2, 0, 1)

    def pairs(table: Tensor) -> Tensor:
        return _BiasOfPairs.apply(table, group, table.dtype)

    table = torch.randn((2 * group - 1) ** 2, 3, dtype=torch.float64, requires_grad=True)
    ours, plain = gradients(pairs, table), gradients(select, table)
    assert torch.equal(ours[0], plain[0]) and torch.allclose(ours[1], plain[1])


def test_position_bias_is_computed_once_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny().eval(), []
    inner = RelativePositionBias.bias
    monkeypatch.setattr(RelativePositionBias, "bias", lambda self, *args: calls.append(1) or inner(self, *args))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 3  # one a block


def test_cached_position_bias_is_never_stale() -> None:
    """Whatever happens to the weights, evaluation gives what a model without the cache gives."""
    def changed(p: nn.Parameter) -> None:
        p.data.mul_(1.5)

    def stepped(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()

    def averaged(model: nn.Module) -> None:
        ours = [p.data for p in model.parameters()]
        torch._foreach_lerp_(ours, [torch.ones_like(p) for p in ours], 0.5)

    model = tiny().eval()
    other = {name: 0.9 * x for name, x in model.state_dict().items()}
    events = [lambda m: m.load_state_dict(other), lambda m: [changed(p) for p in m.parameters()], stepped, averaged,
              lambda m: m.train(), lambda m: m.eval(), lambda m: m.load_state_dict({k: x + 0.1 for k, x in other.items()}, assign=True)]
    names, x = list(model.state_dict()), torch.randn(2, 3, 40, 40)
    before = None
    for event in events:
        event(model)
        for side in (slice(None), slice(0, 16), slice(None)):  # another size has other groups
            image = x[..., side]
            with torch.inference_mode():
                ours = model(image)
            with torch.no_grad():
                again = model(image)
            fresh = tiny().train(model.training)
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(ours, again) and torch.allclose(ours, fresh(image), atol=1e-6)
        assert before is None or event in events[4:6] or not torch.allclose(before, ours)
        before = ours
    model.eval()
    with torch.no_grad():
        model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(x)
        # Converted once, then cached.
        assert {m._cached[2].dtype for m in model.modules() if isinstance(m, RelativePositionBias)} == {torch.bfloat16}
        assert list(model.state_dict()) == names
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        assert all(m._cached is None for m in copy.deepcopy(model).modules() if isinstance(m, RelativePositionBias))
        assert torch.allclose(model.double()(x.double()).float(), twin(x), atol=1e-5)
    assert low.isfinite().all()
    model.float()(x).sum().backward()  # and back in training, everything has a gradient
    assert all(p.grad is not None for p in model.layers[0].blocks[0].attn.pos.parameters())


def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU takes the steps of a GPU when it is given as device; the list fills with the constants that are made."""
    made = []
    for name in ("relative_offsets", "relative_index"):
        real = getattr(position_bias, name)
        monkeypatch.setattr(position_bias, name,
                            lambda group, _, real=real, name=name: made.append(name) or real(group, torch.device("cpu")))
    return made


def test_rows_of_a_bias_are_aligned_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin at multiples of 8 numbers."""
    dpb = DynamicPositionBias(2, 2)
    plain = dpb.bias(7, torch.device("cpu"))
    as_if_on_cuda(monkeypatch)
    aligned = dpb.bias(7, torch.device("cuda"))
    assert torch.equal(aligned, plain) and aligned.stride() == (49 * 56, 56, 1)


def test_constants_are_made_once_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a group and type, usable in training though evaluation made them, and never mixed with those of a fake or traced model."""
    cuda, dpb = torch.device("cuda"), DynamicPositionBias(2, 2)
    plain = {group: dpb.bias(group, torch.device("cpu")) for group in (4, 7)}
    made = as_if_on_cuda(monkeypatch)
    with torch.inference_mode():
        dpb.bias(7, cuda)
    for group in (7, 4, 7, 4):
        assert torch.equal(dpb.bias(group, cuda), plain[group])
    assert len(made) == 4
    dpb.bias(7, cuda).sum().backward()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {f"dpb.{name}": mode.from_tensor(p) for name, p in dpb.named_parameters()}
        assert isinstance(torch.func.functional_call(BiasOf(dpb), fake, (7,)), FakeTensor)
    assert type(dpb.bias(7, cuda)) is Tensor
    assert torch.equal(torch.compile(BiasOf(dpb), fullgraph=True, backend="aot_eager")(7), plain[7])
    assert torch.allclose(dpb.double().bias(7, cuda).float(), plain[7])
    assert not copy.deepcopy(dpb)._pairs


class BiasOf(nn.Module):
    def __init__(self, dpb: DynamicPositionBias) -> None:
        super().__init__()
        self.dpb = dpb

    def forward(self, group: int) -> Tensor:
        return self.dpb.bias(group, torch.device("cuda"))
