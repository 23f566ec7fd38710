"""Learning rates at the ends, groups, optimizers by name, losses."""

from __future__ import annotations

import io
import math
import sys
import warnings
from pathlib import Path

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from conftest import differences
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch import Tensor, nn

from config import ConfigError, config_from_text, get_config
from models.crossformer import CrossFormer
from models.dense import DenseModel
from models.pyramid import Pyramid
from utils.checkpoints.state import TrainState
from utils.commands.show_config import annotated
from utils.optim import optimizer as optim
from utils.optim.lr_schedule import Schedule, build_schedule, set_lr
from utils.tasks.classification import Classification

TINY = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2), group_size=(4, 4), interval=(2, 1), merge_size=((2, 4),), num_classes=3)


def schedule(*opts: object, steps: int = 10, batch: int = 512) -> Schedule:
    base = ["TRAIN.EPOCHS", "30", "TRAIN.WARMUP_EPOCHS", "5", "TRAIN.BASE_LR", "1.0", "TRAIN.WARMUP_LR", "0.01", "TRAIN.MIN_LR", "0.1"]
    return build_schedule(get_config(None, [*base, *map(str, opts)]), steps, batch)


@pytest.mark.parametrize("prefix", [True, False])
def test_cosine_is_timms(prefix: bool) -> None:
    """The pure function gives what Swin's and CrossFormer's trainers set, step by step."""
    ours = schedule("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", prefix)
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = CosineLRScheduler(torch.optim.SGD([parameter], lr=1.0), t_initial=250 if prefix else 300, lr_min=0.1, warmup_lr_init=0.01,
                               warmup_t=50, warmup_prefix=prefix, cycle_limit=1, t_in_epochs=False)
    for step in range(300):
        theirs.step_update(step)
        assert ours.lr_at(step) == pytest.approx(theirs.optimizer.param_groups[0]["lr"], rel=1e-9), step


def test_ends_and_shape() -> None:
    cosine = schedule("TRAIN.LR_SCHEDULER.WARMUP_PREFIX", "True")
    assert cosine.lr_at(0) == 0.01 and cosine.lr_at(50) == 1.0 and cosine.lr_at(175) == pytest.approx(0.55)
    assert cosine.lr_at(300) == pytest.approx(0.1) == cosine.lr_at(400)
    unshifted = schedule()  # CrossFormer's recipe
    assert unshifted.lr_at(50) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 6)))
    linear = schedule("TRAIN.LR_SCHEDULER.NAME", "linear", "TRAIN.LR_SCHEDULER.WARMUP_PREFIX", "True")
    assert [linear.lr_at(s) for s in (50, 175, 300)] == pytest.approx([1.0, 0.55, 0.1])
    step = schedule("TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 10)
    assert [step.lr_at(s) for s in (60, 99, 100, 200)] == pytest.approx([1, 1, 0.1, 0.01])
    multi = schedule("TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.MULTISTEPS", "[8, 20]", "TRAIN.LR_SCHEDULER.GAMMA", 0.5)
    assert [multi.lr_at(s) for s in (79, 80, 200)] == pytest.approx([1, 0.5, 0.25])
    assert schedule("TRAIN.WARMUP_EPOCHS", 0).lr_at(0) == 1.0
    swapped = schedule("TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.MULTISTEPS", "[20, 8]", "TRAIN.LR_SCHEDULER.GAMMA", 0.5)
    assert [swapped.lr_at(s) for s in (79, 80, 200)] == pytest.approx([1, 0.5, 0.25])


@pytest.mark.parametrize("power", [0.9, 1.0])
def test_poly_is_timms(power: float) -> None:
    ours = schedule("TRAIN.LR_SCHEDULER.NAME", "poly", "TRAIN.LR_SCHEDULER.POWER", power)
    theirs = PolyLRScheduler(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), t_initial=300, power=power, lr_min=0.1,
                             warmup_lr_init=0.01, warmup_t=50, cycle_limit=1, t_in_epochs=False)
    for step in range(300):
        theirs.step_update(step)
        assert ours.lr_at(step) == pytest.approx(theirs.optimizer.param_groups[0]["lr"], rel=1e-9), step
    assert ours.lr_at(300) == pytest.approx(0.1)


