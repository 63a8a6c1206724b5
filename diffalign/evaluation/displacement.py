"""Prediction of likelihood displacement: pairs that are likely to lower their winner's likelihood in
training.

Lowering a loser's likelihood also lowers that of similar samples, above all the winner's: preference losses
are known to lower the likelihood of both. Two numbers predict it, each from one forward of a pair that shares
noise:

- the gradient inner product in output space. With gA, gB the gradients of the winner's and the loser's mean
  squared errors, one step of equal weight on both changes the winner's error by -|gA|^2 + gA.gB: it rises
  where ``overlap`` = gA.gB / |gA|^2 is above 1 (the condition behind Diffusion-SDPO, arXiv 2511.03317).
- CHES (Razin et al. 2024, arXiv 2410.08847): <sum h_w, sum h_l> - |sum h_w|^2 of hidden embeddings, of a
  language model over tokens, here over positions of what enters the network's last layer; a high score is a
  pair with similar embeddings. The length-normalised form has means in place of sums.

Both are means over ``draws`` of time and noise. They are first-order and in output space (or in that of the
last layer): a warning, not a measurement of the run.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.noising import Forward
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.methods._common import times_like
from diffalign.strategies._common import best, residual
from diffalign.types import Batch, Denoiser, TimeSampler
from diffalign.utils.files import write_atomic


def ches(
    chosen: Float[Tensor, "P L D"],
    rejected: Float[Tensor, "P M D"],
    chosen_mask: Float[Tensor, "P L"] | None = None,
    rejected_mask: Float[Tensor, "P M"] | None = None,
    normalised: bool = False,
) -> Float[Tensor, " P"]:
    """Return the centered hidden embedding similarity of P pairs; high scores predict displacement.

    Args:
        chosen: hidden embeddings of the winner, at L positions (tokens, pixels).
        rejected: of the loser, at M.
        chosen_mask: 1 where a position counts; None: everywhere.
        rejected_mask: likewise.
        normalised: means over positions instead of sums, the variant for filtering.
    """
    sums = []
    for hidden, mask in ((chosen, chosen_mask), (rejected, rejected_mask)):
        weight = torch.ones_like(hidden[..., 0]) if mask is None else mask.to(hidden)
        total = (hidden * weight[..., None]).sum(1)
        sums.append(total / weight.sum(1, keepdim=True) if normalised else total)
    return (sums[0] * sums[1]).sum(1) - (sums[0] ** 2).sum(1)


@dataclass(frozen=True)
class PairRow:
    """One pair.

    Attributes:
        where: the row of the data set.
        prompt: its prompt.
        inner: gA.gB, mean over draws.
        own: |gA|^2, mean over draws.
        ches: the length-normalised score, mean over draws.
    """

    where: str
    prompt: str
    inner: float
    own: float
    ches: float

    @property
    def overlap(self) -> float:
        """gA.gB / |gA|^2: above 1 the winner's error rises."""
        return self.inner / self.own if self.own else 0.0


@dataclass(frozen=True)
class Measured:
    """The measurements of one batch: indices of the pairs, and their numbers, (P,) each."""

    groups: Tensor
    inner: Tensor
    own: Tensor
    ches: Tensor


@torch.no_grad()
def measure(
    denoiser: Denoiser,
    network: nn.Module,
    batches: Iterable[Batch[Tensor]],
    time: TimeSampler,
    draws: int = 4,
    seed: int = 0,
) -> Iterator[Measured]:
    """Return the numbers of every group with a best and a worst member, batch by batch; ties and likes are
    left out.

    Args:
        denoiser: the model that training will start from, in evaluation mode.
        network: its module; CHES reads the input of its last layer.
        batches: pairs (or lists: their best against their worst).
        time: the sampler of times.
        draws: of time and noise, shared by the members of a group.
        seed: of the draws.

    Raises:
        UserError: no draw.
    """
    if draws < 1:
        raise UserError(f"draws={draws}; allowed: 1 or more")
    for number, batch in enumerate(batches):
        winner, labelled = best(batch)
        loser, alone = best(replace(batch, score=-batch.score))
        size = torch.bincount(batch.group, minlength=batch.num_groups).to(labelled.device)
        groups = (labelled & (alone | (winner != loser)) & (size > 1)).nonzero()[:, 0]
        w, l = winner[groups], loser[groups]  # noqa: E741
        sums = batch.x.new_zeros(3, len(groups), dtype=torch.float32)
        for draw in range(draws):
            streams = Streams.at(seed, number << 32, batch.num_groups, f"displacement {draw}")
            t = times_like(time(batch.num_groups, streams), batch.group, batch.x)
            z = Forward()(denoiser, batch.x, t, batch.cond, batch.group, streams)
            with last_input(network) as seen:
                prediction = denoiser(z.x_t, z.t, batch.cond)
            gradient = 2 * residual(denoiser, z.x0, z.x_t, z.t, prediction).flatten(1)
            gradient = gradient / gradient.shape[1]
            hidden = seen[-1].float()
            sums += torch.stack(
                [
                    (gradient[w] * gradient[l]).sum(1),
                    (gradient[w] ** 2).sum(1),
                    ches(hidden[w], hidden[l], normalised=True),
                ]
            )
        yield Measured(groups.cpu(), *(sums / draws).cpu())


