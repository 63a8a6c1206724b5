"""SRPO: golden vectors of its scores and of both branches, the gradient by hand, and the words that rewards
are relative to.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffalign.config.io import apply_overrides
from diffalign.diffusion.paths import RectifiedFlow, VariancePreserving
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM, estimates_of
from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt
from diffalign.methods import build
from diffalign.methods.srpo import SRPO, recover, relative
from diffalign.plane.online import PROMPTS, PlaneRolloutModel, plane_setting
from diffalign.plane.rows import sampled
from diffalign.rollout.noise import NoiseSource
from diffalign.runs.online_checks import check_online
from diffalign.runs.validate import read_run
from diffalign.types import Batch
from tests.helpers import VECTORS, sd_path

GOLDEN = np.load(VECTORS / "srpo_a.npz")
FLOW = RectifiedFlow()
VP = VariancePreserving(sd_path().alphas_cumprod.double())


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_scores_and_loss_as_released(name):
    at = lambda key: torch.from_numpy(GOLDEN[f"{name}_{key}"])  # noqa: E731
    image = at("img").requires_grad_()
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    wanted, unwanted = ((unit(image) * unit(at(text))).sum(-1) for text in ("text_pos", "text_neg"))
    score = relative(wanted, unwanted, at("k"))
    torch.testing.assert_close(score, at("score"), rtol=1e-10, atol=1e-10)
    loss = (SRPO().margin - score).relu().mean() / int(at("accum"))
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}_loss"]), rel=1e-10)
    loss.backward()
    torch.testing.assert_close(image.grad, at("grad_img"), rtol=1e-9, atol=1e-12)


@dataclass
class Said:
    """A flow network that says a given velocity."""

    velocity: torch.Tensor
    path: RectifiedFlow = FLOW
    target: str = "flow"

    def __call__(self, x, t, cond):
        return self.velocity


@pytest.mark.parametrize("name", ["da1_a", "da2_a"])
def test_recovered_latents_and_their_gradient_as_released(name):
    at = lambda key: torch.from_numpy(GOLDEN[f"{name}_{key}"])  # noqa: E731
    velocity = at("v").requires_grad_()
    t, s = (at(key).reshape(1) for key in ("sigma_from", "sigma_to"))
    x = (1 - t) * at("x0") + t * at("noise")
    clean, noise = estimates_of(Said(velocity), velocity, x, t)
    got = recover(FLOW, clean, noise, at("noise"), t, s)
    torch.testing.assert_close(got, at("x0_hat"), rtol=1e-9, atol=1e-10)
    (got * at("probe")).sum().backward()
    torch.testing.assert_close(velocity.grad, at("grad_v"), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["da1_a", "da2_a"])
def test_places_and_times_as_released(name, monkeypatch):
    """Theirs are of 100 places: the same formula at that number."""
    monkeypatch.setattr("diffalign.methods.srpo.POINTS", 100)
    place, length = SRPO().places(torch.tensor([(40 - 5 + 0.5) / 90]))
    assert (int(place), int(length)) == (int(GOLDEN[f"{name}_mid"]), int(GOLDEN[f"{name}_k"]))
    inverted = bool(GOLDEN[f"{name}_inversion"])
    ends = (place - length, place) if inverted else (place + length, place)
    t, s = (SRPO().time(100 - end).item() for end in ends)
    assert t == pytest.approx(float(GOLDEN[f"{name}_sigma_from"]), abs=1e-6)
    assert s == pytest.approx(float(GOLDEN[f"{name}_sigma_to"]), abs=1e-6)


def test_a_perfect_prediction_gives_the_sample_on_any_path():
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for path in (FLOW, VP):
        for t, s in ((0.8, 0.5), (0.5, 0.8)):
            ends = (torch.full((3,), v, dtype=torch.float64) for v in (t, s))
            torch.testing.assert_close(recover(path, x0, eps, eps, *ends), x0, rtol=1e-9, atol=1e-9)


@dataclass
class Shifted:
    """Velocity of the straight line to a point, plus a bias that is trained."""

    point: torch.Tensor
    bias: torch.Tensor
    path: RectifiedFlow = FLOW
    target: str = "flow"

    def __call__(self, x, t, cond):
        return (x - self.point) / t[:, None] + self.bias


class Given:
    """A Random that gives the same numbers for each group."""

    def uniform(self, count, shape=()):
        return torch.tensor([0.5, 0.1, 0.9]).expand(count, 3)


def test_the_gradient_by_hand_and_its_direction():
    """At the start x0' = x0 + (s - t) / (1 - s) bias. With r = g x under good words and -g x under bad ones
    S = +-(2 + k) g x0', so that both branches push the bias along -g, which moves samples along g.
    """
    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    asked = []

    def value(latents, rows, words=()):
        asked.append([column[0] for column in words])
        signs = torch.tensor([[1.0 if w in ("good", "fine") else -1.0 for w in column] for column in words])
        return signs * (latents @ g)

    policy = Shifted(
        torch.tensor([0.3, 0.2], dtype=torch.float64), torch.zeros(2, dtype=torch.float64).requires_grad_()
    )
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = Batch(x, {}, torch.arange(3), torch.zeros(3), grid=torch.tensor([1.0, 0.5, 0.0]), value=value)
    method = SRPO(("good", "fine"), ("bad", "foul"), margin=99.0, hold=0.0)
    step = method(policy, policy, batch, Given())
    assert asked == [["good", "foul"], ["foul", "good"]]
    (got,) = torch.autograd.grad(step.loss, policy.bias)
    high, low, place, length = 27 / 28, 0.75, 500, 101
    sigma = lambda index: high + (low - high) * index / 999  # noqa: E731
    expected = 0.0
    for (t, s), k, sign in (
        ((sigma(1000 - place - length), sigma(1000 - place)), 0.1 + 0.15 * place / 999, 1),
        ((sigma(1000 - place + length), sigma(1000 - place)), 0.3 - 0.29 * place / 999, -1),
    ):
        expected = expected - sign * (2 + k) / 2 * (s - t) / (1 - s) * g
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert torch.nn.functional.cosine_similarity(got, g, 0) > 0.999
    reward = (policy.point @ g).item()
    assert step.metrics["reward"].item() == pytest.approx(reward, abs=1e-5)
    # relu: nothing is learnt above the margin
    none = replace(method, margin=-99.0)(policy, policy, batch, Given())
    assert none.loss.item() == 0


def test_without_words_both_branches_raise_the_reward():
    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    bias = torch.zeros(2, dtype=torch.float64).requires_grad_()
    policy = Shifted(torch.zeros(2, dtype=torch.float64), bias)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = Batch(
        x, {}, torch.arange(3), torch.zeros(3), grid=torch.tensor([1.0, 0.0]),
        value=lambda latents, rows: latents @ g,
    )  # fmt: skip
    plain = SRPO((), (), margin=99.0)
    assert not plain.words
    (got,) = torch.autograd.grad(plain(policy, policy, batch, Streams.at(0, 0, 3)).loss, bias)
    assert torch.nn.functional.cosine_similarity(got, g, 0) > 0.999


def test_the_penalty_holds_and_the_reference_is_asked_twice():
    g = torch.ones(2, dtype=torch.float64)
    point = torch.zeros(2, dtype=torch.float64)
    policy, reference = Shifted(point, point + 0.5), Shifted(point, point)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = Batch(
        x, {}, torch.arange(3), torch.zeros(3), grid=torch.tensor([1.0, 0.0]),
        value=lambda latents, rows: latents @ g,
    )  # fmt: skip
    free, held = (SRPO((), (), hold=h)(policy, reference, batch, Given()) for h in (0.0, 2.0))
    assert held.metrics["held"].item() == pytest.approx(0.25, rel=1e-6)  # the mean of two calls
    assert (held.loss - free.loss).item() == pytest.approx(0.5, rel=1e-5)


def test_places_are_even_and_steps_stay_inside():
    place, length = SRPO().places(torch.linspace(0, 0.99999, 20001))
    assert (int(place.min()), int(place.max())) == (5, 994)
    assert int(length.max()) == 101
    assert bool((place + length <= 1000).all()) and bool((place - length >= 0).all())


def test_rewards_are_asked_under_words_before_the_prompt():
    seen = []

    def rewarded(points, prompts):
        seen.append(list(prompts))
        return points[:, 1].repeat(len(prompts) // len(points)) * torch.arange(1.0, len(prompts) + 1)

    setting = plane_setting(sampled(2))
    batch = next(iter(NoiseSource(PlaneRolloutModel(), rewarded, PROMPTS, setting, groups=2)))
    rows, points = torch.arange(2), torch.ones(2, 2)
    assert batch.kernel == DDIM() and batch.value(points, rows).shape == (2,)
    both = batch.value(points, rows, words=[["a", "b"], ["c", "d"]])
    torch.testing.assert_close(both, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    own = seen[0]
    assert seen[1] == [f"a. {own[0]}", f"b. {own[1]}", f"c. {own[0]}", f"d. {own[1]}"]


class AnyPrompt(PlaneRolloutModel):
    """Reads every prompt as the first one of the plane."""

    def encode(self, prompts, ahead=()):
        return super().encode([PROMPTS[0]] * len(prompts))


def test_words_before_an_edits_prompt_leave_its_source():
    seen = []

    def rewarded(points, prompts):
        seen.append(list(prompts))
        return points[:, 1].repeat(len(prompts) // len(points))

    prompts = [SourcedPrompt("make it red", b"one"), SourcedPrompt("make it red", b"two")]
    source = NoiseSource(AnyPrompt(), rewarded, prompts, plane_setting(sampled(2)), groups=2)
    next(iter(source)).value(torch.ones(2, 2), torch.arange(2), words=[["a", "b"]])
    assert sorted(prompt.source for prompt in seen[0]) == [b"one", b"two"]
    assert [str(prompt) for prompt in seen[0]] == ["a. make it red", "b. make it red"]


def test_rewards_that_ignore_the_prompt_are_refused():
    run = read_run("tiny_sdxl_srpo", [])
    assert check_online(run)
    deaf = apply_overrides(run, ["--rollout.rewards=aesthetic_v2"])
    with pytest.raises(UserError, match="ignores the prompt"):
        check_online(deaf)
    assert check_online(replace(deaf, method={"type": "srpo", "positive": [], "negative": [], "margin": 20}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"low": 0.9, "high": 0.8}, "method.low=0.9"),
        ({"high": 1.0}, "high=1.0"),
        ({"reach": 0}, "method.reach=0"),
        ({"positive": []}, r"method.positive=\(\)"),
        ({"hold": -1}, "method.hold=-1"),
    ],
)
def test_settings_out_of_range(values, words):
    with pytest.raises(UserError, match=words):
        build({"type": "srpo", **values})
