"""The nouns of diffalign: what travels between data, models, methods and training.

Axes, here and in every docstring: B samples, G groups, P pairs, S units (segments, patches, steps), ``*d``
the latent axes (C H W for an image, C F H W for a video, 2 for the plane).

Time ``t`` is a float in [0, 1]: 0 is data, 1 is noise. A variance-preserving path of N training steps looks
its own table up at the exact index ``round(t * N)``; a flow path uses ``t`` itself as sigma.

This module imports torch (and jaxtyping's annotations) only, so everything else may import it.
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
    """Clean latents and the noisy state that a noising made of them: each (B, *d), ``t`` (B,)."""

    x0: Tensor
    eps: Tensor
    x_t: Tensor
    t: Tensor


class Transition(NamedTuple):
    """One recorded sampler step x_t -> x_s with s < t, and the log-density under which it was drawn, (B,)."""

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
"""(clean latents (N, *d), their rows of the batch (N,)) -> (N,) rewards, with gradients to the latents; with
``words``, W sequences of N, (W, N) rewards under the prompts "word. prompt"."""


@dataclass(frozen=True)
class Batch(Generic[X]):
    """Samples, who their rivals are, and how good they are.

    Pairs are groups of two, single likes groups of one, ranked lists groups of K; dense labels have one
    score column per segment. Nothing is "chosen" or "rejected" by its position, and equal scores are a tie.

    Attributes:
        x: clean latents (B, *d), or recorded transitions.
        cond: conditions of the network, every tensor (B, ...).
        group: (B,) int64, rivals share an id; ids are 0 .. G-1. Structure rather than data: keep it on the
            CPU, so that reading it never waits for the accelerator.
        score: (B, *unit), higher is better.
        negative: what classifier-free guidance guides away from, every tensor (B, ...); names that it lacks
            are cond's. Empty where nothing is guided.
        extra: what only some methods ask for, by name, every tensor (B, ...): ``reward`` (a second opinion
            beside the label), ``patches`` (weight maps), ``votes`` (the share of people who preferred the
            sample to its rivals, NaN where nobody voted); of transitions ``reference_mean`` (B, *d, where the
            reference would have gone, known from the rollout), ``drawn_mean`` (B, *d, the mean of the step as
            it was drawn) and ``advantage`` (B,).
        kernel: of transitions: what drew them, and therefore what scores them.
        guidance: of transitions: the scale of the classifier-free guidance that they were drawn under.
        state: of transitions, (B,) int64 on the CPU like ``group``: samples of one id are one to the network
            (x_t, t and conditions are equal), so it is called once; None: all differ.
        grid: of what was sampled: (T + 1,) descending times that it passed on its way, on the CPU.
        beside: of what was sampled: real samples, which some methods learn from as well.
        draws: of noise from a bank, one number a group that all its randomness follows from.
        value: of noise that a method samples from itself, by ``kernel`` along ``grid``: the result's reward.
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
        """G, the number of groups."""
        return int(self.group.max()) + 1 if self.group.numel() else 0

    def select(self, index: Tensor) -> "Batch[X]":
        """Return some samples, each a group of its own, in the order of ``index`` (N,)."""
        state = None if self.state is None else self.state[index.cpu()]
        return self._map(
            lambda tensor: tensor[index.to(tensor.device)], group=torch.arange(len(index)), state=state
        )

    def to(self, device: torch.device | str) -> "Batch[X]":
        """Return the batch with its data on ``device``; ``group`` and ``state`` stay where they are."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return moved if self.beside is None else replace(moved, beside=self.beside.to(device))

    def _map(self, function: Callable[[Tensor], Tensor], **others: Tensor | None) -> "Batch[X]":
        """Apply ``function`` to every tensor but ``group`` and ``state``, which ``others`` may replace."""
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
    """Log-likelihood estimates of the same samples, (B, *unit): under the policy and under the reference."""

    policy: Tensor
    reference: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log p_policy - log p_reference, (B, *unit): how much likelier training has made each sample."""
        return self.policy - self.reference


