"""Pseudo-labels of pairs in intervals of time (Semi-DPO, arXiv 2604.24952, released code).

A trained model is a classifier of pairs: at a time t, with one noise for the pair,

    c = (r_w - m_w) - (r_l - m_l)

is above 0 where the model, against its base, prefers the labelled winner. It is computed at the middle of
each of A equal intervals of time, with one noise for all of them. Per interval the pairs with the largest
|c| are labelled by its sign, 1 or -1, and the others 0. Pairs on which the reward models of the set all
agree with the label are trusted: 1 everywhere.

What differs from the released code: one percentile for all intervals, where it is stricter at times at which
the model's accuracy on trusted pairs is below 70 %.
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
from diffalign.losses.contrast import contrast
from diffalign.types import Batch, Denoiser, Noised
from diffalign.utils.files import write_atomic


@torch.no_grad()
def confidences(
    policy: Denoiser, reference: Denoiser, batches: Iterable[Batch[Tensor]], intervals: int, seed: int = 0
) -> Iterator[Float[Tensor, "P A"]]:
    """Yield c of every pair of each batch at the middle of each interval; 0 for a tie.

    Args:
        policy: the trained model.
        reference: what it started from.
        batches: of pairs.
        intervals: A.
        seed: of the noise.
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
        confidence: c of each pair and interval.
        trusted: (P,) pairs whose label holds everywhere; they do not count for the percentile.
        percentile: of |c| in each interval, from which a pair is labelled there.
    """
    open_ = confidence[~trusted]
    labels = torch.ones_like(confidence)
    if len(open_):
        limit = open_.abs().quantile(percentile / 100, dim=0)
        sure = (open_.abs() >= limit) & (open_ != 0)
        labels[~trusted] = torch.where(sure, open_.sign(), 0.0)
    return labels


def agreeing(encoded: EncodedSet) -> Tensor:
    """Return (P,) whether all of several reward models of a pair rank it as its label does."""
    found = []
    for record in encoded:
        best = max(range(len(record.scores)), key=record.scores.__getitem__)
        rivals = [row for i, row in enumerate(record.rewards) if i != best]
        several = bool(record.rewards) and len(record.rewards[0]) > 1
        wins = several and all(
            mine > theirs for row in rivals for mine, theirs in zip(record.rewards[best], row, strict=True)
        )
        found.append(wins)
    return torch.tensor(found)


@dataclass(frozen=True)
class Labelled:
    """The labels of a set.

    Attributes:
        rows: (row of the set, its labels).
        trusted: pairs whose label holds everywhere.
    """

    rows: Sequence[tuple[str, tuple[int, ...]]]
    trusted: int

    @property
    def text(self) -> str:
        """Counts by interval."""
        lines = [f"{len(self.rows)} pairs, {self.trusted} trusted everywhere; of all, by interval of time:"]
        for place, column in enumerate(zip(*(labels for _, labels in self.rows), strict=True)):
            low, high = place / len(self.rows[0][1]), (place + 1) / len(self.rows[0][1])
            kept, turned, out = column.count(1), column.count(-1), column.count(0)
            lines.append(f"  {low:.2f} to {high:.2f}: {kept} kept, {turned} turned round, {out} left out")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write a line of JSON a pair, which ``data.time_labels`` reads."""
        lines = [json.dumps({"where": where, "time_labels": list(labels)}) for where, labels in self.rows]
        write_atomic(path, "".join(f"{line}\n" for line in lines))
