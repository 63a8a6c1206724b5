"""Notices that are not told: those of packages for quantised weights, which concern no run of ours, and notes
that every process of a launcher would repeat. Importing this imports no torch.
"""

import logging
import os

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


def main_logger(name: str) -> logging.Logger:
    """Return the logger of a module whose notes are the same in every process, such as those on a model's
    files: the first process of a launcher tells them, the others tell errors only.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_of_main_process)
    return logger


def _of_main_process(record: logging.LogRecord) -> bool:
    """Whether this process tells a record. Values of RANK that are no ranks are refused elsewhere
    (``devices.share``)."""
    return record.levelno >= logging.ERROR or os.environ.get("RANK") in (None, "", "0")
