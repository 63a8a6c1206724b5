"""What several methods share: component tables for configurations, and metrics under their usual names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffalign.losses.contrast import Contrast
from diffalign.noising import Forward
from diffalign.times import Listed, LogitNormal, Uniform

TIMES: Mapping[str, type] = {"uniform": Uniform, "logit_normal": LogitNormal, "listed": Listed}
NOISINGS: Mapping[str, type] = {"forward": Forward}


def times_like(t: Tensor, group: Tensor, x: Tensor) -> Tensor:
    """Times per group (G,) to times per sample (B,), on x's device and in its precision (float32 at
    least).
    """
    return t[group.to(t.device)].to(x.device, torch.promote_types(x.dtype, torch.float32))


def preference_metrics(c: Contrast, scale: float) -> dict[str, Tensor]:
    """Detached means over what is no tie, named as dashboards know them.

    ``rewards/*`` are ``scale`` times the log-ratio; an exactly equal prediction counts half in
    ``rewards/accuracies``. ``errors/*`` are policy minus reference denoising error: a winner's must not
    rise, however good the margin looks.
    """
    margin = c.margin.detach()
    right = (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)
    chosen, rejected = c.mean(c.chosen.detach()), c.mean(c.rejected.detach())
    return {
        "rewards/chosen": scale * chosen,
        "rewards/rejected": scale * rejected,
        "rewards/margins": scale * (chosen - rejected),
        "rewards/accuracies": c.mean(right),
        "errors/chosen": -2 * chosen,
        "errors/rejected": -2 * rejected,
    }
