"""The layers of a network that make keys and values of the text alone: what TIME edits.

In cross-attention they are ``to_k`` and ``to_v`` of the attentions whose context is the prompt; in the
joint attention of SD3 and FLUX ``add_k_proj`` and ``add_v_proj``. FLUX's single-stream blocks project image
and text by one matrix, so they have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from diffalign.errors import UserError

Role = Literal["keys", "values"]
_ROLES: tuple[Role, Role] = ("keys", "values")
_PAIRS = (("add_k_proj", "add_v_proj"), ("to_k", "to_v"))
_SHARED = "FluxSingleTransformerBlock"


@dataclass(frozen=True)
class Projection:
    """A linear layer that projects the text.

    Attributes:
        name: of the module in the network.
        role: what it makes of a token.
        layer: the layer.
    """

    name: str
    role: Role
    layer: nn.Linear


def text_projections(network: nn.Module) -> list[Projection]:
    """Return the projections of the text in the order of the network's modules.

    Raises:
        UserError: there are none, adapters stand on them, or keys and values are fused to one matrix.
    """
    found = []
    for name, module in network.named_modules():
        for role, part in zip(_ROLES, _names(module), strict=False):
            layer = getattr(module, part)
            if hasattr(layer, "base_layer"):
                raise UserError(
                    f"{name}.{part} carries a LoRA, and an edit changes the weights below it; allowed: a "
                    "model without adapters (`diffalign export RUN --to merged` makes one)"
                )
            found.append(Projection(f"{name}.{part}", role, layer))
    if not found:
        raise UserError(
            f"{type(network).__name__} has no layer that projects the text alone to keys and values; "
            "allowed: models with cross-attention to the prompt (SD1.5, SDXL), or joint attention with "
            "add_k_proj and add_v_proj (SD3, FLUX.1)"
        )
    return found


def shared_blocks(network: nn.Module) -> int:
    """Return the number of blocks that project image and text by the same matrices, which no edit reaches."""
    return sum(type(module).__name__ == _SHARED for module in network.modules())


def _names(module: Any) -> Sequence[str]:
    """Return the names of a module's projections of the text, keys first; none where it has none."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    if not isinstance(module, Attention | AttentionModuleMixin):
        return ()
    if getattr(module, "fused_projections", False):
        raise UserError(
            "keys and values of this network are fused to one matrix; allowed: "
            "`network.unfuse_qkv_projections()` first"
        )
    added, own = _PAIRS
    if getattr(module, added[0], None) is not None:
        return added
    return own if getattr(module, "is_cross_attention", False) else ()