def test_warm_up_in_steps() -> None:
    config = get_config(None, ["TRAIN.WARMUP_STEPS", "7", "TRAIN.BASE_LR", "1", "TRAIN.WARMUP_LR", "0.3"])
    assert config.TRAIN.WARMUP_EPOCHS == 0 and config_from_text(config.dump()).TRAIN.WARMUP_STEPS == 7
    made = build_schedule(config, 10, 512)
    assert made.warmup_steps == 7 and [made.lr_at(step) for step in (0, 1, 7)] == pytest.approx([0.3, 0.4, made.lr_at(7)])
    with pytest.raises(ConfigError, match=r"TRAIN.WARMUP_STEPS is 7.*TRAIN.WARMUP_EPOCHS \(2\)"):
        get_config(None, ["TRAIN.WARMUP_STEPS", "7", "TRAIN.WARMUP_EPOCHS", "2"])


def test_rates_follow_the_global_batch() -> None:
    assert schedule(batch=1024).base == 2.0 and schedule(batch=64).floor == pytest.approx(0.0125)
    assert schedule("TRAIN.LR_BATCH", 0, batch=1024).base == 1.0


def test_groups_without_decay() -> None:
    model = CrossFormer(**TINY)
    groups = optim.parameter_groups(get_config(), model)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and not name.endswith("bias")), name
    model.no_weight_decay = lambda: {"head.weight"}
    groups = optim.parameter_groups(get_config(None, ["TRAIN.NO_DECAY", "['patch_embed.projs.*']"]), model)
    exempt = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {id(model.head.weight), id(model.patch_embed.projs[0].weight)} <= exempt
    with pytest.raises(ConfigError, match="TRAIN.NO_DECAY: 'no_such' fits no parameter"):
        optim.parameter_groups(get_config(None, ["TRAIN.NO_DECAY", "[no_such]"]), model)


