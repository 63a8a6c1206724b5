"""How a rollout samples: kernel, times, guidance, the window of its draws; and whose answers it records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.rollout_schema import RolloutConfig
from diffalign.diffusion.randomness import derive
from diffalign.diffusion.samplers import DDIM, FlowSDE, StepKernel
from diffalign.diffusion.spans import in_span
from diffalign.types import Denoiser, Path


@dataclass(frozen=True)
class Window:
    """Which steps are draws, by the number of the round.

    It begins at the first step, moves on by ``stride`` steps every ``every`` rounds, and begins again where
    it would leave the trajectory (the released code's ``roll_back``). In order "random" each round draws its
    place anew, evenly among the first ``within`` steps (Flow-GRPO-Fast, Flow-GRPO's released code).

    Attributes:
        size: steps in it.
        every: rounds that it stands still; 0: for ever.
        stride: steps that it moves by.
        order: "moving" or "random".
        within: of order "random": the steps that it lies among; None: all that may be draws.
        seed: of the places.
    """

    size: int
    every: int = 25
    stride: int = 1
    order: str = "moving"
    within: int | None = None
    seed: int = 0

    def steps(self, number: int, count: int) -> range:
        """Return the steps of round ``number``, of ``count`` that may be draws."""
        if self.order == "random":
            room = min(count, self.within or count) - self.size + 1
            first = derive(self.seed, "rollout/window", number) % room
            return range(first, first + self.size)
        places = (count - self.size) // self.stride + 1
        first = self.stride * (number // self.every % places) if self.every else 0
        return range(first, first + self.size)


def window_of(config: RolloutConfig, seed: int) -> Window | None:
    """Return the window of a rollout section, whose places are drawn by ``seed``; None where it has none."""
    if config.window is None:
        return None
    return Window(
        config.window,
        config.window_shift,
        config.window_stride,
        config.window_order,
        config.window_within,
        seed,
    )


@dataclass(frozen=True)
class Setting:
    """How to sample.

    Attributes:
        kernel: of each step.
        times: (T + 1,) descending, the last one is where a sample ends.
        guidance: scale of classifier-free guidance; 1 is none.
        samples: K.
        shared_noise: the rivals of a prompt start from one noise.
        first_branch: of a tree: steps before the first branch.
        inner_steps: of a tree: steps that a candidate takes alone.
        estimate: of a tree: where the clean estimate that is judged comes from.
        lowest: steps from times below are sampled, not learnt from.
        window: the steps that are draws; None: all that may be.
        round: whose window it is.
        means: record the mean of each step as it is drawn.
        by_reference: the last of the K finished samples is drawn by the reference.
        taught: record steps that are no draws as well, where the kernel makes none.
        reference_guidance: scale of guidance of the reference; None: ``guidance``.
        own: of a model of two experts, the path of the one that is trained: steps from times of the other are
            sampled, not learnt from.
        at_once: states of one network call; None: all states at once.
    """

    kernel: StepKernel
    times: Tensor
    guidance: float = 1.0
    samples: int = 2
    shared_noise: bool = True
    first_branch: int = 4
    inner_steps: int = 0
    estimate: str = "candidate"
    lowest: float = 0.0
    window: Window | None = None
    round: int = 0
    at_once: int | None = None
    means: bool = False
    by_reference: bool = False
    taught: bool = False
    reference_guidance: float | None = None
    own: Path | None = None

    def learns(self, t: float) -> bool:
        """Return whether a step from time ``t`` may be learnt from."""
        own = self.own is None or bool(in_span(self.own, torch.tensor([t], dtype=torch.float32)))
        return own and t >= self.lowest

    def records(self, std: Tensor) -> bool:
        """Return whether a step of this std is learnt from: it is a draw, or no step is one and a teacher
        says where each should go.
        """
        return bool((std > 0).all()) or (self.taught and not self.kernel.draws)

    @property
    def may_draw(self) -> int:
        """How many steps, from the first on, may be draws: of a flow all but the one to time 0."""
        ends = isinstance(self.kernel, FlowSDE) and float(self.times[-1]) == 0
        return len(self.times) - 1 - ends

    def kernel_at(self, t: float) -> StepKernel:
        """Return the kernel of the step from ``t``, a time of the grid: the ODE's where nothing is to be
        drawn.
        """
        step = self.times.tolist().index(t)
        window = range(self.may_draw)
        if self.window is not None:
            window = self.window.steps(self.round, self.may_draw)
        return self.kernel if step in window else DDIM()


@dataclass(frozen=True)
class Teachers:
    """Several references, each for some prompts.

    Attributes:
        denoisers: the references.
        who: (prompts) -> (n,) int64, the number of each prompt's.
    """

    denoisers: tuple[Denoiser, ...]
    who: Callable[[Sequence[str]], Tensor]

    def of(self, prompts: Sequence[str]) -> "Divided":
        """Return the references of some prompts."""
        return Divided(self.denoisers, self.who(prompts))


@dataclass(frozen=True)
class Divided:
    """The references of n prompts: ``denoisers`` and the number of each prompt's, ``index`` (n,)."""

    denoisers: tuple[Denoiser, ...]
    index: Tensor
