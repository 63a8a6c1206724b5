"""A policy that trails: a second set of adapters or a copy, moved, kept, resumed, and roles samples."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffalign.data.prompts.prompt_sets import read_prompts
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods._trailing import Followed
from diffalign.models.denoisers import AdaptersOff, OtherAdapter
from diffalign.models.loading import load
from diffalign.rewards import load as load_reward
from diffalign.runs.align import align
from diffalign.runs.role_checks import check_roles
from diffalign.runs.roles import assign_roles
from diffalign.runs.rollouts import online_source
from diffalign.runs.validate import read_run
from diffalign.training.acceleration import accelerator_for

TRAIL = {"limit": 0.5, "rate": 0.2}
AWM = {"type": "awm", "time": {"strata": 2, "fraction": 1.0}, "trail": TRAIL}
NFT = {"type": "diffusion_nft", "trail": TRAIL}
DGPO = {"type": "dgpo", "time": {"strata": 2, "fraction": 1.0}, "kl": 0.1, "trail": TRAIL}


def silent(line):
    pass


def small(output, method, steps=3, train="lora", **rollout):
    run = read_run("tiny_sdxl_d3po")
    few = {"prompts_per_round": 2, "samples": 2, "steps": 3, "batch_size": 4, "guidance": 1.0, "eta": 0.0}
    few |= {"lowest_time": 0.0, "shared_noise": False, "rewards": ("judge", "0.01*jpeg")}
    few |= {"advantage": "group_batch"}
    return replace(
        run,
        output=str(output),
        method=method,
        model=replace(run.model, train=train),
        rollout=replace(run.rollout, **few | rollout),
        training=replace(run.training, steps=steps, batch_size=2, accumulation=1),
        logging=replace(run.logging, every=1, trackers=()),
        checkpoint=replace(run.checkpoint, every=1, limit=0),
        validation=replace(run.validation, every=0, rewards=()),
    )


def saved(output, step, name):
    return load_file(output / "checkpoints" / f"step-{step}" / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("method", "train"),
    [(AWM, "lora"), (AWM, "full"), (NFT, "lora"), (DGPO, "lora")],
    ids=["awm", "full", "nft", "dgpo"],
)
def test_it_follows_by_the_formula_and_resumes_exactly(method, train, tmp_path):
    """d = 0.2, 0.4, 0.5 after steps 1, 2, 3; begun where the policy begins."""
    run = small(tmp_path / "run", method, train=train)
    run = replace(run, optimizer=replace(run.optimizer, learning_rate=1e-4))
    output = align(run, silent).output
    for step, decay in ((2, 0.4), (3, 0.5)):
        before, policy = saved(output, step - 1, "kept"), saved(output, step, "trainable")
        expected = {name: decay * before[name] + (1 - decay) * policy[name] for name in policy}
        for name, value in saved(output, step, "kept").items():
            torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-5)
    moved = saved(output, 3, "trainable")
    assert any(not torch.equal(v, moved[name]) for name, v in saved(output, 3, "kept").items())
    if train == "lora" and method is AWM:
        parts = replace(run, output=str(tmp_path / "parts"))
        align(replace(parts, training=replace(run.training, steps=2)), silent)
        again = align(replace(parts, resume="latest"), silent).output
        for name in ("trainable", "kept"):
            here, there = (saved(where, 3, name) for where in (output, again))
            assert all(torch.equal(here[key], there[key]) for key in here)


@pytest.mark.parametrize(("method", "samples"), [(AWM, False), (NFT, True)], ids=["awm", "nft"])
def test_the_roles_of_a_run(method, samples, tmp_path):
    """The base is adapters off, the trailing one another set; with DiffusionNFT that one samples."""
    run = small(tmp_path / "run", method)
    made, model, accelerator = build(run.method), load(run.model), accelerator_for(run.training)
    roles = assign_roles(run, model, made, None)
    assert isinstance(roles.reference, Followed) and isinstance(roles.reference.denoiser, AdaptersOff)
    assert (
        isinstance(roles.reference.trailing, OtherAdapter) and roles.reference.trailing.adapter == "reference"
    )
    assert roles.sampler is (roles.reference.trailing if samples else None)
    prompts = read_prompts(run.rollout.prompts, 4)
    source = online_source(
        run, model, roles, made, accelerator, fresh=True, load=load_reward, prompts=prompts
    )
    policy = source._roles.policy
    assert (policy is roles.sampler) if samples else policy.network is model.network
    source.close()


def test_without_a_use_for_it_nobody_trails(tmp_path):
    run = small(tmp_path / "run", {**AWM, "ema_kl": 0.0})
    roles = assign_roles(run, load(run.model), build(run.method), None)
    assert isinstance(roles.reference, AdaptersOff) and not roles.kept and not roles.hooks


def test_what_does_not_go_with_it_is_refused(tmp_path):
    run = small(tmp_path / "run", AWM)
    every = replace(run, training=replace(run.training, reference_every=1))
    with pytest.raises(UserError, match="reference_every=1 with method awm, which a moving average follows"):
        check_roles(every, build(AWM))
    with pytest.raises(UserError, match=r"strategies=.*with method awm"):
        check_roles(replace(run, strategies=({"type": "sdpo"},)), build(AWM))