@dataclass(frozen=True)
class Step:
    """What a method returns for one batch.

    Attributes:
        loss: scalar to minimise, the mean over ``weight`` terms.
        metrics: detached scalars to log, each a mean over the same terms.
        weight: how many terms the mean is over (a tie counts none). The trainer weights micro-batches and
            ranks by it, so that splitting a batch in any way gives the same gradient.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    weight: Tensor


@runtime_checkable
class Random(Protocol):
    """Where randomness comes from: it is an argument everywhere, and never global.

    ``diffusion.randomness.Streams`` has one independent stream per group, so that a group's draws do not
    depend on the batch, rank or micro-step that it landed in; a plain ``torch.Generator`` is accepted
    wherever a Random is.
    """

    def uniform(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 draws from U[0, 1) on the CPU."""
        ...

    def normal(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 draws from N(0, 1) on the CPU."""
        ...


@runtime_checkable
class Path(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps."""

    def coefficients(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return (alpha, sigma) at ``t``, each (B,), in t's dtype."""
        ...

    def model_time(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return the time that the network gets: exact integer timesteps, or sigma times its scale, (B,)."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A network and what is needed to read its output. Policy, reference, EMA and guidance all have this
    shape.
    """

    @property
    def path(self) -> Path:
        """The noising path that the network was trained on."""
        ...

    @property
    def target(self) -> Target:
        """What the network predicts."""
        ...

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the network's raw prediction of ``target``, shaped like ``x_t``."""
        ...


@runtime_checkable
class TimeSampler(Protocol):
    """Draws times: one per group."""

    def __call__(self, count: int, generator: "Random | torch.Generator") -> Float[Tensor, " count"]:
        """Return (count,) times in [0, 1] on the CPU."""
        ...


@runtime_checkable
class Noising(Protocol):
    """Makes noisy states of clean latents: forward noising, or DDIM inversion (which asks the denoiser).

    The caller passes the denoiser that ``by`` names, guided by ``guidance``.
    """

    @property
    def by(self) -> Literal["policy", "reference"]:
        """Whose predictions it wants."""
        ...

    @property
    def guidance(self) -> float:
        """Scale of classifier-free guidance of those predictions; 1 is none."""
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
        """Noise ``x0`` (B, *d) to times ``t`` (B,)."""
        ...


@runtime_checkable
class Reduce(Protocol):
    """Squared errors (B, *d) to one number per unit, (B, *unit)."""

    def __call__(self, squared: Tensor) -> Tensor:
        """Return the mean over whatever makes up a unit."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores images, or videos where its card says so: higher is better."""

    def __call__(self, images: Any, prompts: Sequence[str], /) -> Float[Tensor, " B *unit"]:
        """Return (B,) float32 scores of B images (PIL images, or pixels (B, 3, H, W) in [0, 1]) or
        ``Video``s.
        """
        ...


@runtime_checkable
class Source(Protocol[X]):
    """Where batches come from. Offline it reads a cache, online it samples: the trainer cannot tell."""

    def __iter__(self) -> "Iterator[Batch[X]]":
        """Endless micro-batches of this rank, from where ``seek`` has put it."""
        ...

    def seek(self, micro_step: int) -> None:
        """Continue as if ``micro_step`` micro-batches had been drawn: what makes a resumed run see the
        same data.
        """
        ...


@runtime_checkable
class Method(Protocol[X]):
    """A preference-optimisation method: the twenty lines in which two papers differ.

    This is the whole contract: training, strategies, held-out diagnostics and the assembly of a run read no
    other attribute. A method that remembers something is ``Stateful`` as well.
    """

    @property
    def needs_reference(self) -> bool:
        """Whether the method calls its reference; without one no reference network is kept."""
        ...

    @property
    def noising(self) -> Noising | None:
        """How clean latents become noisy states; None: the method has no ``Noising`` (recorded steps)."""
        ...

    @property
    def reduce(self) -> Reduce:
        """What counts as one unit of a sample."""
        ...

    def at_times(self, times: TimeSampler) -> "Method[X]":
        """Return the method with its times drawn by ``times``, which held-out diagnostics measure a bin of
        times with; a method of recorded steps has no choice of times and returns itself.
        """
        ...

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[X],
        generator: "Random | torch.Generator",
    ) -> Step:
        """One loss over one batch."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """A method that remembers something from step to step: checkpoints keep it, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` gave."""
        ...
