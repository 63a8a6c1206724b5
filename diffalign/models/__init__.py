"""Model families: load, encode prompts and pixels, decode, call the network, adapters, attention, estimates.

Importing this package imports no torch: ``diffalign.models.load`` and the other names are looked up when they
are used.
"""

import importlib
from typing import Any

_WHERE = {
    "FAMILIES": "families.registry",
    "get_family": "families.registry",
    "load": "loading",
    "LoadedModel": "loaded",
    "NetworkDenoiser": "denoisers",
    "AdaptersOff": "denoisers",
    "prepare_policy": "lora",
    "policy_denoiser": "lora",
    "reference_denoiser": "lora",
    "trainable_state": "lora",
    "load_trainable_state": "lora",
    "set_attention": "attention",
}


def __getattr__(name: str) -> Any:
    """Import the module that has ``name``."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
