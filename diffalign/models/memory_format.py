"""The order in which the weights of convolutions lie in memory."""

from typing import Any

import torch

from diffalign.errors import UserError

CONVOLUTIONAL = ("UNet2DConditionModel",)
"""Networks of which convolutions over images are a large part. Those of videos turn their axes at each block,
and transformers have no more than one convolution.
"""


def check_channels_last(network: Any) -> None:
    """Check that channels last can have an effect.

    Raises:
        UserError: it cannot with this network.
    """
    name = type(network).__name__
    if name not in CONVOLUTIONAL:
        raise UserError(
            f"model.channels_last=True with {name}, which is no UNet of images and has hardly a convolution "
            f"to speed up; allowed: false, or true with {', '.join(CONVOLUTIONAL)}"
        )


def set_channels_last(network: Any) -> None:
    """Put the weights of convolutions channels last, in place; activations follow them.

    Raises:
        UserError: see ``check_channels_last``.
    """
    check_channels_last(network)
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
