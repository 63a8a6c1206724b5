"""The types of diffalign: what data, models, methods and training pass to each other.

Axes, here and in every docstring: B samples, G groups, P pairs, S units (segments, patches, steps), ``*d``
the latent axes (C H W for an image, C F H W for a video, 2 for the plane).

Time ``t`` is a float in [0, 1]: 0 is data, 1 is noise. A variance-preserving path of N training steps reads
its table at index ``round(t * N)``; on a flow path sigma is ``t``.

This module imports torch and jaxtyping only, so that every other module may import it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Cond = Mapping[str, Tensor]
"""Conditions of the network by name, every tensor (B, ...): ``encoder_hidden_states``, ``time_ids``, ..."""

Target = Literal["eps", "x0", "v", "flow"]
"""What a network predicts: the noise, the clean latents, v = alpha eps - sigma x0, or the flow velocity
eps - x0.
"""


class Noised(NamedTuple):
    """Clean latents x0, their noise eps and the noisy state x_t, each (B, *d), at times ``t`` (B,)."""

    x0: Tensor
    eps: Tensor
    x_t: Tensor
    t: Tensor


class Transition(NamedTuple):
    """Recorded sampler steps x_t -> x_s with s < t, and their log-density ``logp`` (B,) when drawn."""

    x_t: Tensor
    x_s: Tensor
    t: Tensor
    s: Tensor
    logp: Tensor


X = TypeVar("X", Tensor, Transition)

Kernel = Callable[["Denoiser", Tensor, Tensor, Tensor, Cond], tuple[Tensor, Tensor]]
"""(denoiser, x_t, t, s, cond) -> (mean (B, *d), std (B, 1, ...)) of p(x_s | x_t): see
``diffusion.samplers``.
"""

Value = Callable[..., Tensor]
"""A differentiable reward: (clean latents (N, *d), their rows of the batch (N,)) -> rewards (N,).

