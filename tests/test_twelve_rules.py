"""Twelve known pitfalls of the field, one test each, on a tiny pipeline of the real classes.

Each is tested more closely in its own area; here they stand together, through the public pieces of a run.
"""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffalign
from diffalign.config.schema import LoraConfig, ModelConfig, OptimizerConfig, TrainingConfig
from diffalign.diffusion.likelihood import elbo
from diffalign.diffusion.noising import Forward
from diffalign.diffusion.paths import path_from_config
from diffalign.diffusion.randomness import Streams
from diffalign.methods.dpo import DPO
from diffalign.models.loading import load
from diffalign.models.lora import policy_denoiser, prepare_policy, reference_denoiser
from diffalign.plane.source import TensorSource
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from diffalign.types import Batch
from tests.helpers import SD_SCHEDULER, Affine, sd_path

CONFIG = ModelConfig(path="tiny:sdxl", lora=LoraConfig(rank=4))


@pytest.fixture(scope="module")
def data():
    """Sixteen pairs of random latents with the conditions of one prompt; one is a tie."""
    model = load(CONFIG)
    g = torch.Generator().manual_seed(0)
    size = torch.full((1, 2), 32.0)
    cond = model.encode_prompts(["a large red circle"]) | model.micro_conditions(
        size, torch.zeros(1, 2), size
    )
    cond = {k: v[None].expand(16, 2, *v.shape[1:]).clone() for k, v in cond.items()}
    score = torch.tensor([[1.0, 0.0]] * 15 + [[0.5, 0.5]])
    return torch.randn(16, 2, 8, 8, 8, generator=g), score, cond


def trained(data, batch_size, accumulation, steps=2, dtype="float32", **settings):
    """Parameters after some steps, and the denoisers that were used."""
    config = replace(CONFIG, dtype=dtype)
    model = load(config)
    parameters = prepare_policy(model, config)
    policy = policy_denoiser(model, config)
    loop = TrainingConfig(steps=steps, batch_size=batch_size, accumulation=accumulation, **settings)
    x, score, cond = data
    state = train(
        method=DPO(beta=500.0),
        denoiser_of=lambda prepared: replace(policy, network=prepared),
        reference=reference_denoiser(model, policy, config),
        network=model.network,
        parameters=parameters,
        source=TensorSource(x, score, cond, batch_size=batch_size),
        settings=loop,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        accelerator=accelerator_for(loop),
    )
    return {name: p.detach().clone() for name, p in parameters}, state


def one_batch(data, pairs=3):
    x, score, cond = (data[0][:pairs], data[1][:pairs], {k: v[:pairs] for k, v in data[2].items()})
    flat = lambda t: t.flatten(0, 1)  # noqa: E731
    return Batch(
        flat(x), {k: flat(v) for k, v in cond.items()}, torch.arange(pairs).repeat_interleave(2), flat(score)
    )


@pytest.fixture(scope="module")
def half():
    """Return a tiny SDXL in bfloat16 with fresh adapters: (model, policy, reference)."""
    config = replace(CONFIG, dtype="bfloat16")
    model = load(config)
    prepare_policy(model, config)
    policy = policy_denoiser(model, config)
    return model, policy, reference_denoiser(model, policy, config)


def test_1_errors_are_float32_whatever_the_precision(data, half):
    _, policy, reference = half
    batch = one_batch(data)
    t = torch.full((6,), 0.5)
    z = Forward()(policy, batch.x, t, batch.cond, batch.group, Streams.at(0, 0, 3))
    assert policy(z.x_t, t, batch.cond).dtype == torch.bfloat16
    ll = elbo(policy, reference, z, batch.cond)
    assert ll.policy.dtype == ll.reference.dtype == torch.float32
    assert torch.equal(ll.log_ratio, torch.zeros(6))


def test_2_adapters_are_float32_over_a_bfloat16_base(half):
    model, _, _ = half
    trained_ones = [p for p in model.network.parameters() if p.requires_grad]
    assert trained_ones and all(p.dtype == torch.float32 for p in trained_ones)
    assert model.network.conv_in.weight.dtype == torch.bfloat16


def test_3_before_training_the_loss_is_log_two(data, half):
    _, policy, reference = half
    step = DPO()(policy, reference, one_batch(data), Streams.at(0, 0, 3))
    assert step.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert step.metrics["rewards/accuracies"].item() == 0.5 and step.metrics["rewards/margins"].item() == 0.0
    path, a, b = sd_path(), torch.tensor(0.3), torch.tensor(0.0)
    batch = one_batch(data)
    mirrored = replace(batch, score=1 - batch.score)
    one, other = (
        DPO(beta=5.0)(Affine(path, a, b), Affine(path, a - 0.1, b), given, Streams.at(0, 0, 3)).metrics[
            "rewards/margins"
        ]
        for given in (batch, mirrored)
    )
    assert one.item() == pytest.approx(-other.item(), rel=1e-5) and one.item() != 0


