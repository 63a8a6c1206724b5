"""Notices of packages for quantised weights that concern no run of ours. Importing this imports no torch."""

import logging

PACKAGES = (
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
)
"""Loggers that warn while diffusers and transformers import bitsandbytes and torchao, which they do where
these are installed: of kernels and formats that a process which does not quantise never uses. What a
quantised run needs is checked when it starts (``training.packages``)."""


def silence_packages() -> None:
    """Let the loggers of ``PACKAGES`` tell errors only; a process calls it before it imports torch."""
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.ERROR)
