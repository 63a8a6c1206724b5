"""The safe precision of an autoencoder, and a context that silences warnings."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Silence loggers of these names below errors inside the context."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


@contextmanager
def vae_precision(vae: Any) -> Iterator[Any]:
    """Return the VAE in a precision safe for it: float32 where its configuration forces an upcast.

    SDXL's own VAE overflows in float16; with the fp16-fix VAE (``force_upcast`` false) nothing is cast.
    """
    stored = vae.dtype
    upcast = vae.config.get("force_upcast") and stored in (torch.float16, torch.bfloat16)
    if not upcast:
        yield vae
        return
    with only_errors("diffusers"):  # it warns about casting
        try:
            yield vae.to(torch.float32)
        finally:
            vae.to(stored)


AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
