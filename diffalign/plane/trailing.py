"""Moving averages of a policy on the plane, for methods that compare with one or sample from one."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from diffalign.methods import REGISTRY
from diffalign.methods._trailing import Followed, Trail, Trailing, TrailingSampler
from diffalign.training.hooks import Hook
from diffalign.training.reference import RefreshReference
from diffalign.types import Denoiser, Method

N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Followers:
    """The reference and the sampler of a run, and the hooks that update them.

    Attributes:
        reference: the base model, together with the trailing policy if the method uses one.
        sampler: the model that samples rounds; None: the policy.
        kept: tensors that the hooks update, by name, for checkpoints.
        hooks: hooks that update them.
    """

    reference: Denoiser
    sampler: Denoiser | None
    kept: dict[str, Tensor]
    hooks: list[Hook]


def followers(method: Method[Any], base: N, denoiser_of: Callable[[N], Denoiser]) -> Followers:
    """Return reference, sampler and hooks for a method that starts from ``base``.

    Args:
        method: the method.
        base: the initial network.
        denoiser_of: makes a denoiser of a network.
    """
    card = next((card for card in REGISTRY.values() if card.method is type(method)), None)
    reference, role = denoiser_of(base), card.trailing if card else "none"
    if role == "none" or not isinstance(method, Trailing) or not method.trails:
        return Followers(reference, None, {}, [])
    beside, kept, hook = _follower(base, denoiser_of, method.trail)
    hooks, sampler = [hook], beside if role == "sampler" else None
    if role == "both" and isinstance(method, TrailingSampler):
        sampler, more, hook = _follower(base, denoiser_of, method.sampler_trail)
        hooks.append(hook)
        kept |= {f"sampler/{name}": value for name, value in more.items()}
    return Followers(Followed(reference, beside), sampler, kept, hooks)


def _follower(
    base: N, denoiser_of: Callable[[N], Denoiser], trail: Trail
) -> tuple[Denoiser, dict[str, Tensor], Hook]:
    network = copy.deepcopy(base).requires_grad_(False)
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    return denoiser_of(network), dict(tensors), RefreshReference(tensors, trail.every, trail.mix)
