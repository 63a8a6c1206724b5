"""Strategies against their formulas, by autograd on denoisers of a few numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.noising import Forward
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.losses.pairwise import IPO
from diffalign.methods import REGISTRY
from diffalign.methods import build as build_method
from diffalign.methods.dpo import DPO
from diffalign.methods.inpo import InPO
from diffalign.methods.sft import SFT
from diffalign.strategies import STRATEGIES, build, wrap
from diffalign.strategies._common import Scaled, Wrapped, best, informative, residual, sides
from diffalign.strategies.anchor import Anchor
from diffalign.strategies.sdpo import SDPO
from diffalign.strategies.sft import SFTMix
from diffalign.strategies.weighted import Rare, Semantic, Weighted
from diffalign.types import Batch, Noised
from tests.helpers import Affine, Answers, GivenNoise, GivenTimes, sd_path


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_batch(pairs=4, ties=(), extra=None):
    score = torch.tensor([1.0, 0, 0, 1] * pairs)[: 2 * pairs]
    for i in ties:
        score[2 * i : 2 * i + 2] = 0.5
    x = double(2 * pairs, 3, 2, 2)
    return Batch(x, {}, torch.arange(pairs).repeat_interleave(2), score, extra=extra or {})


class Counting:
    """A denoiser that counts its calls."""

    def __init__(self, denoiser):
        self.denoiser, self.path, self.target, self.rows = denoiser, denoiser.path, denoiser.target, []

    def __call__(self, x_t, t, cond):
        self.rows.append(len(x_t))
        return self.denoiser(x_t, t, cond)


def gradients(method, batch, target="eps", t=0.4, reference=None):
    """(step, gradient with respect to the prediction, prediction, regression target) on fixed answers."""
    path = sd_path()
    noise = double(batch.num_groups, 3, 2, 2, seed=1)[batch.group]
    # Rivals err alike, the loser more: what makes a push away from the loser hurt the winner.
    alike = double(batch.num_groups, 3, 2, 2, seed=4)[batch.group] * (2 - batch.score)[:, None, None, None]
    prediction = (noise + 0.1 * double(*batch.x.shape, seed=2) + 0.2 * alike).requires_grad_(True)
    held = noise + 0.3 * double(*batch.x.shape, seed=3) if reference is None else reference
    times = (t,) * batch.num_groups
    inner = method
    while isinstance(inner, Wrapped):
        inner = inner.method
    given = replace(inner, time=GivenTimes(times), noising=GivenNoise(noise))

    def rebuilt(m):
        return replace(m, method=rebuilt(m.method)) if m is not inner else given

    step = rebuilt(method)(
        Answers(prediction, path, target), Answers(held, path, target), batch, torch.Generator()
    )
    step.loss.backward()
    return step, prediction.grad, prediction.detach(), noise


METHODS = [DPO(beta=10.0), DPO(beta=3.0, loss=IPO()), InPO(beta=10.0)]


@pytest.mark.parametrize("method", METHODS, ids=["dpo", "ipo", "inpo"])
@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("over", ["batch", "pair"])
def test_sdpo_scales_only_the_losers_by_the_formula(method, mu, over):
    """Gradients of the two mean squared errors by autograd, the factor in numpy."""
    batch = pair_batch()
    plain, before, prediction, target = gradients(method, batch)
    step, after, _, _ = gradients(SDPO(mu=mu, over=over).wrap(method), batch)

    p = prediction.clone().requires_grad_(True)
    won, lost = batch.score == 1, batch.score == 0
    (g_w,) = torch.autograd.grad(((p - target)[won] ** 2).flatten(1).mean(1).sum(), p)
    (g_l,) = torch.autograd.grad(((p - target)[lost] ** 2).flatten(1).mean(1).sum(), p)
    a, b = g_w[won].flatten(1).numpy(), g_l[lost].flatten(1).numpy()
    # pairs in the same order on both sides
    own, cross = (a * a).sum(1), (a * b).sum(1)
    if over == "batch":
        own, cross = np.full(4, own.sum()), np.full(4, cross.sum())
    factor = np.where(cross > 0, np.clip((1 - mu) * own / np.where(cross > 0, cross, 1), 0, 1), 1.0)
    assert (factor < 1).any() and step.loss.item() == plain.loss.item()
    np.testing.assert_allclose(after[won].numpy(), before[won].numpy(), atol=1e-14)
    expected = before[lost].numpy() * factor[:, None, None, None]
    np.testing.assert_allclose(after[lost].numpy(), expected, atol=1e-14)
    assert step.metrics["sdpo/lambda"].item() == pytest.approx(factor.mean())
    assert {k: v for k, v in step.metrics.items() if k != "sdpo/lambda"} == plain.metrics


def test_sdpo_keeps_a_share_of_the_winners_descent():
    """What lambda is for: gA . (gA - lambda gB) >= mu |gA|^2, with equality where it is not clipped."""
    batch = pair_batch(3)
    for mu in (0.0, 0.3, 0.9):
        _, _, prediction, target = gradients(DPO(beta=1.0), batch)
        gradient = (prediction - target).double()
        from diffalign.strategies.sdpo import losers

        rows, mean = losers(gradient, batch, mu)
        won, lost = gradient[batch.score == 1], gradient[batch.score == 0]
        left = (won * (won - rows[batch.score == 0][:, None, None, None] * lost)).sum()
        bound = mu * (won * won).sum()
        assert left >= bound - 1e-9
        if 0 < mean < 1:
            assert left.item() == pytest.approx(bound.item(), abs=1e-9)


def test_sdpo_leaves_opposed_gradients_and_ties_alone():
    batch = pair_batch(2, ties=(1,))
    gradient = double(4, 3, 2, 2)
    gradient[1] = -gradient[0]
    gradient[3] = gradient[2]
    from diffalign.strategies.sdpo import losers

    rows, mean = losers(gradient, batch, 0.9)
    assert rows.tolist() == [1.0] * 4 and mean.item() == 1.0
    gradient[1] = 2 * gradient[0]  # |gA|^2 / (gA . gB) = 1/2
    rows, mean = losers(gradient, batch, 0.5)
    assert rows.tolist() == [1.0, pytest.approx(0.25), 1.0, 1.0] and mean.item() == pytest.approx(0.25)


@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_the_target_is_read_off_the_noisy_state(target):
    """Independent of how the state was made: target of x0, x_t and t, for every kind of prediction."""
    path, t = sd_path(), torch.tensor([0.02, 0.5, 0.999], dtype=torch.float64)
    x0, eps = double(2, 3, 3, 2, 2)
    alpha = path.alphas_cumprod.double()[(t * 1000).round().long()].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    wanted = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[target]
    got = residual(Answers(eps, path, target), x0, alpha * x0 + sigma * eps, t, torch.zeros_like(x0))
    torch.testing.assert_close(-got, wanted, atol=1e-6, rtol=1e-6)


def test_predictions_are_the_same_to_the_bit_and_nothing_happens_without_gradient():
    path, x = sd_path(), double(3, 2)
    p = double(3, 2, seed=1).requires_grad_(True)
    asked = []
    scaled = Scaled(Answers(p, path), lambda *a: asked.append(a) or torch.tensor([0.1, 3.0, 1.0]))
    assert torch.equal(scaled(x, torch.tensor([0.1] * 3), {}), p)
    assert len(asked) == 1
    with torch.no_grad():
        assert scaled(x, torch.tensor([0.1] * 3), {}) is p
    assert len(asked) == 1 and scaled.path is path and scaled.target == "eps"


def test_lists_have_two_sides_and_likes_are_refused():
    score = torch.tensor([0.3, 0.1, 0.2, 0.9, 0.1, 0.1, 0.1, 1.0])
    batch = Batch(double(8, 2), {}, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]), score)
    two = sides(batch)
    assert two.better.tolist() == [False, False, False, True, False, False, False, False]
    assert two.worse.tolist() == [True, True, True, False, False, False, False, False]
    index, known = best(batch)
    assert index.tolist() == [3, 4, 7] and known.tolist() == [True, False, True]
    assert informative(batch).tolist() == [True] * 4 + [False] * 3 + [True]
    assert best(replace(batch, score=score - 1))[1].tolist() == [True, False, False], "an undesirable like"
    path = sd_path()
    likes = Batch(double(2, 3, 2, 2), {}, torch.arange(2), torch.ones(2))
    a = Affine(path, torch.tensor(0.1, requires_grad=True), torch.tensor(0.0))
    with pytest.raises(UserError, match="sdpo: every group has one sample"):
        SDPO().wrap(SFT())(a, a, likes, torch.Generator())
    with pytest.raises(UserError, match=r"sdpo: the method calls the policy on \(4, 3, 2, 2\)"):
        SDPO().wrap(SFT())(a, a, pair_batch(), torch.Generator())


def test_sft_adds_the_winners_error_without_a_further_call():
    batch, path = pair_batch(ties=(2,)), sd_path()
    method = SFTMix(weight=0.3).wrap(DPO(beta=10.0))
    plain, before, prediction, target = gradients(DPO(beta=10.0), batch)
    step, after, _, _ = gradients(method, batch)
    won = batch.score == 1
    expected = ((prediction - target)[won] ** 2).mean().item()
    assert step.metrics["sft"].item() == pytest.approx(expected, rel=1e-9)
    assert step.loss.item() == pytest.approx(plain.loss.item() + 0.3 * expected, rel=1e-9)
    extra = torch.zeros_like(before)
    extra[won] = 0.3 * 2 * (prediction - target)[won] / (3 * 12)
    torch.testing.assert_close(after, before + extra, atol=1e-9, rtol=1e-7)
    policy = Counting(Affine(path, torch.tensor(0.3), torch.tensor(0.0)))
    method(policy, policy.denoiser, batch, Streams.at(0, 0, 4))
    assert policy.rows == [8]


def test_sft_asks_anew_where_the_method_asks_about_others():
    path = sd_path()
    policy = Counting(Affine(path, torch.tensor(0.3), torch.tensor(0.0)))
    step = SFTMix(weight=0.5).wrap(SFT())(policy, policy.denoiser, pair_batch(), Streams.at(0, 0, 4))
    assert policy.rows == [4, 4] and step.weight.item() == 4
    assert step.loss.item() > step.metrics["sft"].item() * 0.5 > 0


def test_anchor_is_the_distance_to_the_reference_of_both():
    batch, path = pair_batch(), sd_path()
    plain, before, prediction, noise = gradients(DPO(beta=10.0), batch)
    step, after, _, _ = gradients(Anchor(alpha=2.0).wrap(DPO(beta=10.0)), batch)
    held = noise + 0.3 * double(*batch.x.shape, seed=3)
    errors = ((prediction - held) ** 2).flatten(1).mean(1)
    won, lost = errors[batch.score == 1], errors[batch.score == 0]
    assert step.loss.item() == pytest.approx(plain.loss.item() + ((won + lost) / 2 * 2.0).mean().item())
    torch.testing.assert_close(after, before + 2.0 * 2 * (prediction - held) / (8 * 12))
    for method, asked in ((DPO(), [8]), (SFT(), None)):
        reference = Counting(Affine(path, torch.tensor(0.1), torch.tensor(0.0)))
        policy = Affine(path, torch.tensor(0.3, requires_grad=True), torch.tensor(0.0))
        if asked is None:
            with pytest.raises(UserError, match="anchor: the method never calls"):
                Anchor().wrap(method)(policy, reference, batch, Streams.at(0, 0, 4))
        else:
            Anchor().wrap(method)(policy, reference, batch, Streams.at(0, 0, 4))
            assert reference.rows == asked
    assert Anchor().wrap(SFT()).needs_reference and not SDPO().wrap(SFT()).needs_reference


def test_weights_give_the_gradient_of_the_weighted_mean():
    """Against the loss of each pair alone."""
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0])
    batch = pair_batch(extra={"weight": weight.repeat_interleave(2)})
    method = DPO(beta=10.0)
    plain, before, _, _ = gradients(method, batch)
    step, after, _, _ = gradients(Weighted().wrap(method), batch)
    assert step.loss.item() == plain.loss.item()
    assert step.metrics["weighted/mean"].item() == pytest.approx(weight.mean().item())
    scale = weight.repeat_interleave(2)[:, None, None, None].double()
    torch.testing.assert_close(after, before * scale)


def test_formulas_of_weights():
    value = torch.tensor([0.1, 0.5])
    np.testing.assert_allclose(Semantic(2.0)(value).numpy(), np.exp([-0.2, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(Semantic(2.0, of="similarity")(value).numpy(), np.exp([-1.8, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(Rare(power=2.0)(value).numpy(), [7.2**2, 1.44**2], rtol=1e-6)
    batch = pair_batch(2, extra={"reward": torch.tensor([[0.0, 0.2], [0, 0.4], [0, 0.6], [0, 1.0]])})
    taken = lambda **fields: Weighted(source="reward", column=1, **fields).weights(batch).tolist()  # noqa: E731
    assert taken() == pytest.approx([0.2, 1.0]), "the winners'"
    assert taken(member="mean") == pytest.approx([0.3, 0.8])
    with pytest.raises(UserError, match=r"weighted.source='weight': the data has no such column; it has: r"):
        Weighted().weights(batch)
    with pytest.raises(UserError, match=r"weighted.column=2: 'reward' has 2 column"):
        Weighted(source="reward", column=2).weights(batch)


def test_strategies_nest_and_the_method_stays_reachable():
    batch = pair_batch(extra={"weight": torch.tensor([0.5, 2.0, 0.0, 1.0]).repeat_interleave(2)})
    section = [{"type": "sdpo", "mu": 0.5}, {"type": "weighted"}, {"type": "sft", "weight": 0.2}]
    method = DPO(beta=10.0)
    wrapped = wrap(method, section)
    assert wrapped.inner is method and wrapped.noising is method.noising
    assert wrapped.reduce is method.reduce and wrapped.needs_reference
    assert wrap(method, []) is method
    _, _plain, prediction, target = gradients(method, batch)
    step, after, _, _ = gradients(wrapped, batch)
    _, safe, _, _ = gradients(SDPO(mu=0.5).wrap(method), batch)
    won = batch.score == 1
    extra = torch.zeros_like(after)
    extra[won] = 0.2 * 2 * (prediction - target)[won] / (4 * 12)
    scale = batch.extra["weight"][:, None, None, None].double()
    torch.testing.assert_close(after, safe * scale + extra, atol=1e-9, rtol=1e-7)
    assert {"sdpo/lambda", "weighted/mean", "sft"} <= set(step.metrics)


@pytest.mark.parametrize(
    "section",
    [[{"type": "sdpo", "over": "pair"}], [{"type": "sft"}], [{"type": "anchor"}], [{"type": "weighted"}]],
    ids=lambda section: section[0]["type"],
)
def test_any_split_of_a_batch_has_the_same_gradient(section):
    """Rule 7 at the method's level, a tie included."""
    weight = torch.tensor([0.5, 2.0, 1.5, 1.0]).repeat_interleave(2)
    batch, path = pair_batch(ties=(1,), extra={"weight": weight}), sd_path()
    method = wrap(DPO(beta=10.0), section)

    def gradient(splits):
        a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        b = torch.tensor(0.02, dtype=torch.float64)
        total = loss = 0.0
        for start, stop in splits:
            rows = slice(2 * start, 2 * stop)
            part = Batch(
                batch.x[rows],
                {},
                torch.arange(stop - start).repeat_interleave(2),
                batch.score[rows],
                extra={"weight": weight[rows]},
            )
            streams = Streams.at(0, start, stop - start)
            step = method(Affine(path, a, b), Affine(path, a.detach() - 0.2, b), part, streams)
            loss, total = loss + step.loss * step.weight, total + step.weight
        return torch.autograd.grad(loss / total, a)[0].item()

    assert gradient([(0, 4)]) == pytest.approx(gradient([(0, 1), (1, 2), (2, 3), (3, 4)]), rel=1e-9)


