"""Guard, EMA, optimizers, schedules, sources: each against values by hand."""

import builtins
import math

import pytest
import torch
from torch import nn

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.errors import UserError
from diffalign.plane.source import TensorSource
from diffalign.training import optimizers
from diffalign.training.ema import Ema
from diffalign.training.guard import GradientGuard
from diffalign.training.optimizers import Schedule, base_learning_rate, build, page_again
from tests.training.toys import Probe, Trial, pairs, same, weights


def test_the_guard_by_hand():
    guard = GradientGuard(factor=3.0, warmup=4)
    assert [guard.skips(n) for n in (1.0, 100.0, 1.0, 2.0)] == [False] * 4, (
        "nothing is skipped in the warm-up"
    )
    assert guard.mean == pytest.approx(26.0)  # arithmetic
    assert not guard.skips(77.9)  # the threshold is 78
    assert guard.mean == pytest.approx(26.0 + (77.9 - 26.0) / 4)
    threshold = 3 * guard.mean
    assert guard.skips(1e9)
    assert guard.mean == pytest.approx(threshold / 3 + (threshold - threshold / 3) / 4), (
        "a spike counts capped"
    )


def test_the_guard_accepts_a_lasting_change_of_level():
    guard = GradientGuard(factor=3.0, warmup=5)
    for _ in range(10):
        assert not guard.skips(1.0)
    skipped = [guard.skips(20.0) for _ in range(30)]
    assert skipped[0]
    assert not skipped[-1]
    assert 1 <= sum(skipped) < 10


def test_the_guard_off_and_after_zeros():
    assert not any(GradientGuard(factor=0.0, warmup=1).skips(10.0**n) for n in range(9))
    guard = GradientGuard(factor=2.0, warmup=2)
    assert not any(guard.skips(n) for n in (0.0, 0.0, 5.0)), "a mean of 0 judges nothing"


def test_the_guard_continues():
    one, two = GradientGuard(factor=3.0), GradientGuard(factor=3.0)
    for n in range(30):
        one.skips(1.0 + n % 3)
    two.load_state_dict(one.state_dict())
    assert [one.skips(n) for n in (1.0, 50.0, 2.0)] == [two.skips(n) for n in (1.0, 50.0, 2.0)]
    assert one == two


def test_ema_by_hand():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    ema = Ema([("p", p)], decay=0.75)
    for value in (2.0, 4.0):
        p.data.fill_(value)
        ema.update()
    # 0.75 (0.75 * 1 + 0.25 * 2) + 0.25 * 4 = 1.9375; 0.75 (0.75 * -2 + 0.5) + 1 = 0.25
    expected = torch.tensor([1.9375, 0.25])
    assert torch.equal(ema.state_dict()["p"], expected)
    assert ema.state_dict()["p"].dtype == torch.float32
    with ema.swapped_in():
        assert torch.equal(p.detach(), expected.double())
    assert torch.equal(p.detach(), torch.full((2,), 4.0, dtype=torch.float64))


def test_ema_gives_the_parameters_back_after_an_error():
    p = nn.Parameter(torch.ones(2))
    ema = Ema([("p", p)], decay=0.5)
    p.data.fill_(3.0)
    with pytest.raises(RuntimeError, match="while sampling"), ema.swapped_in():
        raise RuntimeError("while sampling")
    assert torch.equal(p.detach(), torch.full((2,), 3.0))


def test_a_run_keeps_the_ema_of_the_steps_it_took():
    seen = []
    trial = Trial(settings=TrainingConfig(steps=4, batch_size=4, ema_decay=0.9), ties=())
    start = {n: p.detach().float() for n, p in trial.network.named_parameters()}
    trial.hooks = [Probe(lambda state: seen.append(weights(state)))]
    state = trial.run()
    for name, average in state.ema.state_dict().items():
        expected = start[name].clone()
        for step in seen:
            expected.lerp_(step[name].float(), 1.0 - 0.9)
        assert torch.equal(average, expected)
    state.network.train()
    with state.evaluating():
        assert torch.equal(weights(state)["layers.0.bias"].float(), state.ema.state_dict()["layers.0.bias"])
        assert not state.network.training
        assert not torch.is_grad_enabled()
    with state.evaluating(averaged=False):
        assert same(weights(state), seen[-1])
    assert same(weights(state), seen[-1])
    assert state.network.training


