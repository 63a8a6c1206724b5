"""The roles of a run: the policy (or two of them), the reference, and weights that hooks update.

Only this module decides how they share a network: adapters or full training; a reference that is the network
without adapters, a copy, or a second set of adapters that follows; a moving average beside the reference; a
second policy for fast-slow chasing; assistants that follow what the policy samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config.schema import Run
from diffalign.diffusion.reference_bank import Banked
from diffalign.methods import REGISTRY
from diffalign.methods._distillation import Assisted
from diffalign.methods._trailing import Followed, Trailing, TrailingSampler
from diffalign.models.context import share_tokens
from diffalign.models.denoisers import AdaptersOff, NetworkDenoiser, OtherAdapter
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora import (
    SAMPLER,
    SECOND,
    add_second_adapter,
    following_reference,
    policy_denoiser,
    prepare_policy,
    reference_denoiser,
    trainable,
)
from diffalign.models.text_encoders import call_conditioned
from diffalign.models.text_lora import prepare_text_policy
from diffalign.runs.teachers import teachers_of
from diffalign.strategies._common import Wrapped, innermost
from diffalign.strategies.fast_slow import FastSlow, Twin
from diffalign.training.exchange import Exchange
from diffalign.training.hooks import Hook
from diffalign.training.reference import RefreshReference
from diffalign.training.sharding import Sharding
from diffalign.types import Denoiser, Method


@dataclass(frozen=True)
class Roles:
    """The networks of a training.

    Attributes:
        network: the module that is trained: the network, with the text encoders where they are trained too.
        parameters: what the optimizer moves, by name.
        policy_of: (prepared network) -> policy.
        reference: the reference; the policy itself where none is needed.
        base: the reference of held-out pairs where the run's own moves; None: the run's own.
        kept: tensors that hooks change and checkpoints keep, by name.
        hooks: update ``kept``.
        sampler: the denoiser that samples an online run's rounds; None: the policy.
        teachers: of a method that learns from them, in the order of ``rollout.teachers``.
    """

    network: nn.Module
    parameters: list[tuple[str, nn.Parameter]]
    policy_of: Callable[[nn.Module], Denoiser]
    reference: Denoiser
    base: Denoiser | None
    kept: dict[str, Tensor]
    hooks: list[Hook]
    sampler: Denoiser | None = None
    teachers: tuple[Denoiser, ...] = ()


def assign_roles(
    run: Run,
    model: LoadedModel,
    method: Method[Any],
    autocast: torch.dtype | None,
    sharding: Sharding | None = None,
    context: Any = None,
) -> Roles:
    """Prepare the model's network in place, and return the roles of the run.

    Args:
        sharding: how weights are spread over processes; None: each holds all.
        context: the mesh of processes that share tokens; None: each computes all of its rows.
    """
    roles = _assigned(run, model, method, autocast)
    if context is not None:
        for network in _networks(roles):
            share_tokens(network, context)
    if run.data.reference_bank:
        roles = replace(roles, reference=Banked(roles.reference))
    return roles if sharding is None else _spread(roles, sharding)


def _networks(roles: Roles) -> list[nn.Module]:
    """Return the network that is trained, and the reference's where it is a copy."""
    reference = roles.reference
    other = reference.network if isinstance(reference, NetworkDenoiser) else roles.network
    return [roles.network] if other is roles.network else [roles.network, other]


def _spread(roles: Roles, sharding: Sharding) -> Roles:
    """Return the roles with the weights of all their networks spread over the processes."""
    learned = [(name, parameter.data_ptr()) for name, parameter in roles.parameters]
    moved = {name: tensor.data_ptr() for name, tensor in roles.kept.items()}
    roles.parameters.clear()  # whole weights would stay on the accelerator as long as they are named here
    new: dict[int, nn.Parameter] = {}
    for network in _networks(roles):
        new |= sharding.shard(network, trained=network is roles.network)
    parameters = [(name, new[address]) for name, address in learned]
    kept = {name: new[address].detach() for name, address in moved.items()}
    # what moves the reference must move its spread tensors
    hooks = [hook.of(kept) if isinstance(hook, RefreshReference) else hook for hook in roles.hooks]
    return replace(roles, parameters=parameters, kept=kept, hooks=hooks)


