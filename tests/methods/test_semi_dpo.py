"""Semi-DPO: the released losses, labels by interval of time, times within the labelled ones, the column."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from diffalign.config.schema import DataConfig
from diffalign.data import encode_preferences, fixed_batches, read_preferences
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.losses.pairwise import Poly
from diffalign.methods import build
from diffalign.methods.dpo import DPO
from diffalign.methods.semi_dpo import SemiDPO, relabelled
from tests.data.conftest import Family, Model, png, write_jsonl
from tests.helpers import VECTORS
from tests.methods.test_recent_methods import SHIFT, on_likelihoods

FILE = VECTORS / "semi_dpo_a.npz"


def cases():
    return sorted({key.removesuffix("_logits") for key in np.load(FILE) if key.endswith("_logits")})


@dataclass(frozen=True, kw_only=True)
class Weighted(SemiDPO):
    """Semi-DPO whose share of contradicting reward models is given."""

    given: torch.Tensor = torch.zeros(1)

    def contradiction(self, c, batch):
        return self.given


@pytest.mark.parametrize("case", cases())
def test_golden_semi_dpo(case):
    """Errors are those of log-probabilities -m / 2; the released beta has no 1/2."""
    f = {key.removeprefix(f"{case}_"): value for key, value in np.load(FILE).items() if key.startswith(case)}
    m = torch.from_numpy(f["m"]).requires_grad_()
    labels = torch.from_numpy(f["labels"])
    method = Weighted(
        beta=2 * float(f["beta"]), loss_type=str(f["type"]), within_labels=False,
        given=torch.from_numpy(f["weight"]),
    )  # fmt: skip
    extra = {"time_labels": labels.repeat(2)[:, None]}
    # the stand-in network has errors 2 (SHIFT - logp); one constant more in both changes nothing
    step = on_likelihoods(method, -m / 2 + SHIFT - 5, -torch.from_numpy(f["r"]) / 2 + SHIFT - 5, extra=extra)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-9)
    assert step.weight.item() == float(f["num"])
    np.testing.assert_allclose(m.grad.numpy(), f["grad_m"], atol=1e-9)
    assert step.metrics["rewards/accuracies"].item() == pytest.approx(float(f["acc"]), abs=1e-6)


def given(labels=None, loss_type="sigmoid", **more):
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=g).double()
    leaf = policy.clone().requires_grad_()
    extra = {} if labels is None else {"time_labels": torch.tensor(labels).repeat(2, 1)}
    method = SemiDPO(beta=4, loss_type=loss_type, within_labels=False, **more)
    step = on_likelihoods(method, leaf, reference, extra=extra)
    step.loss.backward()
    return step, leaf.grad, (policy - reference)


def test_labels_keep_turn_round_or_leave_out_a_pair_by_numpy():
    """The times of the pairs are 0.5: the second of two intervals."""
    step, grad, ratio = given([[0.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    h = 4 * (ratio[:3] - ratio[3:]).numpy()
    expected = (np.log1p(np.exp(-h[0])) + np.log1p(np.exp(h[1]))) / 2
    assert step.loss.item() == pytest.approx(expected) and step.weight == 2
    assert grad[2] == grad[5] == 0 and grad[0] < 0 < grad[1]
    plain, same, _ = given()
    assert plain.weight == 3
    ones, also, _ = given([[1.0]] * 3)
    assert ones.loss.item() == plain.loss.item() and torch.equal(same, also)


def test_sce_is_poly_dpo_with_alpha_three():
    step, _, ratio = given(loss_type="sce")
    other = on_likelihoods(DPO(beta=4, loss=Poly(3.0)), ratio, torch.zeros(6).double())
    assert step.loss.item() == pytest.approx(other.loss.item())


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_losses_by_numpy(loss_type):
    step, _, ratio = given(loss_type=loss_type)
    h = 4 * (ratio[:3] - ratio[3:]).numpy()
    losses = np.maximum(0, 1 - h) if loss_type == "hinge" else ((h - 0.5) / 2) ** 2
    assert step.loss.item() == pytest.approx(losses.mean())


def test_gce_reads_which_reward_models_contradict_the_label():
    rewards = torch.tensor([[3.0, 1, 1], [0.5, 0.5, 0.5], [0, 0, 0], [1, 2, 0], [0, 0, 0], [1, 1, 1]])
    policy = torch.linspace(-0.3, 0.5, 6).double()
    method = SemiDPO(beta=4, loss_type="gce", within_labels=False)
    step = on_likelihoods(method, policy, torch.zeros(6).double(), extra={"reward": rewards})
    h = 4 * (policy[:3] - policy[3:]).numpy()
    p, d = 1 / (1 + np.exp(-h)), np.array([1 / 3, 0, 1])
    expected = (1 - d) * -np.log(p) + d * (1 - np.sqrt(p)) / 0.5
    assert step.loss.item() == pytest.approx(expected.mean())
    with pytest.raises(UserError, match="needs the share of reward models that contradict"):
        on_likelihoods(method, policy, torch.zeros(6).double())


def test_times_lie_evenly_in_the_labelled_intervals_of_each_pair():
    labels = torch.tensor([[1.0, 0, -1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).repeat_interleave(2, 0)

    class Rows:
        group, num_groups = torch.arange(3).repeat_interleave(2), 3

    drawn = torch.stack([SemiDPO()._times(labels, Rows, Streams([i, i + 500, i + 900])) for i in range(300)])
    places = (drawn * 4).floor().long()
    assert set(places[:, 0].tolist()) == {0, 2} and set(places[:, 1].tolist()) == {3}
    assert set(places[:, 2].tolist()) == {0, 1, 2, 3}
    assert 100 < int((places[:, 0] == 0).sum()) < 200
    assert 0.35 < float((drawn * 4).frac().mean()) < 0.65
    bins = SemiDPO().at_times(Uniform(0.2, 0.3))
    assert not bins.within_labels and bins.time == Uniform(0.2, 0.3)


def test_turning_round_is_its_own_inverse():
    c = contrast(torch.tensor([0.3, 0.1]), torch.tensor([1.0, 0.0]), torch.zeros(2).long())
    turned = relabelled(c, torch.tensor([-1.0]))
    assert (turned.better.item(), turned.worse.item()) == (c.worse.item(), c.better.item())
    assert turned.margin.item() == pytest.approx(-c.margin.item())
    again = relabelled(turned, torch.tensor([-1.0]))
    assert again.margin.item() == c.margin.item()


def test_the_column_reaches_the_batch_and_a_row_without_one_is_kept_everywhere(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))

    def row(i, **more):
        return {"prompt": f"p{i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png", **more}

    def encoded(name, *rows):
        config = DataConfig(path=str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), resolution=16)
        return encode_preferences(Model(), read_preferences(config), config, tmp_path / name, False)

    for _ in range(2):  # fresh, and from the cache
        found = encoded("a", row(0, time_labels=[1, -1, 0]), row(1))
        batch = next(fixed_batches(found, Family(), DataConfig(), 2))
        assert batch.extra["time_labels"].tolist() == [[1, -1, 0]] * 2 + [[1, 1, 1]] * 2
    assert "time_labels" not in encoded("b", row(0)).extras
    with pytest.raises(UserError, match=r"time_labels is \[1, 2\]; allowed: a list of 1, -1 and 0"):
        encoded("c", row(0, time_labels=[1, 2]))
    with pytest.raises(UserError, match=r"pairs have \[1, 2\] time_labels each"):
        encoded("d", row(0, time_labels=[1]), row(1, time_labels=[1, 1])).extras  # noqa: B018


@pytest.mark.parametrize(
    ("values", "word"),
    [({"gce_q": 0}, "gce_q=0"), ({"log_zero": 1}, "log_zero=1"), ({"beta": 0}, "beta=0")],
)
def test_what_it_refuses(values, word):
    with pytest.raises(UserError, match=word):
        build({"type": "semi_dpo", **values})
