"""DiffusionOPD: two implementations' numbers, what a rollout records of one teacher and of several, a run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.paths import path_from_config
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM, FlowSDE, grid_of
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods.diffusion_opd import DiffusionOPD
from diffalign.plane.plane import FLOW_SCHEDULER, Plane
from diffalign.plane.teacher import IdealTeacher
from diffalign.rollout.setting import Setting, Teachers
from diffalign.rollout.shapes import Request, drawn_steps, trajectories
from diffalign.runs.align import align
from diffalign.runs.online_checks import check_online
from diffalign.runs.validate import read_run
from diffalign.types import Batch, Transition
from tests.helpers import VECTORS, Answers, sd_path
from tests.methods.test_flow_methods import FLOW
from tests.methods.test_trust_regions import GivenStep

FILE = VECTORS / "diffusion_opd_a.npz"


def cases():
    return sorted({key.removesuffix("_mu_student") for key in np.load(FILE) if key.endswith("_mu_student")})


@pytest.mark.parametrize("form", ["verl", "kl", "ode"])
@pytest.mark.parametrize("case", cases())
def test_golden_opd(case, form):
    f = np.load(FILE)
    get = lambda name: torch.from_numpy(f[f"{case}_{name}"])  # noqa: E731
    length = get("sqrt_dt") ** 2
    std = get("std") * get("sqrt_dt")[:, None, None]
    mean, s = get("mu_student").requires_grad_(), torch.full_like(length, 0.1)
    batch = Batch(
        Transition(mean.detach(), mean.detach(), s + length, s, length),
        {},
        torch.arange(len(length)),
        torch.zeros(len(length)),
        extra={"reference_mean": get("mu_teacher")},
        kernel=GivenStep(std=std),
    )
    step = DiffusionOPD(form)(Answers(mean, FLOW, "flow"), None, batch, torch.Generator())
    step.loss.backward()
    key = {"verl": "verl", "kl": "true_kl", "ode": "ode"}[form]
    assert step.loss.item() == pytest.approx(float(f[f"{case}_loss_{key}"]), abs=1e-10)
    np.testing.assert_allclose(mean.grad.numpy(), f[f"{case}_grad_{key}"], atol=1e-10)


def shifted(by, path=FLOW):
    """Return a flow whose velocity is ``by`` everywhere."""

    class Constant:
        target = "flow"

        def __init__(self):
            self.path = path

        def __call__(self, x_t, t, cond):
            return torch.full_like(x_t, by) * cond["scale"].reshape(-1, *(1,) * (x_t.ndim - 1))

    return Constant()


def request(reference, kernel=None, prompts=3, **setting):
    kernel = kernel or DDIM()
    scale = {"scale": torch.ones(prompts)}
    settings = Setting(kernel, grid_of(FLOW, 4), samples=2, taught=True, shared_noise=False, **setting)
    return Request(shifted(0.0), reference, scale, {"scale": torch.zeros(prompts)}, settings)


def test_every_step_of_the_ode_is_recorded_with_the_teachers_answer():
    """Steps of length 1/4: the teacher of velocity 2 goes 1/2 further down than the student, who stays."""
    asked = request(shifted(2.0))
    found = trajectories(asked, (1, 2, 2), Streams([1, 2, 3]))
    assert found.x.x_t.shape == (3, 4, 2, 1, 2, 2) and drawn_steps(asked.setting, FLOW) == 4
    torch.testing.assert_close(found.reference_mean, found.x.x_t - 0.5)
    torch.testing.assert_close(found.x.x_s, found.x.x_t)
    # under its own guidance it goes as many times as far, since the negative's velocity is 0
    guided = trajectories(request(shifted(2.0), reference_guidance=3.0), (1, 2, 2), Streams([1, 2, 3]))
    torch.testing.assert_close(guided.reference_mean, found.x.x_t - 1.5)
    # where steps are draws, only those are learnt from, the last one is none
    drawn = request(shifted(2.0), FlowSDE(0.7))
    assert trajectories(drawn, (1, 2, 2), Streams([1, 2, 3])).x.x_t.shape[1] == 3
    assert not Setting(DDIM(), grid_of(FLOW, 4)).records(torch.zeros(1, 1))


def test_each_prompt_has_its_own_teacher():
    number = {"a": 0, "b": 1, "c": 0}
    teachers = Teachers(
        (shifted(2.0), shifted(-4.0)), lambda prompts: torch.tensor([number[p] for p in prompts])
    )
    found = trajectories(request(teachers.of(["a", "b", "c"])), (1, 2, 2), Streams([1, 2, 3]))
    went = (found.reference_mean - found.x.x_t).flatten(1)
    torch.testing.assert_close(went, torch.tensor([[-0.5], [1.0], [-0.5]]).expand_as(went))


def test_a_gradient_that_is_not_zero_and_ends_at_the_teacher():
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0.8, 0.4]).double()
    batch = Batch(
        Transition(x, x, t, t - 0.2, t), {}, torch.arange(2), torch.zeros(2),
        extra={"reference_mean": x - 0.2 * 0.7}, kernel=DDIM(),
    )  # fmt: skip
    for value, flat in ((0.0, False), (0.7, True)):
        v = torch.full_like(x, value).requires_grad_()
        step = DiffusionOPD()(Answers(v, FLOW, "flow"), None, batch, torch.Generator())
        step.loss.backward()
        assert step.loss.item() == pytest.approx(0.02 * (value - 0.7) ** 2, abs=1e-12)  # l^2 / 2
        assert (v.grad.abs().max().item() < 1e-12) == flat


def test_the_ideal_teacher_by_monte_carlo():
    """E[x0 | x_t] of draws of the optimum, weighted by how likely they are to have become x_t."""
    plane, tau, t = Plane(), 0.6, torch.tensor([0.5])
    path, _ = path_from_config(FLOW_SCHEDULER)
    x0 = plane.optimum(1, tau).points(200_000, torch.Generator().manual_seed(0))
    x_t = torch.tensor([[-0.4, 0.5]])
    weight = (-((x_t - 0.5 * x0) ** 2).sum(1) / (2 * 0.5**2)).softmax(0)
    mean = (weight[:, None] * x0).sum(0)
    expected = (x_t - 0.5 * mean) / 0.5 - mean
    found = IdealTeacher(path, "flow", tau)(x_t, t, {"label": torch.tensor([1])})
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    teacher = IdealTeacher(sd_path(), "eps", tau)
    eps = torch.randn(1, 2, generator=torch.Generator().manual_seed(1))
    noisy = add_noise(teacher, x0[:1], eps, torch.tensor([0.05]))
    assert (teacher(noisy, torch.tensor([0.05]), {"label": torch.tensor([1])}) - eps).abs().max() < 1.5


def small(output, **rollout):
    run = read_run("tiny_sd3_diffusion_opd")
    few = {"prompts_per_round": 2, "steps": 3, "batch_size": 4, **rollout}
    return replace(
        run,
        output=str(output),
        rollout=replace(run.rollout, **few),
        training=replace(run.training, steps=3, batch_size=2, accumulation=1),
        logging=replace(run.logging, every=1, trackers=()),
        checkpoint=replace(run.checkpoint, every=3, limit=0),
        validation=replace(run.validation, every=0, rewards=()),
    )


def test_a_run_without_a_reward_learns_from_another_run(tmp_path):
    """The student starts at distance 0 of its own base; a reward only watches."""
    output = align(small(tmp_path / "one", teachers=("tiny:sd3",)), lambda line: None).output
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert next(row["loss"] for row in rows if "loss" in row) == pytest.approx(0, abs=1e-9)
    told = []
    again = align(small(tmp_path / "two", teachers=(str(output),), rewards=("jpeg",)), told.append).output
    rows = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert any("rollout/jpeg" in row for row in rows) and len([row for row in rows if "loss" in row]) == 3


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"teachers": ()}, "rollout.teachers is empty"),
        ({"teachers": ("a", "b")}, "each with a file of its prompts"),
        ({"combine": "rank"}, "rollout.combine='rank'"),
    ],
)
def test_what_a_run_refuses(tmp_path, change, word):
    with pytest.raises(UserError, match=word):
        check_online(small(tmp_path, **change))


def test_teachers_and_prompts_must_fit(tmp_path):
    for name, lines in (("all", "a\nb\n"), ("one", "a\n"), ("two", "b\n")):
        (tmp_path / f"{name}.txt").write_text(lines)
    at = lambda name: str(tmp_path / f"{name}.txt")  # noqa: E731
    good = small(tmp_path, prompts=at("all"), teachers=(f"{at('one')}=x", f"{at('two')}=y"))
    assert check_online(good) == ["a", "b"]
    twice = small(tmp_path, prompts=at("all"), teachers=(f"{at('all')}=x", f"{at('two')}=y"))
    with pytest.raises(UserError, match=r"2 of rollout\.teachers have the prompt 'b'"):
        check_online(twice)
    other = replace(good, method={"type": "flow_grpo"})
    with pytest.raises(UserError, match="with method flow_grpo, which has no teacher"):
        check_online(other)
    point, one = torch.zeros(1, 2), torch.ones(1)
    bare = Batch(Transition(point, point, one, one, one), {}, torch.arange(1), torch.zeros(1))
    for form, kernel, extra, word in (
        ("ode", DDIM(), {}, "a teacher's steps, and this batch has none"),
        ("kl", DDIM(), {"reference_mean": torch.zeros(1, 2)}, "divides by the std"),
    ):
        batch = replace(bare, kernel=kernel, extra=extra)
        with pytest.raises(UserError, match=word):
            build({"type": "diffusion_opd", "form": form})(
                Answers(torch.zeros(1, 2), FLOW, "flow"), None, batch, torch.Generator()
            )
