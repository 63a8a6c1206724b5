"""Networks as denoisers: policy and reference are wrappers with one call. Torch only.

Predictions are neither cast nor rescaled here: losses convert the raw prediction to float32 themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from diffalign.diffusion import first_frame
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.spans import ALL, in_span
from diffalign.diffusion.wrapper import Wrapper
from diffalign.types import Cond, Path, Target

Call = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
"""(network, x_t, model_time, cond) -> raw prediction; a family's ``call`` is one."""


@dataclass(frozen=True)
class Negated:
    """A call of a network that predicts minus its target (EDM's preconditioning as in the paper)."""

    call: Call

    def __call__(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Minus the network's raw prediction, shaped like ``x_t``."""
        return -self.call(network, x_t, model_time, cond)


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network with its noising path.

    ``dataclasses.replace(denoiser, network=wrapped)`` calls the network through a wrapper such as
    DistributedDataParallel.

    Attributes:
        network: the module to call.
        path: maps t to the network's time input.
        target: what it predicts.
        call: how to call it.
        dtype: of its inputs; None leaves them unchanged.
        autocast: dtype to autocast to; None leaves that to the preparation of the network (the policy's
            trainer).
    """

    network: nn.Module
    path: Path
    target: Target
    call: Call
    dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the raw prediction, shaped like ``x_t``; in a first frame that is given the known one."""
        network = self.network
        if isinstance(network, DistributedDataParallel) and not torch.is_grad_enabled():
            # Ranks may call different numbers of times here (an inversion, a rollout): no synchronisation.
            network = network.module
        with self._precision(x_t.device.type):
            seen = x_t.to(self.dtype or x_t.dtype)
            prediction = self.call(network, seen, self.path.model_time(t), cond)
        return first_frame.known(prediction, x_t, t, cond, self.target)

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        return torch.autocast(device, self.autocast) if self.autocast is not None else nullcontext()


@dataclass(frozen=True, eq=False)
class Experts(Wrapper):
    """A network at the times at which the model asks it, and another one at the others.

    Attributes:
        denoiser: calls the first; its path says which times are its own.
        other: calls the second.
    """

    other: NetworkDenoiser

    @property
    def path(self) -> Path:
        """The path, with all times."""
        path = self.denoiser.path
        return replace(path, span=ALL) if isinstance(path, RectifiedFlow) else path

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the raw predictions, each of the network whose time it is."""
        own = in_span(self.denoiser.path, t)
        if bool(own.all()):
            return self.denoiser(x_t, t, cond)
        if not bool(own.any()):
            return self.other(x_t, t, cond)
        first, second = (
            denoiser(x_t[rows], t[rows], {name: value[rows.to(value.device)] for name, value in cond.items()})
            for denoiser, rows in ((self.denoiser, own), (self.other, ~own))
        )
        result = first.new_empty(x_t.shape)
        result[own], result[~own] = first, second.to(first)
        return result


@dataclass(frozen=True, eq=False)
class AdaptersOff(Wrapper):
    """The reference under LoRA: the same call of the same network, with its adapters disabled.

    Only a flag of each adapter layer is set, and always reset: ``requires_grad`` does not change (peft's own
    switch freezes the adapters), so a policy's forward before and its backward after are not affected.

    Attributes:
        network: the module that holds the adapters, unwrapped.
    """

    network: nn.Module

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the base network's raw prediction.

        Without gradient to anything but ``x_t``. That gradient asks the network again, adapters off, since
        the backward of a checkpointed call would see the adapters.
        """

        def call(state: Tensor) -> Tensor:
            with _passed_by(self._layers):
                return self.denoiser(state, t, cond)

        if torch.is_grad_enabled() and x_t.requires_grad:
            result: Tensor = _Again.apply(x_t, call, partial(_passed_by, self._layers))
            return result
        with torch.no_grad():
            return call(x_t)

    @cached_property
    def _layers(self) -> list[Any]:
        """The adapter layers, looked for once: a walk over all modules in each call costs time."""
        return adapter_layers(self.network)


@dataclass(frozen=True, eq=False)
class OtherAdapter(Wrapper):
    """The same call of the same network through another set of adapters: a reference that moves, a second
    policy.

    Like ``AdaptersOff`` it sets a flag of each layer and resets it.

    Attributes:
        network: the module that holds the adapters, unwrapped.
        adapter: the name of the other set.
        trained: whether it is a policy with gradients. Gradient checkpointing is then forbidden: a
            recomputation would use the first set.
    """

    network: nn.Module
    adapter: str
    trained: bool = False

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the raw prediction through the other set, without gradient unless it is trained."""
        wanted = self.trained and torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted), _through(self._layers, self.adapter):
            return self.denoiser(x_t, t, cond)

    @cached_property
    def _layers(self) -> list[Any]:
        """The adapter layers, looked for once."""
        return adapter_layers(self.network)


def adapter_layers(network: nn.Module) -> list[Any]:
    """Return the peft layers of a network."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def adapters_off(network: nn.Module) -> AbstractContextManager[None]:
    """Pass by every peft layer of ``network`` inside the context."""
    return _passed_by(adapter_layers(network))


class _Again(torch.autograd.Function):
    """A call whose gradient to its input is taken of a second call, both and the backward in a context."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        call: Callable[[Tensor], Tensor],
        context: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        """Return the call's result."""
        ctx.call, ctx.context = call, context
        ctx.save_for_backward(x)
        return call(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient to the input."""
        (x,) = ctx.saved_tensors
        with ctx.context(), torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(ctx.call(x), x, cotangents)
        return gradient, None, None


@contextmanager
def _through(layers: list[Any], adapter: str) -> Iterator[None]:
    """Send every layer through one named set of adapters inside the context."""
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [adapter]
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._active_adapter = value


@contextmanager
def _passed_by(layers: list[Any]) -> Iterator[None]:
    """Disable the adapters of every layer inside the context."""
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
