import dataclasses
import math
import os
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.errors import UserError
from diffalign.methods.dpo import DPO
from diffalign.training.acceleration import accelerator_for, set_products
from diffalign.training.guard import TrainingDiverged
from diffalign.training.interruption import Interruption
from diffalign.types import Step
from tests.training.toys import PlaneDenoiser, Probe, Trial, distance, network, pairs, same, weights

TIES = (1, 2, 3, 8, 9, 10, 11, 20)


@pytest.mark.parametrize("ties", [(), TIES], ids=["no ties", "ties"])
@pytest.mark.parametrize("split", [(1, 8), (2, 4), (4, 2)])
def test_a_batch_may_be_split_in_any_way(ties, split):
    """Rule 7. Ties fall on micro-batches unevenly, and whole micro-batches are ties."""
    whole = Trial(settings=TrainingConfig(steps=4, batch_size=8), ties=ties).run()
    parts = Trial(
        settings=TrainingConfig(steps=4, batch_size=split[0], accumulation=split[1]), ties=ties
    ).run()
    assert distance(weights(whole), weights(parts)) < 1e-12
    assert parts.samples == whole.samples == 64
    assert parts.loss == pytest.approx(whole.loss, abs=1e-12)


def test_one_step_is_the_gradient_of_the_mean_over_terms_clipped():
    """The update against autograd: mean over the pairs that are no tie, clipped, SGD-like first step of
    AdamW.
    """
    settings = TrainingConfig(steps=1, batch_size=2, accumulation=3, max_grad_norm=1e-3)
    trial = Trial(settings=settings, ties=TIES)
    seen = {}
    trial.hooks = [Probe(lambda state: seen.update(state.optimizer.state_dict()["state"]))]
    copy_of = network()
    copy_of.load_state_dict(trial.network.state_dict())
    batches = [trial.source.batch(m) for m in range(3)]
    trial.run()

    from diffalign.diffusion.randomness import Streams

    losses, count = [], 0.0
    for m, batch in enumerate(batches):
        step = trial.method(
            PlaneDenoiser(copy_of), PlaneDenoiser(trial.reference), batch, Streams.at(0, m * 2, 2, "method")
        )
        losses.append(step.loss * step.weight)
        count += float(step.weight)
    assert 0 < count < 6
    gradients = torch.autograd.grad(sum(losses) / count, list(copy_of.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert norm > 1e-3, "the clip must act"
    for index, g in enumerate(gradients):
        moment = seen[index]["exp_avg"] / 0.1  # (1 - beta1) g after one step
        torch.testing.assert_close(moment, g * (1e-3 / (norm + 1e-6)), rtol=1e-9, atol=1e-15)


def test_clipping_off():
    norms = []
    trial = Trial(settings=TrainingConfig(steps=1, batch_size=4, max_grad_norm=0.0))
    trial.hooks = [Probe(lambda state: norms.append(state.averages()["grad_norm"]))]
    state = trial.run()
    moments = [s["exp_avg"] / 0.1 for s in state.optimizer.state_dict()["state"].values()]
    norm = math.sqrt(sum(float(m.square().sum()) for m in moments))
    assert norm == pytest.approx(norms[0], rel=1e-6)  # the meter is float32


def test_a_window_of_ties_is_counted_and_changes_nothing():
    trial = Trial(settings=TrainingConfig(steps=3, batch_size=4, ema_decay=0.5), ties=tuple(range(24)))
    before = {name: p.detach().clone() for name, p in trial.network.named_parameters()}
    state = trial.run()
    assert (state.step, state.empty_steps, state.loss, state.applied) == (3, 3, None, False)
    assert same(weights(state), before)
    assert state.meter.averages(state.accelerator) == {}


def test_draws_do_not_depend_on_global_randomness():
    """Rule 6: what a hook draws globally, or the caller's seed, changes nothing; dropout included."""
    settings = TrainingConfig(steps=4, batch_size=4)
    first = Trial(settings=settings, dropout=0.5).run()
    noisy = Trial(settings=settings, dropout=0.5)
    noisy.hooks = [Probe(lambda state: torch.rand(state.step))]
    torch.manual_seed(999)
    second = noisy.run()
    assert same(weights(first), weights(second))
    for other in (Trial(settings=replace(settings, seed=1), dropout=0.5), Trial(settings=settings)):
        assert distance(weights(first), weights(other.run())) > 1e-4
    assert not first.network.training, "trained in training mode, given back as it came"


def test_the_forward_goes_through_the_prepared_module():
    """Rule 8: under bf16 the prepared forward autocasts; the policy must see that, and the network get its
    own back.
    """
    settings = TrainingConfig(steps=1, batch_size=2, mixed_precision="bf16")
    trial = Trial(settings=settings, dtype=torch.float32)
    kinds = []
    hook = trial.network.layers[0].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    trial.run()
    hook.remove()
    assert kinds == [torch.bfloat16]
    batch = trial.source.batch(0)
    assert trial.network(batch.x, torch.zeros(4), batch.cond["c"]).dtype == torch.float32
    assert "_original_forward" not in trial.network.__dict__
    assert all(p.dtype == torch.float32 for p in trial.network.parameters())


def test_fp16_needs_an_accelerator():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"fp16 needs a GPU.*allowed here: no, bf16"):
        accelerator_for(TrainingConfig(mixed_precision="fp16"))


def test_an_overflow_of_loss_scaling_is_not_divergence():
    """float16's scaler on the CPU, its scale so high that the first backward overflows: halve, skip, go
    on.
    """
    trial = Trial(settings=TrainingConfig(steps=3, batch_size=4), dtype=torch.float32)
    plain = Trial(settings=TrainingConfig(steps=3, batch_size=4), dtype=torch.float32)
    trial.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
    try:
        before, applied = {n: p.detach().clone() for n, p in trial.network.named_parameters()}, []
        trial.hooks = [Probe(lambda state: applied.append((state.applied, same(weights(state), before))))]
        state = trial.run()
        assert applied[0] == (False, True)
        assert state.overflow_steps >= 1
        assert state.step == 3
        assert state.accelerator.scaler.get_scale() == 2.0 ** (127 - state.overflow_steps)
        assert "overflow_steps" in state.averages()
    finally:
        trial.accelerator.scaler = None
    scaled = Trial(settings=TrainingConfig(steps=3, batch_size=4), dtype=torch.float32)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
    try:
        result = weights(scaled.run())
    finally:
        scaled.accelerator.scaler = None
    assert distance(result, weights(plain.run())) < 1e-6, "gradients are unscaled before they are clipped"


@dataclass(frozen=True)
class Spoilt:
    """DPO whose loss is multiplied in some micro-steps."""

    factors: dict
    calls: list = dataclasses.field(default_factory=list)
    inner: DPO = DPO(beta=20.0)

    def __call__(self, policy, reference, batch, generator):
        self.calls.append(None)
        step = self.inner(policy, reference, batch, generator)
        return Step(step.loss * self.factors.get(len(self.calls), 1.0), step.metrics, step.weight)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_nan_stops_the_run_with_the_step_named(factor):
    trial = Trial(settings=TrainingConfig(steps=9, batch_size=4), method=Spoilt({5: factor}))
    kept = {}
    trial.hooks = [Probe(lambda state: kept.update(weights(state)))]
    with pytest.raises(
        TrainingDiverged, match=r"diverged at step 5: .*grad_norm=nan.*loss=(nan|inf).*margins=[-\d]"
    ):
        trial.run()
    assert len(trial.method.calls) == 5
    assert same(kept, {n: p.detach() for n, p in trial.network.named_parameters()}), (
        "the bad step was not taken"
    )


def test_the_guard_skips_a_planted_spike_and_counts_it():
    settings = TrainingConfig(steps=26, batch_size=24, spike_factor=5.0)
    trial = Trial(
        settings=settings, method=Spoilt({24: 1000.0}), optimizer=OptimizerConfig(learning_rate=1e-4)
    )
    applied, logged = [], {}

    def look(state):
        applied.append(state.applied)
        logged.update(state.averages())

    trial.hooks = [Probe(look)]
    state = trial.run()
    assert [i + 1 for i, done in enumerate(applied) if not done] == [24]
    assert state.skipped_steps == 1
    assert logged["skipped_steps"] == 1.0
    assert state.guard.mean < 10 * logged["grad_norm"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(number):
    trial = Trial(settings=TrainingConfig(steps=50, batch_size=4, accumulation=2))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trial.hooks = [Probe(lambda state: state.step == 3 and os.kill(os.getpid(), number))]
    state = trial.run()
    assert state.interrupted
    assert (state.step, state.micro_step) == (4, 8)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_interrupt_aborts(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    handler = signal.getsignal(signal.SIGINT)  # a job in the background inherits one that ignores
    with pytest.raises(KeyboardInterrupt), Interruption(announce=False) as interruption:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        clock[0] += 0.1
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's echo of the same Ctrl-C
        clock[0] += 2.0
        os.kill(os.getpid(), signal.SIGTERM)  # already stopping
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "training.steps=0; allowed: 1 or more"),
        ({"batch_size": 0}, "training.batch_size=0"),
        ({"accumulation": -1}, "training.accumulation=-1"),
        ({"max_grad_norm": -1.0}, "training.max_grad_norm=-1.0; allowed: 0"),
        ({"spike_factor": 0.5}, "training.spike_factor=0.5; allowed: 0 .never skip., or above 1"),
        ({"ema_decay": 1.0}, "training.ema_decay=1.0; allowed: 0"),
    ],
)
def test_settings_out_of_range(change, message):
    trial = Trial()
    trial.settings = replace(trial.settings, **change)
    with pytest.raises(UserError, match=message):
        trial.run()


def test_nothing_to_train():
    trial = Trial()
    trial.network = torch.nn.Identity()
    with pytest.raises(UserError, match="nothing to train"):
        trial.run()


def test_a_source_must_be_endless_and_give_no_more_groups_than_a_batch_holds():
    from diffalign.plane.source import TensorSource

    class Finite(TensorSource):
        def __iter__(self):
            yield self.batch(0)

    trial = Trial(source=Finite(**pairs(), batch_size=4))
    with pytest.raises(ValueError, match="endless"):
        trial.run()
    with pytest.raises(ValueError, match=r"5 groups; training.batch_size is 4"):
        Trial(source=TensorSource(**pairs(), batch_size=5)).run()


@pytest.mark.parametrize(
    ("precision", "words", "convolutions"), [("highest", "exact", False), ("high", "TF32", True)]
)
def test_float32_products_are_as_the_run_says(precision, words, convolutions):
    before, allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        assert set_products(precision, "cpu") == ""
        assert torch.get_float32_matmul_precision() == before
        assert words in set_products(precision, "cuda")
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 is convolutions
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = allowed
