"""Changes of LoRAs added to the weights that they stand on.

DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): W' = m (W + s BA) / ||W + s BA||, the norm over the
inputs of each output.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.models.loaded import LoadedModel
from diffalign.models.lora_formats import Factors, Lora
from diffalign.models.lora_names import modules_of
from diffalign.utils.notices import main_logger

logger = main_logger(__name__)

ROUNDED = 0.1
"""Share of a LoRA's change from which on its loss by rounding is told."""


def delta(factors: Factors, weight: Tensor) -> Tensor:
    """Return what the adapter adds to a weight, in float32 and the weight's shape; DoRA included."""
    product = factors.product().reshape(weight.shape)
    if factors.magnitude is None:
        return product
    moved = weight.float() + product
    norm = moved.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = (factors.magnitude.float() / norm).reshape(-1, *([1] * (weight.ndim - 1)))
    return scale * moved - weight.float()


@torch.no_grad()
def merge(weights: Mapping[str, Mapping[str, Tensor]], loras: Sequence[tuple[Lora, float]]) -> float:
    """Add the weighted changes of adapters to weights in place, computed in float32.

    Every change is measured on the weights as they were, so the order of adapters makes no difference; a DoRA
    at strength s moves the weight by s times its full change.

    Returns:
        The share of the change's norm that rounding to the weights' dtype takes, 0 where nothing changes.
    """
    lost = changed = 0.0
    names = {(c, m) for lora, _ in loras for c, modules in lora.items() for m in modules}
    for component, module in sorted(names):
        weight = weights[component][module]
        total: Any = weight.float()
        for lora, strength in loras:
            factors = lora.get(component, {}).get(module)
            if factors is not None:
                total = total + strength * delta(factors, weight)
        changed += float((total - weight.float()).square().sum())
        weight.copy_(total)
        lost += float((total - weight.float()).square().sum())
    return math.sqrt(lost / changed) if changed else 0.0


def merge_into(model: LoadedModel, loras: list[tuple[Lora, float]]) -> None:
    """Add weighted LoRAs to a pipeline's weights in place, and log it where rounding takes much of them."""
    components = {component for lora, _ in loras for component in lora}
    weights: Any = {
        component: {
            name: module.weight for name, module in modules_of(getattr(model.pipeline, component)).items()
        }
        for component in components
    }
    lost = merge(weights, loras)
    if lost > ROUNDED:
        logger.warning(
            "%s: rounding to %s takes %.0f %% of the change (of its norm) of the LoRAs that are folded into "
            "the weights; float32 keeps it, and a LoRA beside the weights does",
            model.source, str(model.dtype).removeprefix("torch."), 100 * lost,
        )  # fmt: skip