def test_adamw_is_fused_and_steps_as_torch_does():
    p = [nn.Parameter(torch.tensor([1.0, 2.0]))]
    config = OptimizerConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    optimizer = build(p, config, 0.5)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]
    p[0].grad = torch.tensor([3.0, -4.0])
    optimizer.step()
    # decoupled decay, then lr * sign(g) in the first step: 1 (1 - .05) - .5, 2 (1 - .05) + .5
    torch.testing.assert_close(p[0].detach(), torch.tensor([0.45, 2.4]), atol=1e-5, rtol=0)


def test_adafactor_as_published():
    from transformers.optimization import Adafactor

    p = [nn.Parameter(torch.full((4, 4), 2.0))]
    optimizer = build(p, OptimizerConfig(type="adafactor", weight_decay=0.0), 0.25)
    assert isinstance(optimizer, Adafactor)
    group = optimizer.param_groups[0]
    assert (group["scale_parameter"], group["relative_step"], group["warmup_init"]) == (False, False, False)
    assert group["clip_threshold"] == 1.0
    p[0].grad = torch.full((4, 4), 7.0)
    optimizer.step()
    # A constant gradient over its own root mean square is 1: the step is lr, not lr * rms(parameter).
    torch.testing.assert_close(p[0].detach(), torch.full((4, 4), 1.75))