def test_sections_are_checked():
    assert build([{"type": "sdpo", "mu": "0.6"}]) == [SDPO(mu=0.6)]
    assert build([{"type": "weighted", "formula": {"type": "semantic", "alpha": 2}}]) == [
        Weighted(formula=Semantic(2.0))
    ]
    for values, words in (
        ([{"type": "sdop"}], r"unknown strategy \(strategies\[0\].type\) 'sdop'; did you mean sdpo"),
        ([{"type": "sft"}, {"type": "sft"}], r"strategies\[1\].type='sft' appears twice"),
        ([{"mu": 1}], r"strategies\[0\]=.*has no `type`"),
        ([{"type": "sdpo", "nu": 1}], r"unknown key in strategies\[0\].*'nu'.*did you mean mu"),
        ([{"type": "sdpo", "mu": 2}], "sdpo.mu=2.0; allowed: 0 to 1"),
        ([{"type": "sft", "weight": 0}], "sft.weight=0.0"),
        ([{"type": "anchor", "alpha": -1}], "anchor.alpha=-1.0"),
    ):
        with pytest.raises(UserError, match=words):
            build(values)
    with pytest.raises(UserError, match=r"sdpo computes the target from x_t, which method.noising.input_p"):
        wrap(DPO(noising=Forward(input_perturbation=0.1)), [{"type": "sdpo"}])