def test_4_ties_weigh_nothing_and_keep_their_place(data):
    batch = one_batch(data, pairs=16)
    path, a, b = sd_path(), torch.tensor(0.3), torch.tensor(0.0)
    step = DPO(beta=5.0)(Affine(path, a, b), Affine(path, a - 0.1, b), batch, Streams.at(0, 0, 16))
    turned = replace(batch, x=torch.cat([batch.x[:-2], batch.x[-2:].flip(0) + 1]))
    again = DPO(beta=5.0)(Affine(path, a, b), Affine(path, a - 0.1, b), turned, Streams.at(0, 0, 16))
    assert step.weight.item() == 15 and step.loss.item() == again.loss.item()


def test_5_rivals_share_time_and_noise(data, half):
    _, policy, reference = half
    batch = one_batch(data)
    twins = replace(batch, x=batch.x[::2].repeat_interleave(2, 0))
    seen = []

    class Watch:
        path, target = policy.path, policy.target

        def __call__(self, x_t, t, cond):
            seen.append((x_t, t))
            return policy(x_t, t, cond)

    DPO()(Watch(), reference, twins, Streams.at(0, 0, 3))
    x_t, t = seen[0]
    assert torch.equal(x_t[::2], x_t[1::2]) and torch.equal(t[::2], t[1::2]) and len(t.unique()) == 3


def test_6_randomness_is_an_argument(data):
    """No function of the package draws from the global generator: it stands where it stood."""
    before = torch.random.get_rng_state()
    batch = one_batch(data)
    path = sd_path()
    method = DPO(noising=Forward(noise_offset=0.1, input_perturbation=0.1))
    a, b = torch.tensor(0.3), torch.tensor(0.0)
    method(Affine(path, a, b), Affine(path, a - 0.1, b), batch, Streams.at(0, 0, 3))
    assert torch.equal(before, torch.random.get_rng_state())
    first, second = (Streams.at(0, rank, 1, "method").normal(1, (4,)) for rank in (0, 1))
    assert not torch.equal(first, second)


def test_7_a_batch_may_be_split_in_any_way(data):
    whole, _ = trained(data, batch_size=8, accumulation=1)
    split, _ = trained(data, batch_size=1, accumulation=8)
    model = load(CONFIG)
    start = {name: p.detach().clone() for name, p in prepare_policy(model, CONFIG)}
    moved = torch.cat([(whole[name] - start[name]).flatten() for name in start]).norm()
    apart = torch.cat([(whole[name] - split[name]).flatten() for name in start]).norm()
    assert apart < 2e-3 * moved  # float32 sums in another order, through Adam's division
    again, _ = trained(data, batch_size=8, accumulation=1)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_8_clipping_acts_on_the_trained_parameters(data):
    _, free = trained(data, batch_size=4, accumulation=1, steps=1, max_grad_norm=0.0)
    _, clipped = trained(data, batch_size=4, accumulation=1, steps=1, max_grad_norm=1e-3)
    moments = [[s["exp_avg"] for s in state.optimizer.state.values()] for state in (free, clipped)]
    norms = [torch.stack([m.norm() for m in each]).norm().item() / 0.1 for each in moments]  # exp_avg = 0.1 g
    assert norms[1] == pytest.approx(1e-3, rel=1e-3) and norms[0] > 2e-3


def test_9_no_micro_step_waits_for_the_device():
    """In the code between two micro-batches nothing asks a tensor for its value."""
    source = (Path(diffalign.__file__).parent / "training" / "loop.py").read_text()
    tree = ast.parse(source)
    micro = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_accumulate")
    asked = {n.attr for n in ast.walk(micro) if isinstance(n, ast.Attribute)}
    assert not asked & {"item", "tolist", "cpu", "numpy", "gather", "reduce"}


def test_10_beta_does_not_depend_on_the_size_of_the_latents(data):
    """Tiling the latents leaves every mean error, hence the loss, as it was."""
    path, a, b = sd_path(), torch.tensor(0.3), torch.tensor(0.0)
    batch = one_batch(data)
    batch = replace(batch, x=batch.x.double(), cond={})

    class Fixed:
        by, guidance = "policy", 1.0

        def __call__(self, denoiser, x0, t, cond, group, generator):
            from diffalign.diffusion.noising import add_noise
            from diffalign.types import Noised

            eps = torch.sin(7 * x0)
            return Noised(x0, eps, add_noise(denoiser, x0, eps, t), t)

    method = DPO(beta=5.0, noising=Fixed())
    big = replace(batch, x=batch.x.repeat(1, 1, 2, 2))
    small_loss, big_loss = (
        method(Affine(path, a, b), Affine(path, a - 0.1, b), each, Streams.at(0, 0, 3)).loss.item()
        for each in (batch, big)
    )
    assert small_loss == pytest.approx(big_loss, rel=1e-5)


def test_11_the_schedule_is_the_models_own_float32_table():
    path, _ = path_from_config(SD_SCHEDULER)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    assert torch.equal(path.alphas_cumprod, torch.cumprod(1 - betas, 0))
    assert path.model_time(torch.tensor([0.0, 0.001, 0.5, 0.999])).tolist() == [0, 1, 500, 999]


def test_12_every_network_call_happens_once(data, half):
    """One policy forward over winners and losers together and one of the reference, on the same network."""
    model, policy, reference = half
    calls = []
    hook = model.network.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(args[0])), with_kwargs=True
    )
    DPO()(policy, reference, one_batch(data), Streams.at(0, 0, 3))
    hook.remove()
    assert calls == [6, 6]
