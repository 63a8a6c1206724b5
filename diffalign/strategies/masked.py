"""Masked pairs: errors count inside a mask only.

Try-on, in-painting and local edits differ inside a region; what lies outside tells nothing and still moves
the loss. With w a map over the latents in [0, 1], C channels and D elements, the error of a sample is, as
SimpleTuner's masked Flow-DPO has it (released code),

    mean          sum( w e^2 ) / D
    masked_mean   sum( w e^2 ) / max(1, C sum(w))

for policy and reference alike. SimpleTuner's default, the plain sum, is ``mean`` with a beta D times as
large. Maps stand in ``batch.extra["patches"]``: the column ``mask`` of a row gives one map for all its
images, ``patches`` one for each. A sample without a map has w = 1 everywhere, and its error is exactly what
it is without this strategy; a set without any map is refused.

It replaces the ``reduce`` of the method and of nothing else: strategies that stand before it in the list see
masked errors too, those after it do not (SimpleTuner's anchor is not masked).
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from diffalign.errors import UserError
from diffalign.strategies._common import Wrapped, innermost
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Denoiser, Method, Random, Reduce, Step


@dataclass(frozen=True, eq=False)
class MaskedReduce:
    """Another reduction of squared errors that are weighted element by element.

    Attributes:
        inner: the reduction.
        weight: (B, 1, *spatial) of each sample.
    """

    inner: Reduce
    weight: Tensor

    def __call__(self, squared: Tensor) -> Tensor:
        """Return the inner reduction of weighted squared errors (B, *d)."""
        return self.inner(self.over(squared))

    def over(self, values: Tensor) -> Tensor:
        """Return values (B, *d) times their weights.

        Raises:
            UserError: they are not of the batch's own samples, or of another size than the maps.
        """
        weight = self.weight.to(values)
        if weight.shape[0] != values.shape[0] or weight.shape[2:] != values.shape[2:]:
            raise UserError(
                f"strategy masked: maps of shape {tuple(weight.shape)} for errors of shape "
                f"{tuple(values.shape)}; allowed: methods that ask about the batch's own samples, in their "
                "order, and maps on their latents"
            )
        return values * weight


@dataclass(frozen=True)
class Masked:
    """Count errors inside a mask.

    Attributes:
        reduction: what the sum is divided by, see the module.
        mask_type: "mask": the map is the weight, at most 1; "segmentation": 1 wherever the map is above 0.
        dilate: latents by which the region grows on every side.
    """

    reduction: Literal["mean", "masked_mean"] = "mean"
    mask_type: Literal["mask", "segmentation"] = "mask"
    dilate: int = 0

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dilate < 0:
            raise UserError(f"masked.dilate={self.dilate}; allowed: 0 or more")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with its errors masked.

        Raises:
            UserError: it reduces no errors of its own, as methods of recorded steps.
        """
        inner = innermost(method)
        if not is_dataclass(inner) or "reduce" not in {f.name for f in fields(inner)}:
            raise UserError(
                f"strategy masked with {type(inner).__name__}, which compares no denoising errors; allowed: "
                "methods over noisy states of pairs, lists or likes"
            )
        return Wrapped(method, self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the method's loss of masked errors; ``masked/share`` is the mean of the maps.

        Raises:
            UserError: the batch has no maps.
        """
        maps = self.maps(batch)
        weight = maps
        if self.reduction == "masked_mean":
            channels, elements = batch.x.shape[1], batch.x[0].numel()
            inside = (channels * maps.flatten(1).sum(1)).clamp(min=1)
            weight = maps * (elements / inside).reshape(-1, *(1,) * (maps.ndim - 1))
        step = reduced(method, MaskedReduce(innermost(method).reduce, weight))(
            policy, reference, batch, generator
        )
        return replace(step, metrics={**step.metrics, "masked/share": maps.mean()})

    def maps(self, batch: Batch[Any]) -> Tensor:
        """Return (B, 1, *spatial) float32 in [0, 1].

        Raises:
            UserError: the batch has no maps.
        """
        if "patches" not in batch.extra:
            raise UserError(
                "strategy masked: the data has no maps; allowed: rows with a column `mask`, a picture for "
                "all images of the row, or `patches`, one for each"
            )
        maps = batch.extra["patches"].float().clamp(0, 1)
        if self.mask_type == "segmentation":
            maps = (maps > 0).to(maps)
        if self.dilate:
            size = 2 * self.dilate + 1
            flat = maps.reshape(-1, 1, *maps.shape[-2:])  # of a video frame by frame
            maps = max_pool2d(flat, size, 1, self.dilate).reshape(maps.shape)
        return maps


def reduced(method: Method[Any], reduce: Reduce) -> Method[Any]:
    """Return a method, inside whatever strategies, with another ``reduce``."""
    if isinstance(method, Wrapped):
        return replace(method, method=reduced(method.method, reduce))
    changed: Method[Any] = replace(method, reduce=reduce)  # type: ignore[type-var]
    return changed


CARD = StrategyCard(
    name="masked",
    title="Masked pairs",
    paper="SimpleTuner, masked Flow-DPO (released code)",
    year=2026,
    arxiv="",
    composes="methods over noisy states; the data brings the maps",
    cost="nothing",
    strategy=Masked,
)
