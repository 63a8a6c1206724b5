"""Semi-DPO. Liu et al. 2026, "Learning from Noisy Preferences: A Semi-Supervised Learning Approach to Direct
Preference Optimization", ICLR 2026, arXiv 2604.24952, with the released code (L-CodingSpace/Semi-DPO).

Labels are trusted only if several reward models agree with them (``data.filters.agree``, about a fifth of
Pick-a-Pic v2). A first model is trained on those pairs with Diffusion-DPO. It then labels the other pairs
separately in each of A equal intervals of time: +1 keeps the label, -1 reverses it, 0 leaves the pair out in
that interval (``diffalign time-labels``). Training continues with these labels, and the next model labels
again. With z the logit of Diffusion-DPO and y the pair's label at its time,

    loss = sum of l(y z) over the pairs with y != 0 / their number,    t uniform in the labelled intervals,

    sigmoid  l(z) = -log p,    p = sigmoid(z)
    hinge    l(z) = max(0, 1 - z)
    ipo      l(z) = ((z - 1/2) 2 / beta)^2
    gce      l(z) = (1 - d) (-log p) + d (1 - p^q) / q,    d the share of reward models against the label
    sce      l(z) = -log p + sce_beta (-log_zero) (1 - p),    which is Poly-DPO with alpha 3

Pairs without labels (no column or file ``time_labels``, as in iteration 0) have +1 everywhere. The reference
is the initial model; the released runs take that of the iteration before for SD 1.5, and the base for SDXL.
The released logit has no 1/2: its beta 2500 is 5000 here.

Differences from the released code: the mean is over the labelled pairs of all micro-batches and processes.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.diffusion.likelihood import elbo
from diffalign.diffusion.randomness import uniform
from diffalign.errors import UserError
from diffalign.losses.contrast import Contrast, contrast
from diffalign.methods._base import ScaledMethod
from diffalign.methods._common import noisy, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step, TimeSampler


@dataclass(frozen=True)
class Given:
    """A time sampler that returns given times.

    Attributes:
        t: (G,) times.
    """

    t: Tensor

    def __call__(self, count: int, generator: Random | torch.Generator) -> Tensor:
        """Return the given times (G,)."""
        return self.t


@dataclass(frozen=True, kw_only=True)
class SemiDPO(ScaledMethod):
    """Diffusion-DPO with a label for each interval of time.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        loss_type: loss l of the logit, see the module.
        gce_q: exponent q of "gce", in (0, 1].
        sce_beta: weight of the second term of "sce", at least 0.
        log_zero: value in place of log 0 in "sce", below 0.
        within_labels: draw times in the labelled intervals of each pair; otherwise from ``time``.
    """

    beta: float = 5000.0
    loss_type: Literal["sigmoid", "hinge", "ipo", "gce", "sce"] = "sigmoid"
    gce_q: float = 0.5
    sce_beta: float = 0.5
    log_zero: float = -6.0
    within_labels: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gce_q <= 1:
            raise UserError(f"method.gce_q={self.gce_q}; allowed: more than 0, up to 1")
        if not (self.sce_beta >= 0 and self.log_zero < 0):
            raise UserError(
                f"method.sce_beta={self.sce_beta}, log_zero={self.log_zero}; allowed: 0 or more, less than 0"
            )

    @property
    def extras(self) -> frozenset[str]:
        """Labels in time, and for "gce" the rewards of several models."""
        return frozenset({"time_labels", "reward"} if self.loss_type == "gce" else {"time_labels"})

    def at_times(self, times: TimeSampler) -> "SemiDPO":
        """Return the method with its times drawn by ``times``, labelled or not."""
        return replace(self, time=times, within_labels=False)

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over the pairs that are labelled at their times and not tied.

        Raises:
            UserError: loss type "gce" without the rewards of several models.
        """
        labels = batch.extra.get("time_labels")
        timed = self
        if labels is not None and self.within_labels:
            timed = replace(self, time=Given(self._times(labels, batch, generator)))
        z = noisy(timed, policy, reference, batch, generator)
        ratio = elbo(policy, reference, z, batch.cond, self.reduce).log_ratio
        c = contrast(ratio, batch.score, batch.group)
        if labels is not None:
            intervals = labels.shape[1]
            index = (z.t * intervals).long().clamp(0, intervals - 1).to(labels.device)
            c = relabelled(c, labels.gather(1, index[:, None])[:, 0].to(ratio)[c.better])
        return preference_step(c, self.losses(self.beta * c.margin, c, batch), self.beta)

    def losses(self, logit: Tensor, c: Contrast, batch: Batch[Tensor]) -> Tensor:
        """Return the losses l of logits (P,)."""
        plain = -logsigmoid(logit)
        if self.loss_type == "hinge":
            return torch.relu(1 - logit)
        if self.loss_type == "ipo":
            return ((logit - 0.5) * 2 / self.beta) ** 2
        if self.loss_type == "gce":
            doubt = self.contradiction(c, batch).to(logit)
            bounded = -torch.expm1(self.gce_q * logsigmoid(logit)) / self.gce_q
            return (1 - doubt) * plain + doubt * bounded
        if self.loss_type == "sce":
            return plain + self.sce_beta * -self.log_zero * (-logit).sigmoid()
        return plain

    def contradiction(self, c: Contrast, batch: Batch[Tensor]) -> Tensor:
        """Return the share (P,) of reward models that prefer the worse sample.

        Raises:
            UserError: the data has no rewards of several models.
        """
        rewards = batch.extra.get("reward")
        if rewards is None or rewards.ndim < 2:
            raise UserError(
                "method.loss_type='gce' needs the share of reward models that contradict a label, and the "
                "data has no column `rewards` with several; allowed: such a column, data.rewards, or another "
                "loss_type"
            )
        return (rewards[c.better] < rewards[c.worse]).float().mean(1)

    def _times(self, labels: Tensor, batch: Batch[Tensor], generator: Random | torch.Generator) -> Tensor:
        """Draw times (G,), uniform over the labelled intervals of each group, or over all if it has none."""
        first = torch.stack([(batch.group == g).nonzero()[0, 0] for g in range(batch.num_groups)])
        labelled = labels[first.to(labels.device)].cpu() != 0
        labelled = labelled | ~labelled.any(1, keepdim=True)
        u = uniform(generator, batch.num_groups, (2,)).double().cpu()
        index = (u[:, :1] * labelled.sum(1, keepdim=True)).floor()
        chosen = (labelled.cumsum(1) > index).double().argmax(1)
        return (chosen + u[:, 1]) / labels.shape[1]


def relabelled(c: Contrast, label: Tensor) -> Contrast:
    """Return pairs with better and worse exchanged where ``label`` (P,) is -1, and weight 0 where it is 0."""
    reversed_label = label < 0
    return replace(
        c,
        chosen=torch.where(reversed_label, c.rejected, c.chosen),
        rejected=torch.where(reversed_label, c.chosen, c.rejected),
        weight=c.weight * label.abs(),
        better=torch.where(reversed_label, c.worse, c.better),
        worse=torch.where(reversed_label, c.better, c.worse),
    )


CARD = MethodCard(
    name="semi_dpo",
    title="Semi-DPO",
    paper="Liu et al., Learning from Noisy Preferences: A Semi-Supervised Learning Approach to Direct "
    "Preference Optimization",
    year=2026,
    arxiv="2604.24952",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=SemiDPO,
)
