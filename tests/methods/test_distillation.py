"""Distillation-DPO and Diff-Instruct: golden vectors of the student's loss, a case in closed form, the
assistants' losses, and whose parameters each loss reaches.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Listed
from diffalign.errors import UserError
from diffalign.losses.distillation import along_scores
from diffalign.methods import build
from diffalign.methods._distillation import Assisted
from diffalign.methods.diff_instruct import DiffInstruct
from diffalign.methods.distillation_dpo import DistillationDPO
from diffalign.types import Batch, Stateful
from tests.helpers import VECTORS

GOLDEN = np.load(VECTORS / "distillation_dpo.npz")


@dataclass
class Student:
    """A flow that lands on ``x`` in one step, whatever the noise."""

    x: torch.Tensor
    path: RectifiedFlow = RectifiedFlow()
    target: str = "flow"

    def __call__(self, x_t, t, cond):
        return x_t - self.x


@dataclass
class Says:
    """A network that says given noises, one call after another."""

    answers: list
    path: RectifiedFlow = RectifiedFlow()
    target: str = "eps"
    calls: list = field(default_factory=list)

    def __call__(self, x_t, t, cond):
        self.calls.append((x_t, t))
        return self.answers[(len(self.calls) - 1) % len(self.answers)]


def golden(case):
    return lambda key: torch.from_numpy(GOLDEN[f"{case}_{key}"])


def pairs_of(x, scores, **changes):
    """Return the batch of pairs side by side."""
    return Batch(
        torch.zeros_like(x),
        {},
        torch.arange(len(x) // 2).repeat_interleave(2),
        torch.zeros(len(x)),
        grid=torch.tensor([1.0, 0.0], dtype=torch.float64),
        value=lambda latents, rows: torch.as_tensor(scores),
        **changes,
    )


def case(name, scores=(1.0, 0.0)):
    """Return (student's samples with gradient, policy, teacher, batch) of a golden case."""
    at = golden(name)
    x = torch.stack([at("x_w"), at("x_l")], 1).flatten(0, 1).requires_grad_()
    better, worse = Says([at("aux_better")]), Says([at("aux_worse")])
    policy = Assisted(Student(x), {"better": better, "worse": worse})
    return x, policy, Says([at("teacher_w"), at("teacher_l")]), pairs_of(x, list(scores) * 2)


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_the_intended_loss_and_its_gradient(name):
    at = golden(name)
    x, policy, teacher, batch = case(name)
    step = DistillationDPO()(policy, teacher, batch, Streams.at(0, 0, 2))
    assert step.metrics["distillation/student"].item() == pytest.approx(float(at("loss_intended")), abs=1e-12)
    step.loss.backward()
    for i, side in enumerate("wl"):
        torch.testing.assert_close(x.grad[i::2], at(f"grad_{side}_intended"), rtol=1e-10, atol=1e-12)
    assert x.grad.abs().max() > 0 and step.weight == 2


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_the_released_loss_has_no_gradient(name):
    """Why it is not what is built: the detached difference times the noise alone."""
    at = golden(name)
    x = at("x_w").clone().requires_grad_()
    noised = x + (1 - at("alphabar")).sqrt() * at("noise")
    other = at("x_l") + (1 - at("alphabar")).sqrt() * at("noise")
    loss = ((at("teacher_w") - at("aux_better")) * (noised - x)).mean()
    loss = loss - ((at("teacher_l") - at("aux_worse")) * (other - at("x_l"))).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(at("loss_as_released")), abs=1e-12)
    assert x.grad.abs().max() < 1e-15 and at("grad_w_as_released").abs().max() == 0


def test_who_wins_turns_the_sign_where_the_assistants_agree():
    grads = []
    for scores in ((1.0, 0.0), (0.0, 1.0)):
        at = golden("a1_a")
        x, policy, _, batch = case("a1_a", scores)
        both = Says([at("aux_better")])
        policy = replace(policy, assistants={"better": both, "worse": both})
        step = DistillationDPO()(policy, Says([at("teacher_w")]), batch, Streams.at(0, 0, 2))
        step.loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], -grads[1])


