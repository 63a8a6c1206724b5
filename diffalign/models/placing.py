"""Where a loaded pipeline's components lie, and in how many bits."""

from typing import Any

import torch

from diffalign.config.schema import ModelConfig
from diffalign.models.experts import FIRST, SECOND
from diffalign.models.families.base import Family, present_encoders
from diffalign.models.loaded import LoadedModel
from diffalign.models.quantization import quantize
from diffalign.utils.notices import main_logger

logger = main_logger(__name__)


def place(
    pipeline: Any,
    family: Family,
    config: ModelConfig,
    device: torch.device | str,
    network_device: torch.device | str | None,
) -> None:
    """Freeze the components and put them on their devices, text encoders quantised where that is wanted.

    A network that will be quantised stays on the CPU: adapters are folded into its whole weights first.
    """
    networks = {family.network_name} | {n for n in (FIRST, SECOND) if getattr(pipeline, n, None) is not None}
    for name in (*networks, "vae", *present_encoders(family, pipeline)):
        part = getattr(pipeline, name).eval().requires_grad_(False)
        if name in networks:
            there = device if network_device is None else network_device
            part.to("cpu" if config.quantize != "none" else there)
        elif name != "vae" and config.text_encoder.quantize != "none":
            compute = getattr(torch, config.dtype)
            quantize(part, config.text_encoder.quantize, device, compute, "model.text_encoder.quantize")
        else:
            part.to(device)


def move_networks(model: LoadedModel, device: torch.device | str, trained: bool = True) -> None:
    """Put the networks on ``device``: the one that is ``trained``, if so, and the other expert's."""
    for network in list(model.networks.values())[0 if trained else 1 :]:
        network.to(device)


def quantize_network(
    model: LoadedModel, config: ModelConfig, device: torch.device | str, compute: torch.dtype
) -> None:
    """Quantise the networks in place, put them on ``device``, and say how much of each is quantised."""
    for name, network in model.networks.items():
        total = sum(p.numel() for p in network.parameters())
        count = quantize(network, config.quantize, device, compute, "model.quantize")
        logger.warning(
            "model.quantize=%s: %s of the %s's %s weights", config.quantize, f"{count:,}", name, f"{total:,}"
        )


def discard_encoders(model: LoadedModel) -> None:
    """Free the memory of VAE and frozen text encoders; their configurations stay."""
    for name in {"vae", *model.text_encoders} - {*model.trained_encoders}:
        part = getattr(model.pipeline, name)
        for inner in [n for n, _ in (*part.named_children(), *part.named_parameters(recurse=False))]:
            delattr(part, inner)
