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
