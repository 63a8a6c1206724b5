"""Pseudo-labels of pairs by interval of time (Semi-DPO, arXiv 2604.24952, released code).

A trained model classifies pairs. With r and m the denoising errors of the reference and the model at a time
t, with the same noise for winner and loser,

    c = (r_w - m_w) - (r_l - m_l)

is positive where the model, relative to its base, prefers the labelled winner. c is computed at the middle of
each of A equal intervals of time, with the same noise in all of them. In each interval the pairs with the
largest |c| are labelled by its sign, 1 or -1, and the others 0. Pairs on which all reward models of the set
agree with the label are trusted: their labels are 1 in every interval.

What differs from the released code: one percentile for all intervals, where the release uses a stricter one
at times at which the model's accuracy on trusted pairs is below 70 %.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.data import EncodedSet
from diffalign.diffusion.likelihood import elbo
from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.types import Batch, Denoiser, Noised
from diffalign.utils.files import write_atomic


@torch.no_grad()
def confidences(
    policy: Denoiser, reference: Denoiser, batches: Iterable[Batch[Tensor]], intervals: int, seed: int = 0
) -> Iterator[Float[Tensor, "P A"]]:
    """Yield c of every pair of each batch at the middle of each interval, (P, A); 0 for a tie.

    Args:
        policy: the trained model.
        reference: its base model.
        batches: batches of pairs.
        intervals: A, the number of intervals of [0, 1].
        seed: seed of the noise.
    """
    for number, batch in enumerate(batches):
        streams = Streams.at(seed, number << 32, batch.num_groups, "time labels")
        noise = streams.normal(batch.num_groups, tuple(batch.x.shape[1:]))[batch.group].to(batch.x)
        columns = []
        for place in range(intervals):
            t = torch.full((len(batch.x),), (place + 0.5) / intervals, device=batch.x.device)
            z = Noised(batch.x, noise, add_noise(policy, batch.x, noise, t), t)
            c = contrast(elbo(policy, reference, z, batch.cond).log_ratio, batch.score, batch.group)
            columns.append(2 * c.margin * c.weight)
        yield torch.stack(columns, 1).cpu()


def pseudo_labels(
    confidence: Float[Tensor, "P A"], trusted: Tensor, percentile: float = 80.0
) -> Float[Tensor, "P A"]:
    """Return labels 1, -1 and 0 of pairs.

    Args:
        confidence: (P, A), c of each pair in each interval.
        trusted: (P,), true for pairs whose labels are 1 everywhere; they do not enter the percentile.
        percentile: percentile of |c| in an interval, in [0, 100], from which on a pair is labelled there.

    Raises:
        UserError: values of c that are not finite, which have no percentile.
    """
    if broken := int((~confidence.isfinite()).any(1).sum()):
        raise UserError(
            f"the errors of {broken} of {len(confidence)} pairs are not finite: the weights of the run or of "
            "its base are not, or their precision is too low; allowed: a run that did not diverge, "
            "--model.dtype float32"
        )
    untrusted = confidence[~trusted]
    labels = torch.ones_like(confidence)
    if len(untrusted):
        columns = untrusted.abs().unbind(1)  # one by one: torch's quantile takes 2^24 numbers at most
        limit = torch.stack([column.quantile(percentile / 100) for column in columns])
        confident = (untrusted.abs() >= limit) & (untrusted != 0)
        labels[~trusted] = torch.where(confident, untrusted.sign(), 0.0)
    return labels


def agreeing(encoded: EncodedSet) -> Tensor:
    """Return (P,), true for pairs with several rewards that all rank the labelled winner higher."""
    agree = []
    for record in encoded:
        best = max(range(len(record.scores)), key=record.scores.__getitem__)
        rivals = [row for i, row in enumerate(record.rewards) if i != best]
        several = bool(record.rewards) and len(record.rewards[0]) > 1
        wins = several and all(
            winner > loser for row in rivals for winner, loser in zip(record.rewards[best], row, strict=True)
        )
        agree.append(wins)
    return torch.tensor(agree)


@dataclass(frozen=True)
class TimeLabels:
    """The pseudo-labels of a preference set.

    Attributes:
        rows: location of each pair in the set, and its A labels.
        trusted: number of trusted pairs.
    """

    rows: Sequence[tuple[str, tuple[int, ...]]]
    trusted: int

    @property
    def text(self) -> str:
        """The counts of labels in each interval, as text."""
        lines = [f"{len(self.rows)} pairs, {self.trusted} trusted everywhere; of all, by interval of time:"]
        for place, column in enumerate(zip(*(labels for _, labels in self.rows), strict=True)):
            low, high = place / len(self.rows[0][1]), (place + 1) / len(self.rows[0][1])
            same, flipped, unlabelled = column.count(1), column.count(-1), column.count(0)
            counts = f"{same} kept, {flipped} turned round, {unlabelled} left out"
            lines.append(f"  {low:.2f} to {high:.2f}: {counts}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write one JSON line a pair, in the format of ``data.time_labels``."""
        lines = [json.dumps({"where": where, "time_labels": list(labels)}) for where, labels in self.rows]
        write_atomic(path, "".join(f"{line}\n" for line in lines))