class Dense(DenseModel):
    """A classifier without its head as the backbone, with norms of its own, and what stands on it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fpn = Pyramid(CrossFormer(**{**TINY, "num_classes": 0}), out_norm=True), nn.Linear(4, 4)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_backbones_share_of_the_rate(decay: float) -> None:
    model = Dense()
    model.backbone.model.no_weight_decay = lambda: {"patch_embed.projs.0.weight"}
    config = get_config(None, ["TRAIN.BACKBONE_LR", "0.1", "TRAIN.LAYER_DECAY", str(decay)])
    optimizer = optim.build_optimizer(config, model)
    set_lr(optimizer, 2.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert sorted(rates) == sorted(map(id, model.parameters()))
    assert rates[id(model.fpn.weight)] == 2.0 and rates[id(model.backbone.norms[0].weight)] == pytest.approx(0.2)
    inner = model.backbone.model
    first, last = inner.patch_embed.projs[0].weight, inner.layers[1].blocks[1].mlp.fc1.weight
    assert rates[id(last)] == pytest.approx(0.2 * decay)
    assert rates[id(first)] == pytest.approx(0.2) if decay == 1 else rates[id(first)] < 0.5 * rates[id(last)]
    assert id(first) in {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    lines = optim.layer_rates(optimizer, model, 2.0)
    assert lines[-1] == "learning rate 2 (x 1): fpn"
    assert lines[:-1] == ["learning rate 0.2 (x 0.1): backbone"] if decay == 1 else "patch_embed" in lines[0]


def test_a_model_without_a_backbone_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="TRAIN.BACKBONE_LR is 0.1, but crossformer_tiny has no part called backbone"):
        optim.parameter_groups(get_config(None, ["TRAIN.BACKBONE_LR", "0.1"]), CrossFormer(**TINY))


def test_layer_decay_scales_the_rate() -> None:
    model = CrossFormer(**TINY)
    optimizer = optim.build_optimizer(get_config(None, ["TRAIN.LAYER_DECAY", "0.5"]), model)
    set_lr(optimizer, 1.0)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rate[id(model.head.weight)] == 1.0 and rate[id(model.patch_embed.projs[0].weight)] == min(rate.values()) < 0.2


@pytest.mark.parametrize("name", ["adamw", "fused_adam", "fused_sgd", "fused_lamb"])
def test_optimizers_by_name_step(name: str) -> None:
    model = CrossFormer(**TINY)
    before = model.head.weight.clone()
    optimizer = optim.build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", name]), model)
    set_lr(optimizer, 0.1)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)
    if name == "adamw":
        assert optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.999)


class Mixed(nn.Module):
    """A kind of parameter each: of pixels, a table, a matrix of the middle, a norm, a classifier."""

    pretrained_cfg = dict(first_conv="stem", classifier="head")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc, self.norm, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 5)
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc(self.stem(x).flatten(2).mean(2) + self.table.mean(0))))


NOT_HERE = {"adahessian", "fusedadamw", "fusednovograd", *timm.optim.list_optimizers("bnb*")}  # second derivatives, or a GPU and a package


@pytest.mark.gpu(or_cpu=True)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in timm.optim.list_optimizers() if torch.cuda.is_available() or name not in NOT_HERE])
def test_every_optimizer_steps_and_resumes_to_the_same_bits(name: str) -> None:
    if "kron" in name:
        pytest.importorskip("opt_einsum")
    config = get_config(None, ["TRAIN.OPTIMIZER.NAME", name])

    def state() -> TrainState:
        model = Mixed()
        return TrainState(model, optim.build_optimizer(config, model), torch.amp.GradScaler(enabled=False))

    def step(state: TrainState) -> None:
        torch.manual_seed(state.step)
        set_lr(state.optimizer, 1e-3 * (state.step + 1))
        state.model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1

    whole, stopped = state(), state()
    before = whole.model.fc.weight.clone()
    for _ in range(2):
        step(whole)
    assert not torch.equal(before, whole.model.fc.weight)
    file = io.BytesIO()
    torch.save(dict(whole.state_dict(), steps_per_epoch=9), file)
    file.seek(0)
    stopped.load_state_dict(torch.load(file, weights_only=True), "file")
    step(whole)
    step(stopped)
    assert differences(whole.model.state_dict(), stopped.model.state_dict()) == []


@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_the_others_are_a_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=f"TRAIN.OPTIMIZER.NAME is {name}|TRAIN.OPTIMIZER.NAME {name} cannot"):
        optim.build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", name]), Mixed())


def test_kron_without_opt_einsum_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.optim.kron.has_opt_einsum", False)
    with pytest.raises(ConfigError, match="pip install opt_einsum"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optim.build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", "kron"]), Mixed())


@pytest.mark.parametrize(("opts", "matrices"), [
    ([], {"fc.weight"}), (["TRAIN.LAYER_DECAY", "0.9"], {"fc.weight"}),
    (["TRAIN.OPTIMIZER.ARGS", "{fallback_list: ['f*', head.weight]}"], {"stem.weight", "table"})])
def test_muon_is_for_matrices_between_features(opts: list[str], matrices: set[str]) -> None:
    model = Mixed()
    optimizer = optim.build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", "nmuon", *opts]), model)
    fallback = {id(p) for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]}
    assert {name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in fallback} == matrices


def test_arguments_of_the_optimizers_own(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("TRAIN: {OPTIMIZER: {NAME: muon, ARGS: {ns_steps: 4, eps: 1e-5, betas: [0.8, 0.9], momentum: 0.5}}}")
    config = get_config(str(tmp_path / "a.yaml"))
    again = config_from_text(config.dump())
    assert again.TRAIN.OPTIMIZER.ARGS == config.TRAIN.OPTIMIZER.ARGS
    assert "ARGS: {betas: [0.8, 0.9], eps: 1.0e-05" in "".join(annotated(again))
    group = optim.build_optimizer(again, Mixed()).param_groups[0]
    assert [group[key] for key in ("ns_steps", "eps", "betas", "momentum")] == [4, 1e-5, (0.8, 0.9), 0.5]
    for text, words in (("{lr: 1}", "lr is the key TRAIN.BASE_LR"), ("{nosuch: 1}", "takes no nosuch; it takes adamw_lr.*fallback_list"),
                        ("{ns_coefficients: odd}", "cannot be made here with TRAIN.OPTIMIZER.ARGS"), ("[1]", "takes a mapping"),
                        ("{a: 1", "takes a mapping"), ("{eps: {a: 1}}", "takes a mapping of names to numbers")):
        with pytest.raises(ConfigError, match=words):
            optim.build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", "muon", "TRAIN.OPTIMIZER.ARGS", text]), Mixed())


def test_a_fused_form_that_a_device_refuses_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Adagrad's on CUDA in torch 2.11: accepted when it is made, refused in the first step."""
    def refuse(parameter: Tensor, **_: object) -> None:
        raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")

    config = get_config(None, ["TRAIN.OPTIMIZER.NAME", "adagrad"])
    assert optim.skips_on_device(optim.build_optimizer(config, Mixed()))
    monkeypatch.setattr(sys.modules["torch.optim.adagrad"], "_device_dtype_check_for_fused", refuse)
    optim.has_fused_form.cache_clear()
    try:
        model = Mixed()
        optimizer = optim.build_optimizer(config, model)
        before = model.head.weight.clone()
        model(torch.randn(2, 3, 4, 4)).sum().backward()
        optimizer.step()
        assert not optim.skips_on_device(optimizer) and not torch.equal(before, model.head.weight)
        assert optim.skips_on_device(optim.build_optimizer(get_config(None, []), model))  # AdamW's is
        with pytest.raises(ConfigError, match="TRAIN.OPTIMIZER.ARGS"):
            optim.build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", "adagrad", "TRAIN.OPTIMIZER.ARGS", "{fused: true}"]), model)
    finally:
        optim.has_fused_form.cache_clear()


