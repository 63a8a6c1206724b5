"""Arithmetic on LoRAs: mixing, lower rank, extraction from full weights, merging into weights.

Truncated SVD is the best approximation of a given rank in the Frobenius norm (Eckart and Young 1936).
DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): W' = m (W + s BA) / ||W + s BA||, the norm over the
inputs of each output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.models.lora_formats import Factors, Lora
from diffalign.models.lora_merge import delta

OVERSAMPLING = 8  # further directions of the randomised SVD (Halko et al. 2011, arXiv 0909.4061, section 4.2)


def has_dora(lora: Lora) -> bool:
    """Return whether any module has DoRA's magnitude."""
    return any(f.magnitude is not None for modules in lora.values() for f in modules.values())


def folded(factors: Factors) -> Factors:
    """Return the same product with a scale of 1: the scale goes into ``up``."""
    return replace(factors, up=factors.up * factors.scale, scale=1.0)


def is_idle(lora: Lora) -> bool:
    """Return whether a LoRA changes nothing: every product of its factors is 0, and none is DoRA."""
    every = [factors for modules in lora.values() for factors in modules.values()]
    return all(f.magnitude is None and not (f.scale and f.up.any() and f.down.any()) for f in every)


def uniform(lora: Lora) -> Lora:
    """Return the same LoRA with one rank and one scale in all modules.

    Loaders that take one alpha per file are then right for all modules (diffusers keys its alpha patterns by
    names that its kohya converter does not write). Smaller ranks are filled up with zeros.
    """
    every = [f for modules in lora.values() for f in modules.values()]
    if len({(f.rank, f.scale) for f in every}) <= 1:
        return lora
    rank = max(f.rank for f in every)
    return {c: {m: _padded(folded(f), rank) for m, f in modules.items()} for c, modules in lora.items()}


def mix(loras: Sequence[tuple[Lora, float]]) -> Lora:
    """Return one LoRA whose products are the weighted sums; ranks add up.

    Raises:
        UserError: DoRA in a mixture, whose products do not add.
    """
    if len(loras) == 1 and loras[0][1] == 1:
        return loras[0][0]
    if any(has_dora(lora) for lora, _ in loras):
        raise UserError(
            "a DoRA adapter rescales the whole weight, so it cannot be weighted as a sum of LoRA factors; "
            "allowed: --to merged or single-file with --strength, or --rank N, which extracts a LoRA of it"
        )
    parts: dict[str, dict[str, list[Factors]]] = {}
    for lora, weight in loras:
        for component, modules in lora.items():
            for module, factors in modules.items():
                scaled = folded(replace(factors, scale=factors.scale * weight))
                parts.setdefault(component, {}).setdefault(module, []).append(scaled)
    return {
        component: {
            module: Factors(
                torch.cat([f.down.float() for f in found]), torch.cat([f.up.float() for f in found], dim=1)
            )
            for module, found in modules.items()
        }
        for component, modules in parts.items()
    }


def reduced(lora: Lora, rank: int, weights: Mapping[str, Mapping[str, Tensor]]) -> tuple[Lora, float]:
    """Return the nearest LoRA of a lower rank and the relative error of its products (Frobenius norm).

    Args:
        rank: of the result; modules whose own rank is lower keep it.
        weights: the base's weights by component and module: DoRA's change is measured on them.
    """
    result: Lora = {}
    lost = whole = 0.0
    for component, modules in lora.items():
        for module, factors in modules.items():
            if factors.magnitude is not None:
                change = delta(factors, weights[component][module])
                small, error, size = _from_delta(change, rank)
            else:
                small, error, size = _from_factors(factors, rank)
            result.setdefault(component, {})[module] = small
            lost, whole = lost + error, whole + size
    return result, (lost / whole) ** 0.5 if whole else 0.0


def extracted(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Factors], float]:
    """Return the LoRA of a given rank nearest to the change of weights, and its relative error.

    Args:
        base: weights by module; tuned: the same modules after training. Unchanged modules are left out.
    """
    result = {}
    lost = whole = 0.0
    for module, before in base.items():
        change = tuned[module].float() - before.float()
        if not bool(change.any()):
            continue
        result[module], error, size = _from_delta(change, rank)
        lost, whole = lost + error, whole + size
    return result, (lost / whole) ** 0.5 if whole else 0.0


def _padded(factors: Factors, rank: int) -> Factors:
    more = rank - factors.rank
    if not more:
        return factors
    down = torch.cat([factors.down, factors.down.new_zeros(more, *factors.down.shape[1:])])
    up = torch.cat(
        [factors.up, factors.up.new_zeros(factors.up.shape[0], more, *factors.up.shape[2:])], dim=1
    )
    return replace(factors, down=down, up=up)


def _from_factors(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """Reduce the rank by the SVD of the two small R factors of QR; the full product is never formed."""
    up, down = factors.scale * factors.up.double().flatten(1), factors.down.double().flatten(1)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T)
    kept = min(rank, len(s))
    shape = factors.down.shape[1:]
    small = _balanced((q_up @ u)[:, :kept], s[:kept], (v @ q_down.T)[:kept], shape)
    return small, float(s[kept:].square().sum()), float(s.square().sum())


def _from_delta(change: Tensor, rank: int) -> tuple[Factors, float, float]:
    flat = change.float().flatten(1)
    kept = min(rank, *flat.shape)
    if min(flat.shape) > 4 * (kept + OVERSAMPLING):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(flat, q=kept + OVERSAMPLING, niter=4)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
    size = float(flat.double().square().sum())
    small = _balanced(u[:, :kept], s[:kept], vh[:kept], change.shape[1:])
    return small, max(0.0, size - float(s[:kept].double().square().sum())), size


def _balanced(u: Tensor, s: Tensor, vh: Tensor, shape: Sequence[int]) -> Factors:
    """Return factors with the square roots of the singular values, so that neither overflows half
    precision."""
    root = s.sqrt()
    up, down = (u * root).float(), (root[:, None] * vh).float()
    return Factors(
        down.reshape(len(s), *shape).contiguous(),
        up.reshape(*up.shape, *([1] * (len(shape) - 1))).contiguous(),
    )