def test_a_tie_teaches_nothing_and_equal_scores_move_nothing():
    x, policy, teacher, batch = case("a1_a", (0.5, 0.5))
    step = DistillationDPO()(policy, teacher, batch, Streams.at(0, 0, 2))
    assert step.weight == 0 and step.loss == 0
    at = golden("a1_a")
    x, policy, _, batch = case("a1_a")
    teacher = Says([at("aux_better"), at("aux_worse")])
    DistillationDPO()(policy, teacher, batch, Streams.at(0, 0, 2)).loss.backward()
    assert x.grad.abs().max() == 0


def test_crossed_assistants_and_the_weight_of_losers():
    at = golden("a2_a")
    x, policy, teacher, batch = case("a2_a")
    step = DistillationDPO(assistants="crossed", losers=0.5)(policy, teacher, batch, Streams.at(0, 0, 2))
    step.loss.backward()
    n = at("x_w").numel()
    torch.testing.assert_close(x.grad[0::2], (at("teacher_w") - at("aux_worse")) / n)
    torch.testing.assert_close(x.grad[1::2], -0.5 * (at("teacher_l") - at("aux_better")) / n)


def test_rivals_share_time_and_noise_and_assistants_have_their_own():
    x, policy, teacher, batch = case("a1_a")
    DistillationDPO()(policy, teacher, batch, Streams.at(0, 0, 2))
    better, worse = (policy.assistants[name].calls for name in ("better", "worse"))
    (w, t_w), (loser, t_l) = teacher.calls
    assert torch.equal(t_w, t_l) and torch.equal(better[0][0], w) and torch.equal(worse[0][0], loser)
    noise = [
        (a - (1 - t[:, None, None]) * side.detach())
        for a, t, side in ((w, t_w, x[0::2]), (loser, t_l, x[1::2]))
    ]
    torch.testing.assert_close(noise[0], noise[1])
    assert not torch.equal(better[1][1], t_w) and not torch.equal(better[1][1], worse[1][1])


def test_the_assistants_errors_by_hand():
    """Their own times and noises are what is left of the noised samples."""
    x, policy, teacher, batch = case("a1_a")
    step = DistillationDPO()(policy, teacher, batch, Streams.at(0, 0, 2))
    for i, name in enumerate(("better", "worse")):
        x_t, t = policy.assistants[name].calls[1]
        t = t[:, None, None]
        eps = (x_t - (1 - t) * x.detach()[i::2]) / t
        wanted = ((policy.assistants[name].answers[0] - eps) ** 2).mean()
        assert step.metrics[f"distillation/{name}"].item() == pytest.approx(wanted.item(), rel=1e-9)


def test_each_loss_reaches_its_own_network():
    def line(weight):
        return torch.full((1,), weight, dtype=torch.float64, requires_grad=True)

    @dataclass
    class Linear:
        w: torch.Tensor
        path: RectifiedFlow = RectifiedFlow()
        target: str = "eps"

        def __call__(self, x_t, t, cond):
            return self.w * x_t

    student, better, worse, teacher = (line(w) for w in (0.3, 0.4, 0.5, 0.6))
    noise = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = Assisted(
        replace(Linear(student), target="flow"), {"better": Linear(better), "worse": Linear(worse)}
    )
    batch = replace(pairs_of(noise, [1.0, 0.0] * 3), x=noise)
    step = DistillationDPO(last=None)(policy, Linear(teacher), batch, Streams.at(0, 0, 3))
    grads = torch.autograd.grad(step.loss, [student, better, worse, teacher], allow_unused=True)
    assert all(g.abs() > 0 for g in grads[:3]) and grads[3] is None
    alone = torch.autograd.grad(
        DistillationDPO(last=None)(policy, Linear(better.detach()), batch, Streams.at(0, 0, 3)).loss, [better]
    )
    torch.testing.assert_close(alone[0], grads[1])  # whatever the teacher says


