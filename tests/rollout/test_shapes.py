"""The contents of a round, compared with independently written loops on prescribed draws."""

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch

from diffalign.diffusion.likelihood import gaussian_log_density
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM, kernel_for, sample, timesteps
from diffalign.rollout.setting import Setting, Window
from diffalign.rollout.shapes import Request, drawn_steps, samples, trajectories
from diffalign.rollout.tree import tree
from tests.helpers import sd_path

SHAPE, PROMPTS = (2, 3, 3), 3
GRID = timesteps(20)


@dataclass
class Counting:
    """A denoiser whose noise estimate depends on state, time and text; it counts the samples it is asked."""

    bias: float = 0.0
    path: object = field(default_factory=sd_path)
    target: str = "eps"
    asked: int = 0

    def __call__(self, x_t, t, cond):
        self.asked += len(x_t)
        text = cond["text"].mean(1).view(-1, 1, 1, 1)
        time = t.view(-1, 1, 1, 1).to(x_t)
        return 0.6 * x_t + 0.1 * (time * 10).sin() + 0.2 * text.tanh() * (3 * x_t).cos() + self.bias


@dataclass
class Scripted:
    """A Random that gives prescribed draws, each (n, ...), in their order, and checks their shapes."""

    normals: list
    uniforms: list = field(default_factory=list)

    def normal(self, count, shape=()):
        draw = self.normals.pop(0)
        assert draw.shape == (count, *shape)
        return draw

    def uniform(self, count, shape=()):
        return self.uniforms.pop(0)


def conditions(seed=0):
    g = torch.Generator().manual_seed(seed)
    cond, negative = torch.randn(2, PROMPTS, 5, generator=g, dtype=torch.float64)
    return {"text": cond}, {"text": negative}


def drawn(g, *lead):
    return torch.randn(*lead, *SHAPE, generator=g, dtype=torch.float64)


def guided(denoiser, x, t, cond, negative, scale):
    """eps (n, *d) by hand."""
    time = torch.full((len(x),), t, dtype=torch.float64)
    low, high = denoiser(x, time, negative), denoiser(x, time, cond)
    return low + scale * (high - low)


def ddim(x, eps, t, s):
    """(mean, std, x0) of the step with eta = 1, from the table of alphas."""
    table = sd_path().alphas_cumprod.double()
    a, b = table[round(t * 1000)], table[round(s * 1000)]
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    std = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    return b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps, std, x0


def test_trajectories_are_ddpms_ancestral_steps_with_their_densities():
    g = torch.Generator().manual_seed(1)
    k, scale, (cond, negative) = 2, 5.0, conditions()
    noise, steps = drawn(g, PROMPTS, 1), [drawn(g, PROMPTS, k) for _ in range(20)]
    policy, reference = Counting(), Counting(bias=0.1)
    setting = Setting(DDIM(1.0), GRID, scale, k, means=True)
    got = trajectories(Request(policy, reference, cond, negative, setting), SHAPE, Scripted([noise, *steps]))
    assert got.x.x_t.shape == (PROMPTS, 20, k, *SHAPE) and got.shared.tolist() == [True] + [False] * 19
    for rival in range(k):
        x = noise[:, 0]
        for i, (t, s) in enumerate(zip(GRID[:-1].tolist(), GRID[1:].tolist(), strict=True)):
            torch.testing.assert_close(got.x.x_t[:, i, rival], x)
            mean, std, _ = ddim(x, guided(policy, x, t, cond, negative, scale), t, s)
            held, _, _ = ddim(x, guided(reference, x, t, cond, negative, scale), t, s)
            torch.testing.assert_close(got.reference_mean[:, i, rival], held)
            torch.testing.assert_close(got.drawn_mean[:, i, rival], mean)
            x = mean + std * steps[i][:, rival]
            torch.testing.assert_close(got.x.x_s[:, i, rival], x)
            torch.testing.assert_close(got.x.logp[:, i, rival], gaussian_log_density(x, mean, std))
        torch.testing.assert_close(got.judged[:, 0, rival], x)
    assert got.at.tolist() == [0.0] and got.verdict.tolist() == [0] * 20


