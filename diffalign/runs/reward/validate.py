"""Check the configuration of a reward training."""

from typing import Any

from diffalign.config.ranges import check_ranges, get
from diffalign.config.reward_schema import RewardRun
from diffalign.errors import UserError
from diffalign.runs.validate import check_names

MEANINGLESS = (
    "model.train",
    "model.lora",
    "model.text_encoder",
    "model.gradient_checkpointing",
    "model.offload_activations",
    "model.channels_last",
    "model.compile",
    "data.view",
    "data.likes_share",
    "data.best",
    "data.altered",
    "data.prompt_dropout",
    "data.stream_block",
    "training.reference_every",
    "training.reference_mix",
    "training.context",
    "logging.diagnostics_bins",
)
"""Settings of the shared sections that concern alignment; here the diffusion model is frozen."""


def validate(run: RewardRun, needs: tuple[str, ...] = ()) -> None:
    """Check every value of a run.

    Args:
        run: what ``config.io.tree_from(RewardRun, ...)`` gave.
        needs: dotted fields that must not be empty.

    Raises:
        UserError: the first value that is not allowed, with its dotted place and what is.
    """
    check_names(run)
    check_ranges(run, needs)
    if not 0 <= run.reward.low < run.reward.high <= 1:
        raise UserError(
            f"reward.low={run.reward.low}, reward.high={run.reward.high}; allowed: 0 <= low < high <= 1"
        )
    usual: Any = RewardRun()
    for dotted in MEANINGLESS:
        if get(run, dotted) != get(usual, dotted):
            raise UserError(
                f"{dotted}={get(run, dotted)!r} has no effect on train-reward, where the diffusion model is "
                f"frozen; leave it at {get(usual, dotted)!r}"
            )