@contextmanager
def last_input(network: nn.Module) -> Iterator[list[Tensor]]:
    """Enter a context that records the input of the last called layer, (B, L, D): L positions of D
    features."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        convolution = not isinstance(layer, nn.Linear)
        seen[:] = [x.flatten(2).transpose(1, 2) if convolution else x.reshape(len(x), -1, x.shape[-1])]

    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    handles = [m.register_forward_pre_hook(keep) for m in network.modules() if isinstance(m, kinds)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Report:
    """All pairs, those of the highest risk first, and which of them a filter leaves out.

    Attributes:
        rows: sorted by ``by``, highest first.
        by: "overlap" or "ches".
        dropped: number of first rows that the filter leaves out.
        endangered: number of pairs with an overlap above 1.
    """

    rows: tuple[PairRow, ...]
    by: Literal["overlap", "ches"]
    dropped: int
    endangered: int

    def text(self, shown: int = 20) -> str:
        """Return a table of the first rows, and a line that explains them."""
        head = f"{'overlap':>9}  {'ches':>10}  row"
        lines = [head]
        for row in self.rows[:shown]:
            lines.append(f"{row.overlap:>9.3f}  {row.ches:>10.3g}  {row.where}: {row.prompt[:60]}")
        count = len(self.rows)
        return "\n".join(
            [
                *lines,
                "",
                f"{self.endangered} of {count} pairs are likely to push their winner down (overlap above 1); "
                f"{self.dropped} left out by {self.by}",
            ]
        )

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``displacement.json`` with all rows, and ``dropped.txt``, which ``data.drop`` reads."""
        rows = [asdict(row) | {"overlap": row.overlap} for row in self.rows]
        for i, row in enumerate(rows):
            row["dropped"] = i < self.dropped
        data = {"pairs": len(rows), "endangered": self.endangered, "dropped": self.dropped, "by": self.by}
        report, names = folder / "displacement.json", folder / "dropped.txt"
        write_atomic(report, json.dumps(data | {"rows": rows}, indent=1))
        dropped = "".join(f"{row.where}\n" for row in self.rows[: self.dropped])
        write_atomic(names, f"# left out by `diffalign displacement`, by {self.by}\n{dropped}")
        return report, names


def report(
    rows: Sequence[PairRow],
    by: Literal["overlap", "ches"] = "overlap",
    above: float | None = None,
    share: float | None = None,
) -> Report:
    """Return the sorted and filtered report.

    Args:
        rows: of all pairs.
        by: what to sort and filter by.
        above: leave out pairs whose number is above it; None: 1 for overlap, unless ``share`` is given.
        share: leave out this share of the pairs, the highest.

    Raises:
        UserError: a share outside 0 to 1, both limits, no limit for CHES, whose scale is the model's own, or
            numbers that are not finite, which have no order.
    """
    if share is not None and not 0 <= share < 1:
        raise UserError(f"share={share}; allowed: 0 or more and less than 1")
    if share is not None and above is not None:
        raise UserError(f"above={above} and share={share}; allowed: one of them")
    if by == "ches" and above is None and share is None:
        raise UserError("by=ches has no natural limit; give the share of pairs to leave out, or above")
    broken = [row for row in rows if not math.isfinite(row.inner + row.own + row.ches)]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(rows)} pairs have numbers that are not finite, the first: "
            f"{broken[0].where}; the model's weights are not finite, or its precision is too low: allowed: "
            "--model.dtype float32"
        )
    ordered = sorted(rows, key=lambda row: getattr(row, by), reverse=True)
    limit = 1.0 if above is None else above
    dropped = (
        int(share * len(ordered)) if share is not None else sum(getattr(row, by) > limit for row in ordered)
    )
    return Report(tuple(ordered), by, dropped, sum(row.overlap > 1 for row in ordered))