def _assigned(run: Run, model: LoadedModel, method: Method[Any], autocast: torch.dtype | None) -> Roles:
    parameters = prepare_policy(model, run.model, run.training.seed)
    policy = policy_denoiser(model, run.model)
    if model.trained_encoders:
        joint, more = prepare_text_policy(model, run.model, run.training.seed)
        parameters += more
        policy = replace(policy, network=joint, call=call_conditioned)
    network = policy.network
    chase = chase_of(method)
    if chase is not None:
        return _two(run, model, policy, chase)
    if names := REGISTRY[run.method["type"]].assistants:
        return _assisted(run, model, policy, names)
    single = lambda prepared: replace(policy, network=prepared)  # noqa: E731
    if REGISTRY[run.method["type"]].taught:
        teachers = teachers_of(run, model, policy, autocast)
        return Roles(network, parameters, single, teachers[0], None, {}, [], teachers=teachers)
    trailed = trailing_of(method)
    if trailed is not None:
        held = reference_denoiser(model, policy, run.model, autocast)
        trailing, kept = following_reference(model, policy, run.model, autocast, soft=True)
        hooks: list[Hook] = [RefreshReference(kept, trailed.trail.every, trailed.trail.mix)]
        role = REGISTRY[run.method["type"]].trailing
        sampler = trailing if role == "sampler" else None
        if role == "both" and isinstance(trailed, TrailingSampler):
            trail = trailed.sampler_trail
            sampler, beside = following_reference(
                model, policy, run.model, autocast, soft=True, adapter=SAMPLER
            )
            hooks.append(RefreshReference(beside, trail.every, trail.mix))
            kept = kept | {f"{SAMPLER}/{name}": value for name, value in beside.items()}
        return Roles(network, parameters, single, Followed(held, trailing), None, kept, hooks, sampler)
    every, mix = run.training.reference_every, run.training.reference_mix
    if not method.needs_reference:
        return Roles(network, parameters, single, policy, None, {}, [])
    if not every:
        fixed = reference_denoiser(model, policy, run.model, autocast)
        return Roles(network, parameters, single, fixed, None, {}, [])
    moving, kept = following_reference(model, policy, run.model, autocast, soft=mix < 1)
    base = AdaptersOff(policy, model.network) if run.model.train == "lora" else None
    return Roles(network, parameters, single, moving, base, kept, [RefreshReference(kept, every, mix)])


def trailing_of(method: Method[Any]) -> Trailing | None:
    """Return the method without its strategies where a moving average of the policy is used."""
    own = innermost(method)
    return own if isinstance(own, Trailing) and own.trails else None


def chase_of(method: Method[Any]) -> FastSlow | None:
    """Return the strategy fast_slow of a method; None without it."""
    strategy = method.strategy if isinstance(method, Wrapped) else None
    return strategy if isinstance(strategy, FastSlow) else None


def _assisted(run: Run, model: LoadedModel, policy: NetworkDenoiser, names: Sequence[str]) -> Roles:
    """Return the roles of a student with assistants: sets of adapters on one frozen base, the teacher."""
    for number, name in enumerate(names, start=1):
        add_second_adapter(model.network, run.model.lora, run.training.seed + number, name)

    def student(prepared: nn.Module) -> Denoiser:
        own = replace(policy, network=prepared)
        return Assisted(own, {name: OtherAdapter(own, model.network, name, trained=True) for name in names})

    teacher = AdaptersOff(policy, model.network)
    return Roles(model.network, trainable(model.network), student, teacher, None, {}, [])


def _two(run: Run, model: LoadedModel, policy: NetworkDenoiser, chase: FastSlow) -> Roles:
    fellows = add_second_adapter(model.network, run.model.lora, run.training.seed + 1)
    tally = torch.zeros(3, device=model.device)

    def both(prepared: nn.Module) -> Denoiser:
        fast = replace(policy, network=prepared)
        return Twin(fast, OtherAdapter(fast, model.network, SECOND, trained=True), tally)

    return Roles(
        model.network,
        trainable(model.network),
        both,
        AdaptersOff(policy, model.network),
        None,
        {"fast_slow/tally": tally},
        [Exchange(fellows, tally, chase.every)],
    )
