"""The objective of the step-aware preference model (Liang et al. 2024, arXiv 2406.04314, section 3.2).

The images of a pair are noised to one time with one noise; the frozen diffusion model, guided, estimates the
clean latents of each in one step; they are decoded, and the CLIP that takes the time must prefer the one that
people preferred of the clean images: ``losses.reward_model``, each pair with a weight of 1 / the number of
examples of its prompt, without negatives from other prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import PerSample
from diffalign.diffusion.noising import Forward
from diffalign.diffusion.samplers import clean_and_noise
from diffalign.diffusion.times import Uniform
from diffalign.losses.contrast import pairs_of
from diffalign.losses.reward_model import labelled_choice, weighted_mean
from diffalign.methods._common import times_like
from diffalign.rewards.zoo.clip import Clip
from diffalign.rewards.zoo.step_aware import timesteps
from diffalign.types import Batch, Denoiser, Noising, Random, Reduce, Step, TimeSampler

TOKENS = "clip_tokens"
"""Name of the CLIP's token ids (B, L) in a batch's conditions."""


@dataclass(frozen=True, eq=False)
class Timed:
    """The CLIP that is trained, with its network wrapped for training.

    Attributes:
        network: a TimedClip, or accelerate's wrapper of it.
        clip: the same TimedClip with its pre-processing.
    """

    network: nn.Module
    clip: Clip

    def __call__(self, pixels: Tensor, t: Tensor, tokens: Tensor, group: Tensor) -> Tensor:
        """Return (B,) scores of pixels (B, 3, H, W) in [0, 1] estimated at ``t`` (B,), rivals sharing a
        prompt.
        """
        members = torch.arange(len(group))
        first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce(0, group, members, "amin")
        ids, owner = tokens[first.to(tokens.device)], group.to(pixels.device)
        scores: Tensor = self.network(self.clip.inputs(pixels), timesteps(t).to(pixels.device), ids, owner)
        return scores.float()


@dataclass(frozen=True, eq=False)
class StepAwareTraining:
    """A ``types.Method`` whose policy is ``Timed`` and whose reference is the frozen diffusion model.

    Attributes:
        decode: latents in the network's scale to pixels (B, 3, H, W) in [0, 1].
        guidance: scale of the classifier-free guidance of the estimates; 1 is none.
        time: which times are trained on, one per group.
        threshold: rivals whose scores' softmax differs by no more than this are a tie.
        at_once: images that are denoised and decoded at once.
    """

    decode: Callable[[Tensor], Tensor]
    guidance: float = 5.0
    time: TimeSampler = Uniform()
    threshold: float = 0.0
    at_once: int = 8

    needs_reference: ClassVar[bool] = True
    noising: ClassVar[Noising] = Forward()
    reduce: ClassVar[Reduce] = PerSample()

    def at_times(self, times: TimeSampler) -> "StepAwareTraining":
        """Return the method with its times drawn by ``times``."""
        return replace(self, time=times)

    def __call__(
        self, policy: Any, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the weighted mean loss over all pairs of rivals, ties included."""
        t = times_like(self.time(batch.num_groups, generator), batch.group, batch.x)
        pixels = self.estimates(reference, batch, t, generator)
        scores = policy(pixels, t, batch.cond[TOKENS], batch.group)
        first, second = (index.to(scores.device) for index in pairs_of(batch.group))
        label = self.label(batch.score[first], batch.score[second])
        losses = labelled_choice(scores[first], scores[second], label, 1 - label)
        weight = batch.extra["weight"][first] if "weight" in batch.extra else torch.ones_like(losses)
        lead = (scores[first] - scores[second]).detach()
        right = label * (lead > 0) + (1 - label) * (lead < 0) + 0.5 * (lead == 0)
        loss = weighted_mean(losses, weight)
        metrics = {"accuracy": weighted_mean(right, weight), "gap": weighted_mean(lead.abs(), weight)}
        return Step(loss, {"loss": loss.detach(), **metrics}, weight.sum())

    def label(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the label (P,) of the first rival: 1 preferred, 0 not, 1/2 for a tie."""
        lead = torch.tanh((first - second) / 2)  # the difference of the two softmax probabilities
        return 0.5 + 0.5 * (lead.sign() * (lead.abs() > self.threshold))

    @torch.no_grad()
    def estimates(
        self, reference: Denoiser, batch: Batch[Tensor], t: Tensor, generator: Random | torch.Generator
    ) -> Tensor:
        """Return decoded one-step estimates (B, 3, H, W) in [0, 1] of the batch noised to ``t`` (B,), without
        gradient.
        """
        cond = {name: value for name, value in batch.cond.items() if name != TOKENS}
        z = Forward()(reference, batch.x, t, cond, batch.group, generator)
        pixels = []
        for some in torch.arange(len(t), device=z.x_t.device).split(self.at_once):
            denoiser = reference
            if self.guidance != 1:
                negative = {name: value[some] for name, value in batch.negative.items()}
                denoiser = Guided(reference, negative, self.guidance)
            here = {name: value[some] for name, value in cond.items()}
            pixels.append(self.decode(clean_and_noise(denoiser, z.x_t[some], t[some], here)[0]))
        return torch.cat(pixels).to(batch.x.device)

    @torch.no_grad()
    def finished(self, batch: Batch[Tensor]) -> Tensor:
        """Return the decoded batch: pixels (B, 3, H, W) in [0, 1]."""
        return torch.cat([self.decode(some) for some in batch.x.split(self.at_once)]).to(batch.x.device)
