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
from diffalign.diffusion.noising import Forward
from diffalign.diffusion.reference_bank import Banked
from diffalign.errors import UserError
from diffalign.methods import REGISTRY
from diffalign.methods._distillation import Assisted
from diffalign.methods._trailing import Followed, Trailing, TrailingSampler
from diffalign.methods.registry import DataKind
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


def check_roles(run: Run, method: Method[Any]) -> None:
    """Check that the roles fit the run, before a model is loaded.

    Raises:
        UserError: a moving reference for a method without one, or two policies where only one is possible.
    """
    every = run.training.reference_every
    if every and not method.needs_reference:
        raise UserError(
            f"training.reference_every={every}: method {run.method['type']} has no reference; "
            "allowed with it: 0"
        )
    _check_text(run, method)
    _check_sharding(run, method)
    _check_quantized(run)
    _check_expert(run, method)
    if run.model.offload_activations:
        _refuse("model.offload_activations=True", (("model.compile", run.model.compile, False),))
    _check_bank(run, method)
    if _trailing(method) is not None:
        _refuse(
            f"method {run.method['type']}, which a moving average follows",
            (("training.reference_every", every, 0), ("strategies", tuple(run.strategies), ())),
        )
    assisted = bool(REGISTRY[run.method["type"]].assistants)
    if _chase(method) is None and not assisted:
        return
    _refuse(
        f"method {run.method['type']}, which has assistants" if assisted else "the strategy fast_slow",
        (
            ("model.train", run.model.train, "lora"),
            ("model.gradient_checkpointing", run.model.gradient_checkpointing, False),
            ("training.reference_every", every, 0),
        ),
    )


def _check_sharding(run: Run, method: Method[Any]) -> None:
    """UserError for what a run whose weights are spread does not have: all processes must ask the network
    equally often, and moments and gradients must be spread tensors.
    """
    if run.training.shard == "none":
        return
    whom = f"training.shard={run.training.shard}"
    if method.noising is None or not isinstance(method.noising, Forward):
        raise UserError(
            f"{whom} with method {run.method['type']}, whose noisy states take each process another number "
            "of network calls; allowed: training.shard none, or a method that noises forward, such as dpo"
        )
    if _chase(method) is not None:
        raise UserError(f"{whom} with the strategy fast_slow; allowed: none")
    if REGISTRY[run.method["type"]].assistants:
        raise UserError(f"{whom} with method {run.method['type']}, which has assistants; allowed: none")
    _refuse(
        whom,
        (
            ("rollout.prompts", run.rollout.prompts, ""),
            ("validation.rewards", tuple(run.validation.rewards), ()),
            ("optimizer.type", run.optimizer.type, "adamw"),
            ("model.compile", run.model.compile, False),
            ("model.offload_activations", run.model.offload_activations, False),
            ("model.lora.dora", run.model.lora.dora, False),
        ),
    )
    if run.training.mixed_precision == "fp16":
        raise UserError(f"training.mixed_precision=fp16 with {whom}; allowed: no, bf16")


def _check_quantized(run: Run) -> None:
    """UserError for what weights of 4 or 8 bits do not have: they cannot be trained or spread."""
    model = run.model
    if model.quantize != "none":
        settings = (
            ("model.train", model.train, "lora"),
            ("model.lora.dora", model.lora.dora, False),
            ("model.compile", model.compile, False),
            ("training.shard", run.training.shard, "none"),
        )
        _refuse(f"model.quantize={model.quantize}", settings)
    if model.text_encoder.quantize != "none":
        whom = f"model.text_encoder.quantize={model.text_encoder.quantize}"
        _refuse(whom, (("model.text_encoder.lora.rank", model.text_encoder.lora.rank, 0),))


def _check_expert(run: Run, method: Method[Any]) -> None:
    """UserError for what one of two experts does not have: states along all times, or a whole pipeline."""
    if run.model.expert is None:
        return
    whom = f"model.expert={run.model.expert}"
    if not isinstance(method.noising, Forward):
        raise UserError(
            f"{whom} with method {run.method['type']}, whose noisy states are at other times than the "
            "expert's, too; allowed: a method that noises forward, such as dpo"
        )
    _refuse(whom, (("model.train", run.model.train, "lora"), ("rollout.prompts", run.rollout.prompts, "")))