def test_8bit_adamw_without_its_package(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        build([nn.Parameter(torch.ones(2))], OptimizerConfig(type="adamw8bit"), 1e-3)


@pytest.mark.parametrize("kind", ["paged_adamw", "paged_adamw8bit"])
def test_a_paged_optimizer_on_a_cpu_is_refused(kind):
    with pytest.raises(UserError, match=rf"optimizer.type={kind} on a CPU.* allowed: {kind[6:]}, or a GPU"):
        build([nn.Parameter(torch.ones(2))], OptimizerConfig(type=kind), 1e-3)


@pytest.mark.parametrize(
    ("kind", "name", "bits"),
    [
        ("adamw8bit", "AdamW8bit", 8),
        ("paged_adamw", "PagedAdamW", 32),
        ("paged_adamw8bit", "PagedAdamW8bit", 8),
    ],
)
def test_settings_reach_the_optimizer_of_bitsandbytes(monkeypatch, kind, name, bits):
    optim = pytest.importorskip("bitsandbytes").optim
    monkeypatch.setattr(optimizers, "check_device", lambda kind, device: None)
    config = OptimizerConfig(type=kind, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    optimizer = build([nn.Parameter(torch.ones(2))], config, 0.5)
    assert type(optimizer) is getattr(optim, name)
    assert optimizer.is_paged == kind.startswith("paged") and optimizer.args.optim_bits == bits
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [0.5, (0.8, 0.9), 1e-6, 0.1]


@pytest.mark.parametrize("paged", [True, False])
def test_loaded_moments_are_paged_again(paged):
    """Bitsandbytes' own load leaves them in plain memory."""

    class Optimizer:
        def __init__(self, parameter):
            self.is_paged = paged
            self.state = {
                parameter: {
                    "step": 3,
                    "state1": torch.arange(2.0),
                    "state2": torch.tensor([5, 6], dtype=torch.uint8),
                }
            }

        def get_state_buffer(self, parameter, dtype):
            buffer = torch.zeros_like(parameter, dtype=dtype)
            buffer.is_paged = True
            return buffer

    parameter = torch.zeros(2)
    optimizer = Optimizer(parameter)
    page_again(optimizer)
    moments = optimizer.state[parameter]
    assert [getattr(moments[name], "is_paged", False) for name in ("state1", "state2")] == [paged, paged]
    assert (moments["state1"].tolist(), moments["state2"].tolist(), moments["step"]) == ([0, 1], [5, 6], 3)
    assert moments["state2"].dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory is CUDA's")
@pytest.mark.parametrize("kind", ["paged_adamw", "paged_adamw8bit"])
def test_a_paged_optimizer_steps_and_stays_paged_after_loading(kind):
    pytest.importorskip("bitsandbytes")
    parameter = nn.Parameter(torch.ones(512, 256, device="cuda"))
    optimizer = build([parameter], OptimizerConfig(type=kind), 1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["state1"].is_paged and float(parameter.detach().max()) < 1
    other = build([parameter], OptimizerConfig(type=kind), 1e-3)
    other.load_state_dict(optimizer.state_dict())
    page_again(other)
    assert other.state[parameter]["state1"].is_paged
    assert torch.equal(other.state[parameter]["state1"], optimizer.state[parameter]["state1"])


def test_unknown_optimizer_and_schedule():
    with pytest.raises(UserError, match=r"unknown optimizer.type 'adam'; did you mean .*adamw"):
        build([nn.Parameter(torch.ones(2))], OptimizerConfig(type="adam"), 1e-3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown optimizer.schedule 'cosin'; did you mean cosine"):
        Schedule("cosin", 1.0, 0, 10)
    with pytest.raises(UserError, match="warmup_steps=-1"):
        Schedule("cosine", 1.0, -1, 10)


def test_schedules_by_hand():
    assert [Schedule("constant", 2.0, 4, 10)(s) for s in (0, 1, 3, 4, 9)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    linear = Schedule("linear", 1.0, 2, 10)
    assert [linear(s) for s in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, pytest.approx(0.125)]
    restarts = Schedule("cosine_with_restarts", 1.0, 0, 8, cycles=2)
    assert [restarts(s) for s in (0, 2, 4, 6)] == pytest.approx([1.0, 0.5, 1.0, 0.5])
    polynomial = Schedule("polynomial", 2.0, 2, 10, power=2.0)
    assert [polynomial(s) for s in (0, 2, 6, 8)] == pytest.approx([1.0, 2.0, 0.5, 0.125])
    cosine = Schedule("cosine", 1.0, 0, 8)
    assert [cosine(s) for s in (0, 4, 6)] == [
        1.0,
        pytest.approx(0.5),
        pytest.approx((1 - math.sqrt(0.5)) / 2),
    ]


def test_scale_lr_is_by_the_global_batch():
    settings = TrainingConfig(batch_size=2, accumulation=8)
    assert base_learning_rate(
        OptimizerConfig(learning_rate=1e-8, scale_lr=True), settings, 4
    ) == pytest.approx(64e-8)
    assert base_learning_rate(OptimizerConfig(learning_rate=1e-8), settings, 4) == 1e-8


def test_the_schedule_reaches_the_optimizer():
    rates = []
    trial = Trial(
        settings=TrainingConfig(steps=4, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2),
    )
    trial.hooks = [
        Probe(lambda s: rates.append((s.optimizer.param_groups[0]["lr"], s.averages()["learning_rate"])))
    ]
    trial.run()
    assert rates == [(0.5, 0.5), (1.0, 1.0), (1.0, 1.0), (0.5, 0.5)]


def groups_of(batch):
    """Which of the set's pairs a batch holds, told by their x."""
    x = pairs()["x"]
    return [int((x == pair).flatten(1).all(1).nonzero()) for pair in batch.x.unflatten(0, (-1, 2))]


def test_the_source_visits_every_group_once_an_epoch_in_a_new_order():
    source = TensorSource(**pairs(), batch_size=5, seed=2)  # 24 pairs: batches run over the end of an epoch
    batches = iter(source)
    drawn = [g for _ in range(24) for g in groups_of(next(batches))]
    epochs = [drawn[i : i + 24] for i in range(0, 120, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    other = groups_of(TensorSource(**pairs(), batch_size=5, seed=3).batch(0))
    assert other != drawn[:5]


def test_the_source_is_the_same_however_it_is_split():
    whole = TensorSource(**pairs(), batch_size=12, seed=2)
    drawn = [g for m in range(5) for g in groups_of(whole.batch(m))]
    ranks = [TensorSource(**pairs(), batch_size=3, rank=r, world=2, seed=2) for r in range(2)]
    assert [g for m in range(10) for rank in ranks for g in groups_of(rank.batch(m))] == drawn


def test_the_source_seeks():
    one, two = (TensorSource(**pairs(), batch_size=5, seed=2) for _ in range(2))
    batches = iter(one)
    for _ in range(13):
        next(batches)
    two.seek(13)
    a, b = next(batches), next(iter(two))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.score, b.score)
    assert torch.equal(a.cond["c"], b.cond["c"])
    assert torch.equal(a.group, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4]))


def test_an_empty_source():
    with pytest.raises(UserError, match="empty"):
        TensorSource(torch.zeros(0, 2, 2), torch.zeros(0, 2), batch_size=1)