def test_every_module_has_a_card():
    assert {"sdpo", "sft", "weighted", "anchor"} <= set(STRATEGIES)
    for name, card in STRATEGIES.items():
        assert card.name == name and card.title and card.strategy.__doc__


def test_an_inversions_policy_is_left_alone():
    """A noising that asks the policy (without gradient, as inversions do) sees plain predictions."""
    path, batch = sd_path(), pair_batch()
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    class Asking(GivenNoise):
        def __call__(self, denoiser, x0, t, cond, group, generator):
            with torch.no_grad():
                seen = denoiser(x0, t, cond)
            assert torch.equal(seen, Affine(path, a, a)(x0, t, cond))
            return Noised(x0, self.eps, seen, t)

    method = DPO(beta=1.0, noising=Asking(double(*batch.x.shape)), time=GivenTimes((0.5,) * 4))
    step = SDPO().wrap(method)(
        Affine(path, a, a), Affine(path, a.detach(), a.detach()), batch, torch.Generator()
    )
    assert step.loss.item() == pytest.approx(np.log(2))


PAIRWISE = sorted(name for name in REGISTRY if REGISTRY[name].data.startswith(("pairs", "lists")))
OWN_SAMPLES = {"inversion_dpo": {"guidance": 1}, "sft": None}
"""What a method needs so that it asks about the batch's own samples; None: it never does."""