With ``words``, W sequences of N words, it returns the rewards (W, N) under the prompts "word. prompt".
"""


@dataclass(frozen=True)
class Batch(Generic[X]):
    """Samples with their conditions, groups of rivals and scores.

    A pair is a group of two, a single like a group of one, a ranked list a group of K; dense labels have one
    score column per segment. The order within a group has no meaning; equal scores are a tie.

    Attributes:
        x: clean latents (B, *d), or recorded transitions.
        cond: conditions of the network, every tensor (B, ...).
        group: (B,) int64 group ids 0 .. G-1, equal for rivals. On the CPU, so that reading them does not wait
            for the accelerator.
        score: (B, *unit), higher is better.
        negative: negative conditions of classifier-free guidance, every tensor (B, ...); names that it lacks
            are taken from ``cond``. Empty without guidance.
        extra: data of single methods by name, every tensor (B, ...): ``reward`` (scores of reward models
            beside the label), ``patches`` (weight maps), ``votes`` (share of people who preferred the sample
            to its rivals, NaN without votes); of transitions ``reference_mean`` (B, *d, mean of the
            reference's step, recorded in the rollout), ``drawn_mean`` (B, *d, mean of the step as drawn) and
            ``advantage`` (B,).
        kernel: kernel that drew the transitions, and that scores them.
        guidance: guidance scale under which the transitions were drawn.
        state: (B,) int64 ids on the CPU; transitions of one id have equal x_t, t and conditions, and the
            network is called once for them. None: all differ.
        grid: (T + 1,) descending sampling times of rollout samples, on the CPU.
        beside: real samples beside the rollout samples, for methods that use both.
        draws: one number per group that determines its random draws (noise bank); None: no bank.
        value: reward of samples that the method draws itself, by ``kernel`` along ``grid`` from noise ``x``.
    """

    x: X
    cond: Cond
    group: Int[Tensor, " B"]
    score: Float[Tensor, " B *unit"]
    negative: Cond = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    kernel: Kernel | None = None
    guidance: float = 1.0
    state: Int[Tensor, " B"] | None = None
    grid: Float[Tensor, " S"] | None = None
    beside: "Batch[Tensor] | None" = None
    value: Value | None = None
    draws: Sequence[int] | None = None

    @property
    def num_groups(self) -> int:
        """The number G of groups."""
        return int(self.group.max()) + 1 if self.group.numel() else 0

    def select(self, index: Tensor) -> "Batch[X]":
        """Return the samples ``index`` (N,), in that order, each in its own group."""
        state = None if self.state is None else self.state[index.cpu()]
        here = index.to(self.score.device, non_blocking=self.score.device.type != "cpu")
        return self._map(lambda x: x[here.to(x.device)], group=torch.arange(len(index)), state=state)

    def to(self, device: torch.device | str) -> "Batch[X]":
        """Return the batch with its data on ``device``; ``group`` and ``state`` stay on the CPU."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return moved if self.beside is None else replace(moved, beside=self.beside.to(device))

    def _map(self, function: Callable[[Tensor], Tensor], **others: Tensor | None) -> "Batch[X]":
        """Apply ``function`` to every tensor except ``group`` and ``state``; ``others`` replaces fields."""
        named = lambda tensors: {name: function(value) for name, value in tensors.items()}  # noqa: E731
        return replace(
            self,
            x=Transition(*map(function, self.x)) if isinstance(self.x, Transition) else function(self.x),
            cond=named(self.cond),
            score=function(self.score),
            negative=named(self.negative),
            extra=named(self.extra),
            **others,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood estimates of the same samples under the policy and the reference, each (B, *unit)."""

    policy: Tensor
    reference: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """The log-ratio log p_policy - log p_reference of each sample, (B, *unit)."""
        return self.policy - self.reference


@dataclass(frozen=True)
class Step:
    """Result of a method for one batch.

    Attributes:
        loss: scalar to minimise, a mean over ``weight`` terms.
        metrics: detached scalars to log, each a mean over the same terms.
        weight: number of terms of the mean; a tie is none. The training loop weights micro-batches and ranks
            by it, so that the gradient does not depend on how a batch is split.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    weight: Tensor


@runtime_checkable
class Random(Protocol):
    """A source of random numbers; it is an argument everywhere, never global state.

    ``diffusion.randomness.Streams`` has one independent stream per group, so that a group's draws do not
    depend on its batch, rank or micro-step. Wherever a Random is accepted, so is a ``torch.Generator``.
    """

    def uniform(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 draws from U[0, 1) on the CPU."""
        ...

    def normal(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 draws from N(0, 1) on the CPU."""
        ...


@runtime_checkable
class Path(Protocol):
    """A noising path x_t = alpha(t) x0 + sigma(t) eps."""

    def coefficients(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return (alpha, sigma) at ``t``, each (B,), in t's dtype."""
        ...

    def model_time(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return the network's time input, (B,): exact integer timesteps, or sigma times a scale."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A network with its path and prediction target: the policy, the reference, an EMA, a guided network."""

    @property
    def path(self) -> Path:
        """The noising path of the network's training."""
        ...

    @property
    def target(self) -> Target:
        """The target that the network predicts."""
        ...

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the network's raw prediction of ``target``, shaped like ``x_t``."""
        ...


@runtime_checkable
class TimeSampler(Protocol):
    """A distribution of training times, one draw per group."""

    def __call__(self, count: int, generator: "Random | torch.Generator") -> Float[Tensor, " count"]:
        """Return times in [0, 1], (count,), on the CPU."""
        ...


@runtime_checkable
class Noising(Protocol):
    """A map from clean latents to noisy states: forward noising, or DDIM inversion (which calls a network).

    The caller passes the denoiser that ``by`` names, guided with scale ``guidance``.
    """

    @property
    def by(self) -> Literal["policy", "reference"]:
        """The role of the network whose predictions it uses."""
        ...

    @property
    def guidance(self) -> float:
        """Classifier-free guidance scale of those predictions; 1 is none."""
        ...

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        t: Tensor,
        cond: Cond,
        group: Tensor,
        generator: "Random | torch.Generator",
    ) -> Noised:
        """Return the noisy states of ``x0`` (B, *d) at times ``t`` (B,)."""
        ...


@runtime_checkable
class Reduce(Protocol):
    """A reduction of squared errors (B, *d) to one number per unit, (B, *unit)."""

    def __call__(self, squared: Tensor) -> Tensor:
        """Return the mean of ``squared`` (B, *d) over the elements of each unit, (B, *unit)."""
        ...


@runtime_checkable
class Reward(Protocol):
    """A score of images, or of videos if its card says so; higher is better."""

    def __call__(self, images: Any, prompts: Sequence[str], /) -> Float[Tensor, " B *unit"]:
        """Return float32 scores (B,) of B images or ``Video``s.

        Images are PIL images, or pixels (B, 3, H, W) in [0, 1].
        """
        ...


@runtime_checkable
class Source(Protocol[X]):
    """A source of batches: offline it reads a cache, online it samples with the policy."""

    def __iter__(self) -> "Iterator[Batch[X]]":
        """Return an endless iterator of this rank's micro-batches, from the position of ``seek``."""
        ...

    def seek(self, micro_step: int) -> None:
        """Continue as if ``micro_step`` micro-batches had been drawn: a resumed run has the same data."""
        ...


@runtime_checkable
class Method(Protocol[X]):
    """A preference-optimisation method, the contract of ``diffalign.methods``.

    Training, strategies, held-out diagnostics and the assembly of a run read no other attribute. A method
    with state is ``Stateful`` as well.
    """

    @property
    def needs_reference(self) -> bool:
        """Whether the method calls the reference; otherwise no reference network is kept in memory."""
        ...

    @property
    def noising(self) -> Noising | None:
        """The map from clean latents to noisy states; None for methods of recorded steps."""
        ...

    @property
    def reduce(self) -> Reduce:
        """The reduction of squared errors to units of a sample."""
        ...

    def at_times(self, times: TimeSampler) -> "Method[X]":
        """Return the method with its times drawn by ``times``.

        Held-out diagnostics measure single bins of times with it. A method of recorded steps, which draws no
        times, returns itself.
        """
        ...

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[X],
        generator: "Random | torch.Generator",
    ) -> Step:
        """Return the loss and metrics of one batch."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A method with state, which checkpoints store; it is equal on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as values that JSON can represent."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the result of ``state_dict``."""
        ...