def test_plain_distillation_of_gaussians_in_closed_form():
    """Student N(theta, 1), teacher N(m, 1): the gradient is sigma alpha (theta - m) / (alpha^2 + sigma^2)."""

    @dataclass
    class Gaussian:
        mean: float
        path: RectifiedFlow = RectifiedFlow()
        target: str = "eps"

        def __call__(self, x_t, t, cond):
            alpha, sigma = (1 - t)[:, None], t[:, None]
            return sigma * (x_t - alpha * self.mean) / (alpha**2 + sigma**2)

    theta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(32, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        noise, {}, torch.arange(32), torch.zeros(32), grid=torch.tensor([1.0, 0.0], dtype=torch.float64)
    )
    student = Student(theta + noise)
    step = DiffInstruct(time=Listed((0.4,)))(
        Assisted(student, {"assistant": Gaussian(1.5)}), Gaussian(-0.5), batch, Streams.at(0, 0, 32)
    )
    (gradient,) = torch.autograd.grad(step.loss, [theta])
    assert gradient.item() == pytest.approx(0.4 * 0.6 * 2.0 / (0.6**2 + 0.4**2), rel=1e-6)
    assert step.weight == 32


def test_the_second_noise_of_a_pair_may_be_made_of_the_first():
    seen = []

    @dataclass
    class Watches(Student):
        def __call__(self, x_t, t, cond):
            seen.append(x_t)
            return super().__call__(x_t, t, cond)

    x, policy, teacher, batch = case("a1_a")
    policy = replace(policy, denoiser=Watches(x))
    batch = replace(batch, x=torch.arange(4.0, dtype=torch.float64)[:, None, None].expand(4, 6, 3) + 1)
    DistillationDPO(scale=1.1)(policy, teacher, batch, Streams.at(0, 0, 2))
    assert seen[0][:, 0, 0].tolist() == pytest.approx([1.0, 1.1, 3.0, 3.3])


def test_the_student_learns_from_some_batches_and_the_assistants_from_all():
    method = DistillationDPO(every=3)
    assert isinstance(method, Stateful)
    learnt = []
    for _ in range(4):
        x, policy, teacher, batch = case("a1_a")
        for assistant in policy.assistants.values():
            assistant.answers[0].requires_grad_()
        method(policy, teacher, batch, Streams.at(0, 0, 2)).loss.backward()
        assert all(a.answers[0].grad.abs().max() > 0 for a in policy.assistants.values())
        learnt.append(x.grad is not None)
    assert learnt == [False, False, True, False] and method.state_dict() == {"calls": 4}
    again = DistillationDPO(every=3)
    again.load_state_dict(method.state_dict())
    assert [again.learns() for _ in range(2)] == [False, True]


def test_a_batch_is_its_pairs_one_by_one():
    at = golden("a1_a")
    x, policy, teacher, batch = case("a1_a")
    whole = DistillationDPO()(policy, teacher, batch, Streams.at(0, 0, 2))
    alone = []
    for i in range(2):
        rows = slice(2 * i, 2 * i + 2)
        helpers = {"better": Says([at("aux_better")[i : i + 1]]), "worse": Says([at("aux_worse")[i : i + 1]])}
        says = Says([at("teacher_w")[i : i + 1], at("teacher_l")[i : i + 1]])
        one = pairs_of(x[rows].detach(), [1.0, 0.0])
        alone.append(
            DistillationDPO()(Assisted(Student(x[rows]), helpers), says, one, Streams.at(0, i, 1)).loss
        )
    assert whole.loss.item() == pytest.approx(sum(loss.item() for loss in alone) / 2, rel=1e-6)


def test_the_loss_is_finite_in_half_precision():
    x = torch.full((2, 3), 2.0, dtype=torch.bfloat16, requires_grad=True)
    loss = along_scores(
        x, torch.full((2, 3), 1.0, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)
    )
    assert loss.dtype == torch.float32 and loss.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "distillation_dpo", "losers": -1}, "method.losers=-1"),
        ({"type": "distillation_dpo", "scale": 0}, "method.scale=0"),
        ({"type": "distillation_dpo", "assistants": "both"}, "assistants"),
        ({"type": "diff_instruct", "last": 0}, "method.last=0"),
        ({"type": "diff_instruct", "every": 0}, "method.every=0"),
        ({"type": "diff_instruct", "guidance": -1}, "method.guidance=-1"),
    ],
)
def test_settings_out_of_range(values, words):
    with pytest.raises(UserError, match=words):
        build(values)


def test_a_policy_without_assistants_is_refused():
    _, policy, teacher, batch = case("a1_a")
    with pytest.raises(UserError, match="needs an assistant 'better'"):
        DistillationDPO()(policy.denoiser, teacher, batch, Streams.at(0, 0, 2))