def _check_bank(run: Run, method: Method[Any]) -> None:
    """UserError where a reference's predictions cannot be kept: it moves, all processes must ask it together,
    or it is asked about other states than the forward noising of pairs.
    """
    if not run.data.reference_bank:
        return
    whom, card = f"data.reference_bank={run.data.reference_bank}", REGISTRY[run.method["type"]]
    kinds = (DataKind.PAIRS, DataKind.REWARDED_PAIRS, DataKind.SCORED_PAIRS)
    if not method.needs_reference or card.data not in kinds or not isinstance(method.noising, Forward):
        raise UserError(
            f"{whom} with method {card.name}; allowed: 0, or a method of pairs that noises forward and has a "
            "reference, such as dpo"
        )
    settings = (
        ("training.reference_every", run.training.reference_every, 0),
        ("training.shard", run.training.shard, "none"),
        ("strategies", tuple(run.strategies), ()),
        ("rollout.prompts", run.rollout.prompts, ""),
        ("data.stream_block", run.data.stream_block, 0),
    )
    _refuse(whom, settings)


def _check_text(run: Run, method: Method[Any]) -> None:
    """Raise a UserError where text encoders are trained and the run is online, or has two sets of adapters or
    none."""
    rank = run.model.text_encoder.lora.rank
    if not rank:
        return
    whom = f"model.text_encoder.lora.rank={rank}"
    settings = (
        ("model.train", run.model.train, "lora"),
        ("training.reference_every", run.training.reference_every, 0),
        ("rollout.prompts", run.rollout.prompts, ""),
    )
    assisted = bool(REGISTRY[run.method["type"]].assistants)
    if _trailing(method) is not None or assisted:
        why = "which has assistants" if assisted else "which a moving average follows"
        raise UserError(f"{whom} with method {run.method['type']}, {why}; allowed: 0")
    if _chase(method) is not None:
        raise UserError(f"{whom} with the strategy fast_slow; allowed: 0")
    _refuse(whom, settings)


def _refuse(whom: str, settings: Sequence[tuple[str, Any, Any]]) -> None:
    """Raise a UserError for the first (name, value, allowed) whose value is another one."""
    for name, value, allowed in settings:
        if value != allowed:
            raise UserError(f"{name}={value!r} with {whom}; allowed: {allowed!r}")


def assign_roles(
    run: Run,
    model: LoadedModel,
    method: Method[Any],
    autocast: torch.dtype | None,
    sharding: Sharding | None = None,
) -> Roles:
    """Prepare the model's network in place, and return the roles of the run.

    Args:
        sharding: how weights are spread over processes; None: each holds all.
    """
    roles = _assigned(run, model, method, autocast)
    if run.data.reference_bank:
        roles = replace(roles, reference=Banked(roles.reference))
    return roles if sharding is None else _spread(roles, sharding)


def _spread(roles: Roles, sharding: Sharding) -> Roles:
    """Return the roles with the weights of all their networks spread over the processes."""
    learned = [(name, parameter.data_ptr()) for name, parameter in roles.parameters]
    moved = {name: tensor.data_ptr() for name, tensor in roles.kept.items()}
    roles.parameters.clear()  # whole weights would stay on the accelerator as long as they are named here
    new = sharding.shard(roles.network, trained=True)
    reference = roles.reference
    if isinstance(reference, NetworkDenoiser) and reference.network is not roles.network:
        new |= sharding.shard(reference.network, trained=False)  # a copy, where all of the network is trained
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
    chase = _chase(method)
    if chase is not None:
        return _two(run, model, policy, chase)
    if names := REGISTRY[run.method["type"]].assistants:
        return _assisted(run, model, policy, names)
    single = lambda prepared: replace(policy, network=prepared)  # noqa: E731
    if REGISTRY[run.method["type"]].taught:
        teachers = teachers_of(run, model, policy, autocast)
        return Roles(network, parameters, single, teachers[0], None, {}, [], teachers=teachers)
    trailed = _trailing(method)
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


def _trailing(method: Method[Any]) -> Trailing | None:
    """Return the method without its strategies where a moving average of the policy is used."""
    own = innermost(method)
    return own if isinstance(own, Trailing) and own.trails else None


def _chase(method: Method[Any]) -> FastSlow | None:
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
