"""LoRA adapters put on a network: by diffusers where its class has a loader for them, by peft where not."""

from typing import Any

from torch import nn


def has_lora_loader(network_class: str) -> bool:
    """Whether diffusers itself puts LoRAs on networks of this class of its; peft does on any."""
    import diffusers
    from diffusers.loaders import PeftAdapterMixin

    return issubclass(getattr(diffusers, network_class), PeftAdapterMixin)


def inject(network: Any, config: Any, adapter: str) -> None:
    """Put adapters of a peft configuration on a network, under a name, and make them the active ones."""
    from diffusers.loaders import PeftAdapterMixin
    from peft import inject_adapter_in_model

    if isinstance(network, PeftAdapterMixin):
        network.add_adapter(config, adapter_name=adapter)
    else:
        inject_adapter_in_model(config, network, adapter)
        activate(network, adapter)


def activate(network: nn.Module, adapter: str) -> None:
    """Send a network through one set of adapters, and train that set alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter)
