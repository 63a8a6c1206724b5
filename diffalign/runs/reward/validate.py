"""Check the configuration of a reward training."""

from collections.abc import Mapping
from typing import Any

from diffalign.config.ranges import RULES, Rule, check_shared, get
from diffalign.config.reward_schema import RewardRun
from diffalign.errors import UserError
from diffalign.runs.validate import check_names

MEANINGLESS = (
    "model.train",
    "model.lora",
    "model.gradient_checkpointing",
    "model.compile",
    "data.view",
    "data.likes_share",
    "data.best",
    "data.altered",
    "data.prompt_dropout",
    "training.reference_every",
    "training.reference_mix",
    "logging.diagnostics_bins",
)
"""What the shared sections say about aligning a diffusion model; here the model is frozen."""


_RULES: Mapping[str, Rule] = {
    **RULES,
    "reward.start": ((lambda v: bool(v.strip())), "a hub id, a folder, tiny:clip or step_aware:SOURCE"),
    "reward.guidance": ((lambda v: v >= 0), "0 or more; 1 is none"),
    "reward.threshold": ((lambda v: 0 <= v < 1), "0 or more and less than 1"),
    "reward.at_once": ((lambda v: v >= 1), "1 or more"),
    "reward.evaluated": ((lambda v: bool(v) and all(0 <= t < 1 for t in v)), "times from 0 to below 1"),
}


def validate(run: RewardRun, needs: tuple[str, ...] = ()) -> None:
    """Checks every value of a run.

    Args:
        run: what ``config.io.tree_from(RewardRun, ...)`` gave.
        needs: dotted fields that must not be empty.

    Raises:
        UserError: the first value that is not allowed, with its dotted place and what is.
    """
    check_names(run)
    check_shared(run, needs, _RULES)
    if not 0 <= run.reward.low < run.reward.high <= 1:
        raise UserError(
            f"reward.low={run.reward.low}, reward.high={run.reward.high}; allowed: 0 <= low < high <= 1"
        )
    usual: Any = RewardRun()
    for dotted in MEANINGLESS:
        if get(run, dotted) != get(usual, dotted):
            raise UserError(
                f"{dotted}={get(run, dotted)!r} means nothing to train-reward, where the diffusion model is "
                f"frozen; leave it at {get(usual, dotted)!r}"
            )