def published_tree(policy, cond, negative, scale, k, noise, plain, branches, choices):
    """SPO's SD 1.5 loop as its card tells it: after four plain steps k candidates from one state at each
    step, each judged by the estimate at it, one continued by chance. (clean, x_t, x_s) of each branch.
    """
    x, found = noise, []
    grid = GRID.tolist()
    for i in range(4):
        mean, std, _ = ddim(x, guided(policy, x, grid[i], cond, negative, scale), grid[i], grid[i + 1])
        x = mean + std * plain[i]
    for i in range(4, 20):
        mean, std, _ = ddim(x, guided(policy, x, grid[i], cond, negative, scale), grid[i], grid[i + 1])
        candidates = [mean + std * branches[i - 4][:, c] for c in range(k)]
        s = grid[i + 1]
        clean = [
            c if i == 19 else ddim(c, guided(policy, c, s, cond, negative, scale), s, grid[min(i + 2, 20)])[2]
            for c in candidates
        ]
        found.append((torch.stack(clean, 1), x, torch.stack(candidates, 1)))
        if i < 19:
            x = torch.stack([candidates[c][n] for n, c in enumerate(choices[i - 4])])
    return found


def test_the_tree_is_spos_loop():
    g = torch.Generator().manual_seed(2)
    k, scale, (cond, negative) = 4, 5.0, conditions()
    noise, plain = drawn(g, PROMPTS), [drawn(g, PROMPTS) for _ in range(4)]
    branches = [drawn(g, PROMPTS, k) for _ in range(16)]
    choices = torch.randint(k, (15, PROMPTS), generator=g)
    random = Scripted(
        [noise[:, None], *(p[:, None] for p in plain), *branches], [(c + 0.5) / k for c in choices.double()]
    )
    policy = Counting()
    got = tree(Request(policy, Counting(), cond, negative, Setting(DDIM(1.0), GRID, scale, k)), SHAPE, random)
    assert policy.asked == 2 * PROMPTS * (5 + 15 * k)  # the published 1300 for ten prompts
    wanted = published_tree(Counting(), cond, negative, scale, k, noise, plain, branches, choices.tolist())
    assert got.judged.shape == (PROMPTS, 16, k, *SHAPE)
    for slot, (clean, x, candidates) in enumerate(wanted):
        torch.testing.assert_close(got.judged[:, slot], clean)
        torch.testing.assert_close(got.x.x_s[:, slot], candidates)
        torch.testing.assert_close(got.x.x_t[:, slot], x[:, None].expand_as(candidates))
    assert got.at.tolist() == pytest.approx([*GRID[5:20].tolist(), 0.0])
    assert got.verdict.tolist() == list(range(16)) and bool(got.shared.all())
    torch.testing.assert_close(got.reference_mean[:, :, 0], got.reference_mean[:, :, 3])


def test_inner_steps_are_taken_alone_and_judged_together():
    """SPO's SDXL form: two branches of one shared and three own steps each, judged four times."""
    k, (cond, negative) = 2, conditions()
    policy = Counting()
    setting = Setting(DDIM(1.0), GRID, 5.0, k, inner_steps=3)
    got = tree(Request(policy, None, cond, negative, setting), SHAPE, Streams([1, 2, 3]))
    assert got.verdict.tolist() == [j for j in range(4) for _ in range(4)] and got.reference_mean is None
    assert (1000 * got.at).round().tolist() == [551, 351, 151, 0]
    assert got.shared.tolist() == ([True] + [False] * 3) * 4
    for slot in range(16):
        if slot % 4:  # a candidate goes on from its own state
            torch.testing.assert_close(got.x.x_t[:, slot], got.x.x_s[:, slot - 1])
        elif slot:  # a branch starts at one of the candidates before it
            near = (got.x.x_t[:, slot, :1] - got.x.x_s[:, slot - 1]).abs().flatten(2).amax(2)
            assert near.min(1).values.max() == 0
    assert policy.asked == 2 * PROMPTS * (4 + 1 + k * 15)


