"""Who plays in a run: the policy (or two of them), the reference, and what moves besides the optimizer.

Here and nowhere else it is decided what stands in a network: adapters or all of it, a reference as adapters
off, a copy, or a second set of adapters that follows; a policy that trails beside the reference; a second
policy for fast-slow chasing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config.schema import Run
from diffalign.errors import UserError
from diffalign.methods import REGISTRY
from diffalign.methods._trailing import Followed
from diffalign.models.denoisers import AdaptersOff, NetworkDenoiser, OtherAdapter
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora import (
    SECOND,
    add_second_adapter,
    following_reference,
    policy_denoiser,
    prepare_policy,
    reference_denoiser,
    trainable,
)
from diffalign.strategies._common import Wrapped
from diffalign.strategies.fast_slow import FastSlow, Twin
from diffalign.training.exchange import Exchange
from diffalign.training.hooks import Hook
from diffalign.training.reference import RefreshReference
from diffalign.types import Denoiser


@dataclass(frozen=True)
class Players:
    """What training is given.

    Attributes:
        parameters: what the optimizer moves, by name.
        policy_of: the policy, given the prepared network.
        reference: the reference; the policy itself where none is needed.
        base: what held-out pairs are held against where the reference moves; None: the reference.
        kept: what hooks move and checkpoints keep, by name.
        hooks: who moves it.
        sampler: who samples what is learnt from; None: the policy.
    """

    parameters: list[tuple[str, nn.Parameter]]
    policy_of: Callable[[nn.Module], Denoiser]
    reference: Denoiser
    base: Denoiser | None
    kept: dict[str, Tensor]
    hooks: list[Hook]
    sampler: Denoiser | None = None


def check_players(run: Run, method: Any) -> None:
    """What can be told before a model is loaded.

    Raises:
        UserError: a reference that should move where there is none, or two policies where there cannot be.
    """
    every = run.training.reference_every
    if every and not method.needs_reference:
        raise UserError(
            f"training.reference_every={every}: method {run.method['type']} has no reference; "
            "allowed with it: 0"
        )
    card = REGISTRY[run.method["type"]]
    if card.trailing != "none":
        _refuse(
            f"method {card.name}, which a moving average follows",
            (("training.reference_every", every, 0), ("strategies", tuple(run.strategies), ())),
        )
    if _chase(method) is None:
        return
    _refuse(
        "the strategy fast_slow",
        (
            ("model.train", run.model.train, "lora"),
            ("model.gradient_checkpointing", run.model.gradient_checkpointing, False),
            ("training.reference_every", every, 0),
        ),
    )


def _refuse(whom: str, settings: Sequence[tuple[str, Any, Any]]) -> None:
    """UserError for the first (name, value, what alone is allowed) that is something else."""
    for name, value, allowed in settings:
        if value != allowed:
            raise UserError(f"{name}={value!r} with {whom}; allowed: {allowed!r}")


def players(run: Run, model: LoadedModel, method: Any, autocast: torch.dtype | None) -> Players:
    """Prepare the model's network in place, and name everyone."""
    parameters = prepare_policy(model, run.model, run.training.seed)
    policy = policy_denoiser(model, run.model)
    chase = _chase(method)
    if chase is not None:
        return _two(run, model, policy, chase)
    single = lambda prepared: replace(policy, network=prepared)  # noqa: E731
    role = REGISTRY[run.method["type"]].trailing
    if role != "none" and method.trails:
        trailing, kept = following_reference(model, policy, run.model, autocast, soft=True)
        reference = Followed(reference_denoiser(model, policy, run.model, autocast), trailing)
        hook = RefreshReference(kept, method.trail.every, method.trail.mix)
        sampler = trailing if role == "sampler" else None
        return Players(parameters, single, reference, None, kept, [hook], sampler)
    every, mix = run.training.reference_every, run.training.reference_mix
    if not method.needs_reference:
        return Players(parameters, single, policy, None, {}, [])
    if not every:
        return Players(
            parameters, single, reference_denoiser(model, policy, run.model, autocast), None, {}, []
        )
    moving, kept = following_reference(model, policy, run.model, autocast, soft=mix < 1)
    base = AdaptersOff(policy, model.network) if run.model.train == "lora" else None
    return Players(parameters, single, moving, base, kept, [RefreshReference(kept, every, mix)])


def _chase(method: Any) -> FastSlow | None:
    strategy = method.strategy if isinstance(method, Wrapped) else None
    return strategy if isinstance(strategy, FastSlow) else None


def _two(run: Run, model: LoadedModel, policy: NetworkDenoiser, chase: FastSlow) -> Players:
    fellows = add_second_adapter(model.network, run.model.lora, run.training.seed + 1)
    tally = torch.zeros(3, device=model.device)

    def both(prepared: nn.Module) -> Denoiser:
        fast = replace(policy, network=prepared)
        return Twin(fast, OtherAdapter(fast, model.network, SECOND, trained=True), tally)

    return Players(
        trainable(model.network),
        both,
        AdaptersOff(policy, model.network),
        None,
        {"fast_slow/tally": tally},
        [Exchange(fellows, tally, chase.every)],
    )
