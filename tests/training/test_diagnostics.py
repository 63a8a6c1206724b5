import pytest
import torch

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.plane.source import TensorSource
from diffalign.training.diagnostics import HeldOut, verdict
from tests.training.toys import Probe, Trial, pairs, same, weights


def held_out(ties=(), size=8):
    source = TensorSource(**pairs(ties), batch_size=size, seed=11)
    return [source.batch(m) for m in range(24 // size)]


def test_a_bin_is_the_method_with_its_times_in_that_bin():
    """Every value by calling the method by hand; the totals are the mean over terms, not over batches."""
    batches = held_out(ties=(0, 1, 2, 3, 4))
    hook = HeldOut(batches, bins=4, seed=9)
    trial = Trial(settings=TrainingConfig(steps=1, batch_size=4))
    got = {}
    trial.hooks = [Probe(lambda state: got.update(hook.measure(state)))]
    state = trial.run()
    parts = {}
    for low, high, label in (
        (0.0, 0.25, "0-0.25"),
        (0.25, 0.5, "0.25-0.5"),
        (0.5, 0.75, "0.5-0.75"),
        (0.75, 1.0, "0.75-1"),
    ):
        method = DPO(beta=20.0, time=Uniform(low, high))
        for index, batch in enumerate(batches):
            with torch.no_grad():
                streams = Streams.at(9, index << 32, batch.num_groups, f"heldout {label}")
                parts[label, index] = method(state.policy, state.reference, batch, streams)
    for name in ("rewards/accuracies", "rewards/margins", "errors/chosen", "errors/rejected", "loss"):
        for label in ("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"):
            steps = [parts[label, i] for i in range(len(batches))]
            mean = sum(float(s.metrics[name] * s.weight) for s in steps) / sum(float(s.weight) for s in steps)
            assert got[f"heldout/{label}/{name}"] == pytest.approx(mean, rel=1e-5)
        mean = sum(float(s.metrics[name] * s.weight) for s in parts.values()) / (4 * 19)
        assert got[f"heldout/{name}"] == pytest.approx(mean, rel=1e-5)
    assert hook.history[0][1]["loss"] == got["heldout/loss"]


def test_measuring_changes_nothing_and_repeats():
    settings = TrainingConfig(steps=6, batch_size=4)
    plain = Trial(settings=settings, dropout=0.5).run()
    hook = HeldOut(held_out(), every=2, bins=2)
    trial = Trial(settings=settings, dropout=0.5, hooks=[hook])
    measured = trial.run()
    assert same(weights(plain), weights(measured)), (
        "no dropout mask, no draw and no gradient of the run is touched"
    )
    assert not measured.network.training, "as it came"
    assert [step for step, _ in hook.history] == [2, 4, 6]
    assert hook.measure(measured) == {f"heldout/{k}": v for k, v in hook.history[2][1].items()} | {
        k: v for k, v in measured.take_logged().items() if k[8].isdigit()
    }, "the same policy measures the same, without dropout"


def test_an_untrained_policy_has_no_signal():
    """Rule 3 through the diagnostics: policy == reference is accuracy 1/2, margin 0, drift 0."""
    trial = Trial(
        settings=TrainingConfig(steps=1, batch_size=4), optimizer=OptimizerConfig(learning_rate=0.0)
    )
    trial.network.load_state_dict(trial.reference.state_dict())
    hook = HeldOut(held_out(), bins=5)
    trial.hooks = [hook]
    trial.run()
    totals = hook.history[-1][1]
    assert totals["rewards/accuracies"] == 0.5
    assert totals["rewards/margins"] == totals["errors/chosen"] == totals["errors/rejected"] == 0.0
    assert hook.verdict.startswith("no signal yet: held-out accuracy 0.500")


@pytest.mark.parametrize(
    ("beta", "rate", "begins"),
    [(20.0, 1e-3, "learning: held-out accuracy 0.9"), (1.0, 1e-2, "learning, with displacement: ")],
    ids=["calm", "too hard"],
)
def test_a_run_is_told_for_what_it_is(beta, rate, begins):
    """From a policy that fits the winners: a calm run learns, a hundred times the push tears both members
    away.
    """

    def source():
        return TensorSource(**pairs(count=128, gap=3.0), batch_size=8, seed=5)

    base = Trial(settings=TrainingConfig(steps=100, batch_size=8), method=SFT(), source=source(), moved=False)
    base.run()
    hook = HeldOut([source().batch(m) for m in range(16)], bins=3)
    trial = Trial(
        settings=TrainingConfig(steps=60, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=rate),
        method=DPO(beta=beta),
        network=base.network,
        source=source(),
        moved=False,
        hooks=[hook],
    )
    trial.run()
    assert hook.verdict.startswith(begins)


def test_a_method_without_preferences():
    hook = HeldOut(held_out(), every=20, bins=2)
    trial = Trial(settings=TrainingConfig(steps=40, batch_size=8), method=SFT(), hooks=[hook])
    trial.run()
    assert hook.verdict.startswith("held-out loss fell from ")


@pytest.mark.parametrize(
    ("history", "begins"),
    [
        (
            [{"rewards/accuracies": 0.8, "errors/chosen": -1e-4, "errors/rejected": 2e-4}],
            "learning: held-out accuracy 0.800",
        ),
        ([{"rewards/accuracies": 0.8, "errors/chosen": 1e-5, "errors/rejected": 2e-4}], "learning: "),
        (
            [
                {
                    "rewards/accuracies": 0.8,
                    "errors/chosen": 1e-4,
                    "errors/rejected": 2e-4,
                    "rewards/chosen": -0.25,
                }
            ],
            "learning, with displacement: held-out accuracy 0.800; winner error +0.0001",
        ),
        (
            [
                {
                    "rewards/accuracies": 0.8,
                    "errors/chosen": 1e-5,
                    "errors/rejected": 2e-5,
                    "rewards/chosen": -0.02,
                }
            ],
            "learning",
        ),
        ([{"rewards/accuracies": 0.52, "errors/chosen": -1e-9, "errors/rejected": 1e-9}], "no signal yet"),
        (
            [{"rewards/accuracies": 0.3, "errors/chosen": -1e-9, "errors/rejected": -1e-4}],
            "learning the opposite",
        ),
        (
            [{"rewards/accuracies": 0.9}, {"rewards/accuracies": 0.6}],
            "overfitting: held-out accuracy 0.600 has fallen",
        ),
        ([{"loss": 0.5}], "held-out loss 0.5: nothing to compare"),
        ([{"loss": 0.5}, {"loss": 0.75}], "held-out loss rose from 0.5 to 0.75"),
        ([{}], "not measured: every held-out group is a tie"),
    ],
)
def test_verdicts(history, begins):
    assert verdict(history, groups=400).startswith(begins)


def test_nothing_held_out():
    hook = HeldOut([], every=1)
    Trial(settings=TrainingConfig(steps=1, batch_size=4), hooks=[hook]).run()
    assert hook.history == []
    assert hook.verdict == "not measured: no held-out data"
    with pytest.raises(UserError, match=r"logging.diagnostics_bins=0"):
        HeldOut([], bins=0)
