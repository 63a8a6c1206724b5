"""Advantages: by how much a sample's reward exceeds a baseline, for several baselines.

With r the rewards (N, K) of K samples for each of N prompts:

    group         (r - mean of its K rivals) / (std of the K + 1e-8)    GRPO; DanceGRPO (arXiv 2505.07818)
    group_std     (r - mean of its K rivals) / (std of the K + 1e-4)    Flow-GRPO, AWM: no global std
    group_batch   (r - mean of its K rivals) / (std of all N K + 1e-4)  Flow-GRPO (arXiv 2505.05470), AWM
    batch         (r - mean of all) / (std of all + 1e-8)               DDPO without per-prompt statistics
    prompt        (r - mean of its prompt's last rewards) / (their std + 1e-6)      DDPO (arXiv 2305.13301)
    raw           r                                                     reward-weighted regression
    best          1 for the best of its rivals (ties included), else 0         fine-tuning on the best
    ends          1 for the best of its rivals, -1 for the worst, else 0            pairs

``prompt`` takes mean and std of the last 32 rewards of each prompt over all rounds, or of the whole batch
while a prompt has fewer than 16. The current rewards are included: they enter the history before it is used.

The std of "group" divides by K - 1, as the released code of DanceGRPO does (and TRL's GRPO); the others
divide by the number of rewards, as the released codes of DDPO and Flow-GRPO do. Rivals that are all equal
have an advantage of exactly 0 under "group", "group_std" and "group_batch", not a rounding error over 1e-8.
A group is a row, even if a prompt occurs in two rows; Flow-GRPO's code joins the groups of equal prompts.

Among equally good or bad rivals "ends" takes the first. Flow-GRPO's code differs: where all rivals are equal
it takes the first two as worst and best, a pair without information; here they are a tie, 0.

Under several processes each passes the rewards of all of them, gathered in one order. History and statistics
are then the same in every process, and those of one process with all prompts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from diffalign.errors import UserError, unknown

KINDS = ("group", "group_std", "group_batch", "batch", "prompt", "raw", "best", "ends")


@dataclass(frozen=True)
class PromptHistory:
    """The last rewards of each prompt, the newest last. A value: ``add`` returns another one.

    Attributes:
        rewards: by prompt, at most ``size`` each.
        size: rewards of a prompt that are kept.
        least: rewards that a prompt must have before its own statistics are used.
    """

    rewards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    size: int = 32
    least: int = 16

    def add(self, prompts: Sequence[str], scores: Float[Tensor, " N K"]) -> "PromptHistory":
        """Return the history with the ``scores`` (N, K) of ``prompts`` (N) added; UserError for a score that
        is not finite.
        """
        rows = _checked(scores, prompts).tolist()
        known = dict(self.rewards)
        for prompt, row in zip(prompts, rows, strict=True):
            known[prompt] = (*known.get(prompt, ()), *row)[-self.size :]
        return replace(self, rewards=known)

    def to_json(self) -> str:
        """Return text that ``from_json`` reads back exactly."""
        return json.dumps({"size": self.size, "least": self.least, "rewards": self.rewards})

    @classmethod
    def from_json(cls, text: str) -> "PromptHistory":
        """Return the history that ``to_json`` wrote."""
        value = json.loads(text)
        rewards = {prompt: tuple(row) for prompt, row in value["rewards"].items()}
        return cls(rewards, value["size"], value["least"])


def advantages(
    scores: Float[Tensor, " N K"], prompts: Sequence[str], kind: str, history: PromptHistory | None = None
) -> Float[Tensor, " N K"]:
    """Return the advantages of a round's rewards.

    Args:
        scores: (N, K) rewards, K samples for each prompt.
        prompts: N; used by "prompt" only.
        kind: one of ``KINDS``, see the module.
        history: for "prompt", with these scores already added; None: these scores alone.

    Returns:
        (N, K) in the dtype of ``scores``.

    Raises:
        UserError: a score that is not finite, an unknown kind, or scores that do not fit the prompts.
    """
    if kind not in KINDS:
        raise unknown("advantage (rollout.advantage)", kind, KINDS)
    rows = _checked(scores, prompts)
    if kind == "prompt":
        if history is None:
            history = PromptHistory().add(prompts, scores)
        found = _against_history(rows, prompts, history)
    elif kind == "batch":
        found = (rows - rows.mean()) / (rows.std(correction=0) + 1e-8)
    elif kind == "group_batch":
        found = _above_rivals(rows) / (rows.std(correction=0) + 1e-4)
    elif kind == "group_std":
        found = _above_rivals(rows) / (rows.std(1, correction=0, keepdim=True) + 1e-4)
    elif kind == "raw":
        found = rows
    elif kind == "best":
        found = (rows == rows.amax(1, keepdim=True)).to(rows)
    elif kind == "ends":
        first, last = (one_hot(index, rows.shape[1]) for index in (rows.argmax(1), rows.argmin(1)))
        found = (first - last).to(rows)  # where all rivals are equal, best and worst are both the first one
    else:
        # a single sample has no std; its difference to the mean is 0, so any divisor will do
        found = _above_rivals(rows) / (rows.std(1, correction=min(1, rows.shape[1] - 1), keepdim=True) + 1e-8)
    return found.to(scores.dtype)


def _above_rivals(rows: Tensor) -> Tensor:
    """Rewards less their row's mean; exactly 0 in a row of equal ones."""
    tied = (rows == rows[:, :1]).all(1, keepdim=True)
    return torch.where(tied, 0.0, rows - rows.mean(1, keepdim=True))


def _against_history(rows: Tensor, prompts: Sequence[str], history: PromptHistory) -> Tensor:
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        known = history.rewards.get(prompt, ())
        usual = rows if len(known) < history.least else torch.tensor(known, dtype=rows.dtype)
        found.append((row - usual.mean()) / (usual.std(correction=0) + 1e-6))
    return torch.stack(found) if found else rows


def _checked(scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the scores in float64 on the CPU."""
    if scores.ndim != 2 or len(scores) != len(prompts):
        raise UserError(
            f"scores of shape {tuple(scores.shape)} for {len(prompts)} prompts; allowed: (prompts, samples)"
        )
    rows = scores.detach().double().cpu()
    for prompt, row in zip(prompts, rows, strict=True):
        if not bool(row.isfinite().all()):
            raise UserError(f"the prompt {prompt!r} has the scores {row.tolist()}; allowed: finite ones")
    return rows
