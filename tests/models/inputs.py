"""Inputs of the tiny networks."""

import torch
from torch import Tensor

from diffalign.models.loaded import LoadedModel


def states(count: int = 2, side: int = 8, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Noisy latents (count, channels, side, side) and times (count,)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, side, side, generator=generator), torch.linspace(0.3, 0.9, count)


def states_of(model: LoadedModel, count: int = 2) -> tuple[Tensor, Tensor]:
    """Noisy latents and times of a model of images."""
    return states(count, channels=model.codec.channels(model.pipeline.vae.config))


def conditions(model: LoadedModel, prompts: list[str]) -> dict[str, Tensor]:
    sizes = torch.tensor([[64.0, 72.0]]).expand(len(prompts), 2)
    return model.encode_prompts(prompts) | model.micro_conditions(sizes, torch.zeros_like(sizes), sizes)


def random_inputs(model: LoadedModel, side: int = 64) -> tuple[Tensor, dict[str, Tensor]]:
    """Return latents of two rows of ``side`` pixels and random conditions, of texts of 13 and 6 tokens
    where a mask tells it.
    """
    generator = torch.Generator().manual_seed(1)
    shape = model.latent_shape(side, side, model.usable_frames(9))
    parts = {name: getattr(part, "config", {}) for name, part in model.pipeline.components.items()}
    configs = {n: c.to_dict() if hasattr(c, "to_dict") else dict(c) for n, c in parts.items()}
    shapes = model.family.cond_shapes(configs)
    sources = model.family.sources
    if sources is not None and sources.usual:
        shapes |= sources.shapes(shape)
    cond = {name: torch.randn(2, *rest, generator=generator) for name, rest in shapes.items()}
    mask = cond.get("encoder_attention_mask")
    if mask is not None:
        mask.fill_(0)
        mask[0, :13], mask[1, :6] = 1, 1  # 13 tokens cannot be divided
    return torch.randn(2, *shape, generator=generator), cond
