"""The reference bank: equal steps, the distribution of fresh noise, no mix-up of draws."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from diffalign.config.schema import DataConfig, Run, TrainingConfig
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.reference_bank import NAME, Banked, sample_name
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods.dpo import DPO
from diffalign.runs.role_checks import check_roles
from diffalign.types import Batch
from tests.helpers import Affine, sd_path


class Counting:
    """A denoiser that counts the samples that it is asked about."""

    def __init__(self, denoiser):
        self.denoiser, self.path, self.target, self.asked = denoiser, denoiser.path, denoiser.target, 0

    def __call__(self, x_t, t, cond):
        self.asked += len(x_t)
        return self.denoiser(x_t, t, {"c": cond["c"]})


def networks():
    reference = Affine(sd_path(), torch.tensor(0.2), torch.tensor(0.1))
    policy = Affine(sd_path(), torch.tensor(0.3, requires_grad=True), torch.tensor(0.0))
    return Counting(policy), Counting(reference)


def batch(draws, pairs):
    """Two rivals of each pair, the draws named in the conditions."""
    generator = torch.Generator().manual_seed(5)
    x, c = torch.randn(4, 2, 3, generator=generator)[pairs], torch.randn(4, 2, 1, generator=generator)[pairs]
    names = torch.tensor([sample_name(draw, rival) for draw in draws for rival in range(2)])
    group = torch.arange(len(pairs)).repeat_interleave(2)
    cond = {"c": c.flatten(0, 1), NAME: names}
    return Batch(x.flatten(0, 1), cond, group, torch.tensor([1.0, 0.0]).repeat(len(pairs)), draws=draws)


def test_a_second_visit_asks_nothing_and_is_the_same_step():
    policy, reference = networks()
    kept, method = Banked(reference), DPO(beta=20.0)
    for draws, pairs, asked in (([0, 5], [0, 1], 4), ([5, 0], [1, 0], 4), ([5, 8], [1, 2], 6)):
        seen = batch(draws, pairs)
        streams = lambda d=draws: Streams.of_groups(3, 0, 2, d, "method")  # noqa: E731
        ours = method(policy, kept, seen, streams())
        assert reference.asked == asked
        fresh = Counting(reference.denoiser)
        theirs = method(policy, fresh, seen, streams())
        assert torch.equal(ours.loss, theirs.loss)
        a = policy.denoiser.a
        assert torch.equal(*(torch.autograd.grad(step.loss, a)[0] for step in (ours, theirs)))


def test_without_a_bank_it_is_asked_every_time():
    _, reference = networks()
    kept, x, t = Banked(reference), torch.ones(2, 3), torch.full((2,), 0.5)
    for times in (1, 2):
        kept(x, t, {"c": torch.zeros(2, 1)})
        assert reference.asked == 2 * times and not kept.predictions


def test_another_state_of_a_draw_is_an_error():
    _, reference = networks()
    kept, t = Banked(reference), torch.full((1,), 0.5)
    cond = {"c": torch.zeros(1, 1), NAME: torch.tensor([7])}
    kept(torch.ones(1, 3), t, cond)
    with pytest.raises(UserError, match=r"data.reference_bank.*different noisy states of one draw"):
        kept(2 * torch.ones(1, 3), t, cond)


def test_draws_of_a_bank_have_the_law_of_fresh_ones_and_stay():
    draws = list(range(4000))
    streams = Streams.of_groups(1, 0, len(draws), draws, "method")
    times, noise = streams.uniform(len(draws)), streams.normal(len(draws), (2,))
    assert float(times.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5)
    assert float(times.var()) == pytest.approx(1 / 12, rel=0.06)
    assert float(noise.mean()) == pytest.approx(0, abs=4 / 8000**0.5) and float(noise.std()) == pytest.approx(
        1, rel=0.04
    )
    again = Streams.of_groups(1, 99, 2, [17, 3], "method").uniform(2)  # whatever the position
    assert torch.equal(again, times[[17, 3]])
    fresh = Streams.of_groups(1, 99, 2, None, "method").uniform(2)
    assert torch.equal(fresh, Streams.at(1, 99, 2, "method").uniform(2))


def test_the_mean_over_banks_is_the_loss_with_fresh_noise():
    """Unbiased: the mean over many banks, each the mean over its K draws, is that over fresh noise."""
    policy, reference = networks()
    method = DPO(beta=20.0)

    def losses(draws):
        return [
            float(
                method(
                    policy, reference, batch([d], [0]), Streams.of_groups(0, 0, 1, [d], "method")
                ).loss.detach()
            )
            for d in draws
        ]

    fresh = torch.tensor([
        float(method(policy, reference, batch([0], [0]), Streams.at(9, p, 1, "method")).loss.detach())
        for p in range(1500)
    ])  # fmt: skip
    banks = torch.tensor(losses(range(1500))).reshape(375, 4).mean(1)  # 375 banks of 4 draws
    error = (fresh.var() / len(fresh) + banks.var() / len(banks)).sqrt()
    assert abs(float(banks.mean() - fresh.mean())) < 4 * float(error)
    assert float(banks.std()) == pytest.approx(float(fresh.std()) / 2, rel=0.2)  # K draws: sqrt(K) less


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"type": "sft"}}, "method sft; allowed: 0, or a method of pairs"),
        ({"method": {"type": "inversion_dpo"}}, "method inversion_dpo"),
        (
            {"training": TrainingConfig(reference_every=2)},
            "training.reference_every=2 with data.reference_bank=4",
        ),
        ({"training": TrainingConfig(shard="full")}, "training.shard='full' with data.reference_bank=4"),
    ],
)
def test_what_has_no_bank_is_refused(changes, words):
    run = replace(Run(data=DataConfig(reference_bank=4)), **changes)
    with pytest.raises(UserError, match=words):
        check_roles(run, build(run.method))


def test_draws_are_taken_at_random_and_evenly():
    from diffalign.diffusion.randomness import derive

    counts = Counter(derive(0, "data/bank", position) % 4 for position in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values())