@pytest.mark.parametrize("name", [name for name in PAIRWISE if OWN_SAMPLES.get(name, {}) is not None])
def test_every_pairwise_method_takes_every_strategy(name):
    """The value of the loss is the method's under SDPO and weights, and only losers' gradients are scaled:
    with winners' predictions alone carrying a gradient, SDPO changes nothing.
    """
    path, generator = sd_path(), torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    extra = {"reward": torch.rand(8, generator=generator), "weight": torch.full((8,), 2.0)}
    extra["patches"] = torch.rand(8, 1, 4, 4, generator=generator)
    group, score = torch.arange(4).repeat_interleave(2), torch.tensor([1.0, 0, 0, 1] * 2)
    cond = {"text": torch.randn(8, 2, generator=generator, dtype=torch.float64)}
    batch = Batch(x, cond, group, score, {"text": torch.zeros(8, 2, dtype=torch.float64)}, extra)
    method = build_method({"type": name, **OWN_SAMPLES.get(name, {})})
    won = (score == 1)[:, None, None, None]

    def outcome(section, winners_only=False):
        a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        b = torch.tensor(0.02, dtype=torch.float64)

        class Policy(Affine):
            def __call__(self, x_t, t, cond):
                prediction = super().__call__(x_t, t, cond)
                if not winners_only or not torch.is_grad_enabled():
                    return prediction
                return torch.where(won, prediction, prediction.detach())

        wrapped = wrap(method, section)
        reference = Affine(path, a.detach() - 0.1, b)
        step = wrapped(Policy(path, a, b), reference, batch, Streams.at(0, 0, 4))
        return step.loss.item(), torch.autograd.grad(step.loss, a)[0].item()

    plain, only = outcome([]), outcome([], winners_only=True)
    assert outcome([{"type": "sdpo"}])[0] == plain[0]
    assert outcome([{"type": "sdpo"}], winners_only=True) == only
    assert outcome([{"type": "margin_clamp"}])[0] == plain[0]
    assert outcome([{"type": "weighted"}]) == (plain[0], pytest.approx(2 * plain[1], rel=1e-9))
    for section in ([{"type": "sft"}], [{"type": "anchor"}]):
        assert outcome(section)[0] > plain[0]


def test_a_method_that_asks_about_other_rows_is_refused_by_name():
    """Inversion-DPO under guidance asks about twice the rows."""
    method = build_method({"type": "inversion_dpo"})
    batch, path = pair_batch(), sd_path()
    batch = replace(batch, cond={"text": double(8, 2)}, negative={"text": torch.zeros(8, 2).double()})
    a = Affine(path, torch.tensor(0.1, requires_grad=True), torch.tensor(0.0))
    with pytest.raises(UserError, match="strategy sdpo: the method calls the policy on"):
        SDPO().wrap(method)(a, a, batch, Streams.at(0, 0, 4))
