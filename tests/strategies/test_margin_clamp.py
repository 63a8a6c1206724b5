"""The margin clamp by numpy, on predictions of policy and reference that are given."""

import numpy as np
import pytest
import torch

from diffalign.diffusion.noising import Forward
from diffalign.errors import UserError
from diffalign.losses.pairwise import IPO
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.strategies import wrap
from diffalign.strategies.margin_clamp import MarginClamp
from diffalign.types import Batch
from tests.helpers import Affine, sd_path
from tests.strategies.test_strategies import Counting, Streams, double, gradients, pair_batch


@pytest.mark.parametrize("method", [DPO(beta=10.0), DPO(beta=3.0, loss=IPO())])
@pytest.mark.parametrize("excess", [0.0, 0.5, 2.0, 1e6])
def test_losers_with_a_large_excess_lose_their_gradient_and_nobody_else(method, excess):
    batch = pair_batch(ties=(3,))
    noise = double(batch.num_groups, 3, 2, 2, seed=1)[batch.group]
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.2, 0.1, 0.3, 0.3])[:, None, None, None]
    held = noise + scale * double(*batch.x.shape, seed=3)
    plain, before, prediction, target = gradients(method, batch, reference=held)
    step, after, _, _ = gradients(MarginClamp(excess).wrap(method), batch, reference=held)

    m, r = (((p - target) ** 2).flatten(1).mean(1).numpy() for p in (prediction, held))
    lost = (batch.score == 0).numpy()
    stopped = lost & (m > (1 + excess) * r)
    expected = np.where(stopped[:, None, None, None], 0.0, before.numpy())
    np.testing.assert_allclose(after.numpy(), expected, atol=1e-12)
    assert step.loss.item() == plain.loss.item() and step.weight == plain.weight
    assert step.metrics["margin_clamp/stopped"].item() == pytest.approx(stopped.sum() / lost.sum())
    assert before[batch.score == 1].abs().max() > 0
    assert excess != 2.0 or 0 < stopped.sum() < lost.sum()
    assert excess < 1e6 or not stopped.any()


def test_it_calls_no_network_more_than_the_method_does():
    path = sd_path()
    policy, held = (Counting(Affine(path, torch.tensor(a), torch.tensor(0.0))) for a in (0.3, 0.2))
    MarginClamp().wrap(DPO(beta=10.0))(policy, held, pair_batch(), Streams.at(0, 0, 4))
    assert policy.rows == [8] and held.rows == [8]


def test_a_policy_that_is_the_reference_is_never_stopped():
    path, batch = sd_path(), pair_batch()
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.0, dtype=torch.float64)
    grads = []
    for section in ([], [{"type": "margin_clamp", "excess": 0.0}]):
        method = wrap(DPO(beta=10.0), section)
        step = method(Affine(path, a, b), Affine(path, a.detach(), b), batch, Streams.at(0, 0, 4))
        grads.append(torch.autograd.grad(step.loss, a)[0].item())
    assert grads[0] == grads[1] != 0
    assert step.metrics["margin_clamp/stopped"] == 0


def test_what_it_refuses():
    with pytest.raises(UserError, match=r"margin_clamp\.excess=-0.1"):
        MarginClamp(-0.1)
    with pytest.raises(UserError, match="input_perturbation"):
        MarginClamp().wrap(DPO(noising=Forward(input_perturbation=0.1)))
    path = sd_path()
    a = Affine(path, torch.tensor(0.1, requires_grad=True), torch.tensor(0.0))
    likes = Batch(double(4, 3, 2, 2), {}, torch.arange(2).repeat_interleave(2), torch.tensor([1.0, 0, 0, 1]))
    with pytest.raises(UserError, match="margin_clamp: the method calls the policy on"):
        MarginClamp().wrap(SFT())(a, a, likes, torch.Generator())
