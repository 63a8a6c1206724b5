"""The assembly of runs whose policy samples itself with gradient: methods that differentiate a reward, with
decoder and rewards inside the graph, and distillations, whose rewards only compare.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.config.schema import Run
from diffalign.errors import UserError
from diffalign.methods import REGISTRY, build
from diffalign.methods._reward_gradients import Differentiating
from diffalign.methods.registry import DataKind, shape_of
from diffalign.models.decoder import load_decoder
from diffalign.models.loaded import LoadedModel
from diffalign.rewards.registry import parse
from diffalign.rewards.specs import all_weighted
from diffalign.rollout.model import PipelineRolloutModel
from diffalign.rollout.noise import NoiseSource, Rewarded
from diffalign.runs.rollouts import setting_of
from diffalign.runs.scores import usual_sum
from diffalign.training.acceleration import Accelerator
from diffalign.types import Reward

_FIXED: Mapping[str, Any] = {
    "by": "rewards",
    "advantage": "none",
    "combine": "sum",
    "normalise": "none",
    "scoring": "inline",
    "estimate": "candidate",
    "window": None,
}
"""Fields of ``rollout`` that have no effect on a method that samples itself, by the value they must have."""


def _check_fixed(run: Run, why: str, **fixed: Any) -> None:
    """Check the settings of a method that samples itself.

    Args:
        run: the run.
        why: what the method does, for the message.
        **fixed: further fields of ``rollout``, by the value they must have.

    Raises:
        UserError: another value, or a strategy.
    """
    rows = [(f"rollout.{n}", getattr(run.rollout, n), value) for n, value in {**_FIXED, **fixed}.items()]
    for place, value, allowed in (*rows, ("strategies", tuple(run.strategies), ())):
        if value != allowed:
            raise UserError(
                f"{place}={value!r} with method {run.method['type']}, {why}; allowed: {allowed!r}"
            )


def check_gradients(run: Run) -> None:
    """Check a run of reward gradients before a model is loaded.

    Raises:
        UserError: rewards without gradients or past the method's margin, or rollout settings that do not fit.
    """
    config, name = run.rollout, run.method["type"]
    method = build(run.method)
    assert isinstance(method, Differentiating)
    noise = "with" if method.eta else "without"
    why = f"which samples itself {noise} noise and differentiates the sum of rewards"
    _check_fixed(run, why, eta=method.eta)
    for reward in all_weighted(config.rewards):
        card, _ = parse(reward.spec)
        if not card.differentiable or card.video:
            raise UserError(
                f"rollout.rewards has {reward.spec!r}, which has no gradient to pixels of an image; "
                f"allowed with "
                f"method {name}: rewards that `diffalign rewards` calls differentiable"
            )
        if method.words and not card.reads_prompt:
            raise UserError(
                f"rollout.rewards has {reward.spec!r}, which ignores the prompt, with method {name}, which "
                "compares rewards under words before the prompt; allowed: rewards that read it, or no words"
            )
    usual = usual_sum(config.rewards)
    if usual and usual[0] >= method.saturation:
        part = ", in its first branch" if name == "srpo" else ""
        raise UserError(
            f"scores of {' + '.join(config.rewards)} are usually {usual[0]:.4g} to {usual[1]:.4g}, and "
            f"method {name} has no gradient from a reward of {method.saturation:.4g} on "
            f"(method.margin{part}); allowed: a larger method.margin, or smaller weights in rollout.rewards "
            "(0.05*pickscore)"
        )


def check_distillation(run: Run) -> None:
    """Check what can be told of a run of a distillation before a model is loaded.

    Raises:
        UserError: rewards where none are read, or rollout settings that do not fit.
    """
    config, card = run.rollout, REGISTRY[run.method["type"]]
    compares = card.data is DataKind.TEACHER_AND_REWARD
    why = "a distillation whose student samples itself without noise"
    _check_fixed(run, why, samples=2 if compares else 1, shared_noise=False, eta=0)
    if compares != bool(config.rewards):
        words = "one or more, which say who wins" if compares else "none: it has no preference"
        raise UserError(f"rollout.rewards={list(config.rewards)} with method {card.name}; allowed: {words}")


def noise_source(
    run: Run,
    model: LoadedModel,
    accelerator: Accelerator,
    load: Callable[[str, str], Reward],
    prompts: Sequence[str],
) -> NoiseSource:
    """Return the source of a run whose policy samples itself.

    Args:
        run: the run.
        model: the loaded pipeline; its autoencoder stays on the accelerator.
        accelerator: of this process.
        load: a reward of a spec on a device.
        prompts: those of ``check_online``.

    Raises:
        UserError: a student that learns from some micro-batches only, in several processes.
    """
    config, every = run.rollout, run.method.get("every", 1)
    if accelerator.num_processes > 1 and every > 1:
        raise UserError(
            f"method.every={every} with {accelerator.num_processes} processes, which wait for gradients of "
            "every network; allowed: 1, or one process"
        )
    return NoiseSource(
        PipelineRolloutModel(model, run.size),
        differentiable(run, model, accelerator, load) if config.rewards else None,
        prompts,
        setting_of(run, model),
        groups=run.training.batch_size,
        samples=1 if shape_of(run.method["type"], config) == "gradients" else config.samples,
        every=run.logging.every * run.training.accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        seed=run.training.seed,
    )


def differentiable(
    run: Run, model: LoadedModel, accelerator: Accelerator, load: Callable[[str, str], Reward]
) -> Rewarded:
    """Return a function that decodes latents and scores the pixels, in float32 and with gradients.

    Under ``model.gradient_checkpointing`` the decoder keeps no activations: it runs again for the backward.
    """
    device = accelerator.device
    weighted = [
        (reward.weight, load(reward.spec, str(device))) for reward in all_weighted(run.rollout.rewards)
    ]
    if run.rollout.decoder:
        decode = load_decoder(run.rollout.decoder, device, grad=True)
    else:
        model.move_encoders(device, ("vae",))

        def decode(latents: Tensor) -> Tensor:
            return model.codec.decode(model.pipeline.vae, latents)

    def rewarded(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            if run.model.gradient_checkpointing:
                pixels = checkpoint(decode, latents.float(), use_reentrant=False)
            else:
                pixels = decode(latents.float())
            pixels = pixels.repeat(len(prompts) // len(pixels), 1, 1, 1)  # decoded once for all their prompts
            scores = [weight * reward(pixels, prompts).to(device).float() for weight, reward in weighted]
        return torch.stack(scores).sum(0)

    return rewarded
