"""Masked pairs: denoising errors are weighted by a mask over the latents.

Pairs of try-on, in-painting and local edits differ inside a region only; errors outside it carry no
preference and would add noise to the loss. With w a map over the latents in [0, 1], C channels and D
elements, the error of a sample is (SimpleTuner's masked Flow-DPO, released code)

    mean          sum( w e^2 ) / D
    masked_mean   sum( w e^2 ) / max(1, C sum(w))

for policy and reference alike. SimpleTuner's default, the plain sum, is ``mean`` with a beta D times as
large. The maps are ``batch.extra["patches"]``: the data column ``mask`` of a row gives one map for all images
of the row, ``patches`` one for each. A sample without a map has w = 1 everywhere, so its error is the one
without this strategy; a data set without any map is an error.

The strategy replaces the ``reduce`` of the method. Strategies before it in the list use masked errors too,
those after it do not (SimpleTuner's anchor is not masked).
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
    """A reduction of squared errors that are first multiplied by a weight map.

    Attributes:
        inner: reduction of the weighted errors (B, *d) to units.
        weight: weight map of each sample, (B, 1, *spatial).
    """

    inner: Reduce
    weight: Tensor

    def __call__(self, squared: Tensor) -> Tensor:
        """Return the inner reduction of the weighted squared errors (B, *d), (B, *unit)."""
        return self.inner(self.over(squared))

    def over(self, values: Tensor) -> Tensor:
        """Return values (B, *d) times their weights.

        Raises:
            UserError: the number of values or their spatial size differs from that of the maps.
        """
        weight = self.weight.to(values)
        if weight.shape[0] != values.shape[0] or weight.shape[2:] != values.shape[2:]:
            raise UserError(
                f"strategy masked: maps of shape {tuple(weight.shape)} for errors of shape "
                f"{tuple(values.shape)}; allowed: methods that call the policy on the batch's own samples, "
                "in their order, and maps of the size of the latents"
            )
        return values * weight


@dataclass(frozen=True)
class Masked:
    """Weight denoising errors by a mask.

    Attributes:
        reduction: divisor of the weighted sum: "mean" D, "masked_mean" C sum(w) (module docstring).
        mask_type: "mask": the weight is the map, clamped to [0, 1]; "segmentation": it is 1 where the map is
            above 0.
        dilate: width, in latent cells, by which the region is extended on every side, at least 0.
    """

    reduction: Literal["mean", "masked_mean"] = "mean"
    mask_type: Literal["mask", "segmentation"] = "mask"
    dilate: int = 0

    needs_reference: ClassVar[bool] = False
    extras: ClassVar[frozenset[str]] = frozenset({"patches"})

    def __post_init__(self) -> None:
        if self.dilate < 0:
            raise UserError(f"masked.dilate={self.dilate}; allowed: 0 or more")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with its errors masked.

        Raises:
            UserError: the method compares no denoising errors (methods of recorded steps).
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
        """Return the method's loss of masked errors; metric ``masked/share`` is the mean of the maps.

        Raises:
            UserError: the batch has no maps.
        """
        maps = self.maps(batch)
        weight = maps
        if self.reduction == "masked_mean":
            channels, elements = batch.x.shape[1], batch.x[0].numel()
            inside = (channels * maps.flatten(1).sum(1)).clamp(min=1)
            weight = maps * (elements / inside).reshape(-1, *(1,) * (maps.ndim - 1))
        step = with_reduce(method, MaskedReduce(innermost(method).reduce, weight))(
            policy, reference, batch, generator
        )
        return replace(step, metrics={**step.metrics, "masked/share": maps.mean()})

    def maps(self, batch: Batch[Any]) -> Tensor:
        """Return the maps of the batch, (B, 1, *spatial) float32 in [0, 1].

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
            flat = maps.reshape(-1, 1, *maps.shape[-2:])  # frames of a video are dilated one by one
            maps = max_pool2d(flat, size, 1, self.dilate).reshape(maps.shape)
        return maps


def with_reduce(method: Method[Any], reduce: Reduce) -> Method[Any]:
    """Return ``method`` with another ``reduce``; strategies around it are kept."""
    if isinstance(method, Wrapped):
        return replace(method, method=with_reduce(method.method, reduce))
    changed: Method[Any] = replace(method, reduce=reduce)  # type: ignore[type-var]
    return changed


CARD = StrategyCard(
    name="masked",
    title="Masked pairs",
    paper="SimpleTuner, masked Flow-DPO (released code)",
    year=2026,
    arxiv="",
    composes="methods over noisy states; needs maps in the data",
    cost="nothing",
    strategy=Masked,
)