def test_judged_by_the_parents_prediction_a_tree_asks_two_fifths_of_the_published_loop_at_most():
    """Ten prompts, k = 4: 400 network samples in place of 1300."""
    g = torch.Generator().manual_seed(0)
    cond, negative = ({"text": torch.randn(10, 5, generator=g)} for _ in range(2))
    policy = Counting()
    setting = Setting(DDIM(1.0), GRID, 5.0, 4, estimate="parent")
    got = tree(Request(policy, None, cond, negative, setting), SHAPE, Streams(range(10)))
    assert policy.asked == 400 <= 0.4 * 1300
    # what is judged is the candidate less the noise that its parent saw: candidates differ as their draws do
    table = sd_path().alphas_cumprod
    for slot in (0, 7, 14):
        t, s = GRID[slot + 4], GRID[slot + 5]
        eps = guided(Counting(), got.x.x_t[:, slot, 0], float(t), cond, negative, 5.0).float()
        b = table[round(float(s) * 1000)]
        by_hand = (got.x.x_s[:, slot] - (1 - b).sqrt() * eps[:, None]) / b.sqrt()
        torch.testing.assert_close(got.judged[:, slot], by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_samples_are_those_of_the_sampler(shared):
    cond, _ = conditions()
    k = 2
    setting = Setting(DDIM(0.0), GRID, 1.0, k, shared)
    got = samples(Request(Counting(), None, cond, {}, setting), SHAPE, Streams([4, 5, 6]))
    noise = Streams([4, 5, 6]).normal(PROMPTS, (1 if shared else k, *SHAPE)).expand(-1, k, *SHAPE)
    rows = {"text": cond["text"].repeat_interleave(k, 0)}
    wanted = sample(Counting(), noise.flatten(0, 1), rows, torch.Generator(), steps=20)
    torch.testing.assert_close(got.x[:, 0].flatten(0, 1).float(), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.x, got.judged)


def test_a_prompts_samples_depend_on_its_stream_alone():
    cond, negative = conditions()
    setting = Setting(DDIM(1.0), GRID, 2.0, 2)
    whole = trajectories(Request(Counting(), None, cond, negative, setting), SHAPE, Streams([7, 8, 9]))
    last = [{name: value[2:] for name, value in rows.items()} for rows in (cond, negative)]
    alone = trajectories(Request(Counting(), None, *last, setting), SHAPE, Streams([9]))
    torch.testing.assert_close(whole.x.x_s[2:], alone.x.x_s)


def test_steps_that_are_no_draws_are_not_learnt_from():
    assert drawn_steps(Setting(DDIM(0.0), GRID), sd_path()) == 0
    assert drawn_steps(Setting(DDIM(1.0), GRID), sd_path()) == 20
    ended = torch.cat([GRID, torch.zeros(1)])  # a step from training step 0 to itself has nothing to draw
    assert drawn_steps(Setting(DDIM(1.0), ended), sd_path()) == 20
    got = trajectories(
        Request(Counting(), None, conditions()[0], {}, Setting(DDIM(1.0), ended)), SHAPE, Streams([1, 2, 3])
    )
    assert got.x.t.shape[1] == 20 and torch.isfinite(got.x.logp).all()


FLOW_GRID = torch.linspace(1, 0, 11, dtype=torch.float64)


def on_a_flow(eta=0.7, form="sde", shared=True, **changes):
    flow = Counting(path=RectifiedFlow(), target="flow")
    setting = Setting(kernel_for(flow.path, eta, form), FLOW_GRID, 1.0, 2, shared, **changes)
    return flow, setting, Request(flow, None, conditions()[0], {}, setting)


@pytest.mark.parametrize("form", ["sde", "cps", "dance"])
def test_of_a_flow_all_steps_are_draws_but_the_one_to_time_0(form):
    """The last step is the ODE's, whatever the form: the clean estimate, and nobody learns from it."""
    flow, setting, asked = on_a_flow(form=form)
    got = trajectories(asked, SHAPE, Streams([1, 2, 3]))
    assert drawn_steps(setting, flow.path) == got.x.t.shape[1] == 9
    assert torch.isfinite(got.x.logp).all() and float(got.x.s.min()) == pytest.approx(0.1)
    last = got.x.x_s[:, -1]
    x0, _ = asked.estimates(flow, last, 0.1)
    torch.testing.assert_close(got.judged[:, 0], x0)


def test_a_window_moves_round_the_trajectory():
    window = Window(4, every=3, stride=2)
    firsts = [window.steps(number, 9).start for number in range(18)]
    assert firsts == [0] * 3 + [2] * 3 + [4] * 3 + [0] * 3 + [2] * 3 + [4] * 3
    assert all(len(window.steps(number, 9)) == 4 for number in range(18))
    assert Window(4, every=0).steps(1000, 9) == range(0, 4)
    assert Window(9, every=1).steps(7, 9) == range(0, 9)
    published = Window(4)  # of 25 steps: 25 rounds each, 21 places
    assert [published.steps(25 * n, 24).start for n in (0, 1, 20, 21)] == [0, 1, 20, 0]


@pytest.mark.parametrize("number", [0, 1, 6])
def test_outside_the_window_steps_are_those_of_the_ode(number):
    flow, setting, asked = on_a_flow(shared=False, window=Window(3, every=1), round=number)
    got = trajectories(asked, SHAPE, Streams([1, 2, 3]))
    assert drawn_steps(setting, flow.path) == got.x.t.shape[1] == 3
    expected = FLOW_GRID[:-1][number : number + 3]
    torch.testing.assert_close(got.x.t[0, :, 0].double(), expected, atol=1e-6, rtol=0)
    ode = replace(setting, kernel=DDIM(), window=None)
    x = Streams([1, 2, 3]).normal(PROMPTS, (2, *SHAPE))
    walk = replace(asked, setting=ode)
    for t, s in zip(FLOW_GRID[:number].tolist(), FLOW_GRID[1 : number + 1].tolist(), strict=True):
        x, _ = walk.after(*walk.estimates(flow, x, t), t, s)
    torch.testing.assert_close(got.x.x_t[:, 0], x, check_dtype=False)
    x = got.x.x_s[:, -1]
    rest = FLOW_GRID[number + 3 :].tolist()
    for t, s in itertools.pairwise(rest):
        x, _ = walk.after(*walk.estimates(flow, x, t), t, s)
    torch.testing.assert_close(got.judged[:, 0], x)


def test_rivals_of_one_noise_are_one_up_to_the_window():
    """Nothing is asked twice where nothing differs yet: n samples a step before the draw, n K after it."""
    flow, _, asked = on_a_flow(window=Window(2, every=1), round=4)
    got = trajectories(asked, SHAPE, Streams([1, 2, 3]))
    assert flow.asked == PROMPTS * 5 + 2 * PROMPTS * 5
    assert got.shared.tolist() == [True, False]


@pytest.mark.parametrize("shape", [trajectories, tree])
def test_steps_from_low_times_are_sampled_and_not_learnt_from(shape):
    """The times of twenty steps are 0.951, 0.901, ... 0.001: thirteen are 0.351 or more, nine of them after
    four plain ones. The reference is not asked below.
    """
    cond, negative = conditions()
    every, few = Counting(), Counting()
    setting = Setting(DDIM(1.0), GRID, 1.0, 2)
    high = replace(setting, lowest=0.35)
    whole = shape(Request(Counting(), every, cond, negative, setting), SHAPE, Streams([1, 2, 3]))
    got = shape(Request(Counting(), few, cond, negative, high), SHAPE, Streams([1, 2, 3]))
    steps = 13 if shape is trajectories else 9
    assert got.x.t.shape[1] == steps == drawn_steps(high, sd_path(), 0 if shape is trajectories else 4)
    assert torch.equal(got.x.x_s, whole.x.x_s[:, :steps])
    assert torch.equal(got.judged, whole.judged[:, : got.judged.shape[1]])
    assert got.judged.shape[1] == (1 if shape is trajectories else 9)  # a tree need not be grown further
    assert len(got.verdict) == steps and few.asked < every.asked
