"""Tiny autoencoders (such as TAESD) for images that only judges use."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError


def load_decoder(source: str, device: torch.device | str, grad: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a function from latents (B, C, h, w) in the network's scale to pixels (B, 3, H, W) in [0, 1],
    float32.

    Args:
        source: folder or hub id of a diffusers AutoencoderTiny of the same latent space.
        device: where it runs.
        grad: pixels have gradients to the latents.

    Raises:
        UserError: it cannot be loaded.
    """
    from diffusers import AutoencoderTiny

    # All errors of the libraries mean an absent, unreachable or broken checkpoint.
    try:
        loaded: Any = AutoencoderTiny.from_pretrained(source)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"decoder {source!r} cannot be loaded as an AutoencoderTiny ({type(error).__name__}: {reason}); "
            "allowed: a folder or hub id of one"
        ) from error
    model = loaded.to(device).eval().requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            scaled = latents.to(device, torch.float32) / model.config.scaling_factor
            pixels: Tensor = model.decode(scaled, return_dict=False)[0]
            return (pixels / 2 + 0.5).clamp(0, 1)

    return decode