@pytest.mark.parametrize(("there", "here"), [(None, True), (True, None)])
def test_the_state_of_an_optimizer_goes_over_to_its_other_form(there: bool | None, here: bool | None) -> None:
    """A checkpoint may come from a device with another form of the optimizer; each keeps its count of steps in a way of its own."""
    def stepped(fused: bool | None, start: TrainState | None = None) -> TrainState:
        model = Mixed()
        optimizer = torch.optim.Adagrad(model.parameters(), fused=fused)
        state = TrainState(model, optimizer, torch.amp.GradScaler(enabled=False))
        if start is not None:
            state.load_state_dict(dict(start.state_dict(), steps_per_epoch=9), "file")
        model(torch.ones(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        return state

    seen, load = [], torch.optim.Adagrad.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adagrad, "load_state_dict", lambda self, kept: seen.append(kept) or load(self, kept))
        other = stepped(here, stepped(there))
    assert seen[0]["param_groups"][0]["fused"] is other.optimizer.param_groups[0]["fused"] is here
    twice = stepped(here, stepped(here))
    for one, two in zip(other.model.parameters(), twice.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_sgd_without_momentum_is_made() -> None:
    config = get_config(None, ["TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", "0"])
    optimizer = optim.build_optimizer(config, CrossFormer(**TINY))
    assert optimizer.defaults["momentum"] == 0 and not optimizer.defaults["nesterov"]


def test_an_optimizer_that_cannot_be_made_here_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm knows optimizers of packages that are not here (bitsandbytes, apex); asserts of its own say so."""
    def missing(*_: object, **__: object) -> None:
        raise AssertionError("bitsandbytes is not installed")
    monkeypatch.setattr("timm.optim.get_optimizer_class", missing)
    with pytest.raises(ConfigError, match="TRAIN.OPTIMIZER.NAME bnblion .*bitsandbytes"):
        optim.build_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", "bnblion"]), CrossFormer(**TINY))


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean .*adamw"):
        optim.check_optimizer(get_config(None, ["TRAIN.OPTIMIZER.NAME", "adamww"]))


def test_the_indexs_apex_is_not_nvidias(tmp_path, monkeypatch) -> None:
    """A package of that name without apex.optimizers is told from the real one."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("amp = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = get_config(None, ["TRAIN.OPTIMIZER.NAME", "fused_adam", "FUSED_LAYERNORM", "True"])
    assert len(optim.apex_notices(config)) == 2
    assert isinstance(optim.build_optimizer(config, CrossFormer(**TINY)), torch.optim.AdamW)
    (tmp_path / "apex/optimizers.py").write_text("import torch\nclass FusedAdam(torch.optim.Adam):\n    pass\n")
    (tmp_path / "apex/normalization.py").write_text("import torch\nclass FusedLayerNorm(torch.nn.LayerNorm):\n    pass\n")
    for name in [n for n in __import__("sys").modules if n == "apex" or n.startswith("apex.")]:
        monkeypatch.delitem(__import__("sys").modules, name)
    assert optim.apex_notices(config) == []
    assert type(optim.build_optimizer(config, CrossFormer(**TINY))).__name__ == "FusedAdam"
    from models import build_model
    model = build_model(get_config(None, ["FUSED_LAYERNORM", "True"]), 3)
    assert type(model.norm).__name__ == "FusedLayerNorm"
    for name in [n for n in __import__("sys").modules if n == "apex" or n.startswith("apex.")]:
        monkeypatch.delitem(__import__("sys").modules, name)


def test_loss_smooths_hard_targets_only() -> None:
    logits, hard = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    task = Classification(get_config(None, ["MODEL.LABEL_SMOOTHING", "0.1"]))
    assert torch.allclose(task.loss(logits, (None, hard)), F.cross_entropy(logits, hard, label_smoothing=0.1) * 6)
    soft = F.one_hot(hard, 4).float()
    assert torch.allclose(task.loss(logits, (None, soft)), -(soft * logits.log_softmax(1)).sum())
