"""Load checkpoints of OpenCLIP (open_clip.model.CLIP) as transformers' CLIPModel.

Names are mapped, the fused projections of queries, keys and values are split, and sizes are read from the
weights. Two settings are not in the weights: the width of an attention head (64, except for the vision towers
of ViT-H, ViT-g and ViT-bigG) and the activation (GELU; OpenAI's own weights need quick GELU).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.zoo.clip import empty_clip, filled

_HEADS = {1280: 80, 1408: 88, 1664: 104}
"""Width of a head by the width of a vision tower, as in OpenCLIP's model configurations."""

_LEGACY_EOS = 2  # makes CLIPTextModel pool at the highest token id, as OpenCLIP does

_DIRECT = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt thus in transformers
    "visual.ln_post": "vision_model.post_layernorm",
}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def to_clip_state(name: str, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename the weights of an open_clip CLIP to the names of transformers' CLIPModel.

    Args:
        name: the reward's name, for messages.
        state: weights under open_clip's names (``transformer.resblocks.0...``, ``visual.proj``).
        source: file or hub id of the weights, for messages.

    Raises:
        UserError: a name that open_clip's CLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        norm, _, kind = key.rpartition(".")
        if key in _DIRECT:
            renamed[_DIRECT[key]] = tensor
        elif key in _TRANSPOSED:
            renamed[_TRANSPOSED[key]] = tensor.T.contiguous()
        elif norm in _NORMS:
            renamed[f"{_NORMS[norm]}.{kind}"] = tensor
        elif layer := _LAYER.fullmatch(key):
            renamed |= _layer(layer, tensor)
        else:
            raise UserError(
                f"reward {name!r}: {source!r} is another model's checkpoint: OpenCLIP has no weight {key}"
            )
    return renamed


def _layer(match: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """Return CLIPModel's names and tensors for one weight of a transformer layer (three for a fused one)."""
    visual, number, part, kind = match.groups()
    layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}."
    if part != "attn.in_proj":
        return {f"{layer}{_IN_LAYER.get(part, part)}.{kind}": tensor}
    names = [f"{layer}self_attn.{which}_proj.{kind}" for which in "qkv"]
    return {key: piece.contiguous() for key, piece in zip(names, tensor.chunk(3), strict=True)}


def clip_config(name: str, state: Mapping[str, Tensor], source: str, activation: str = "gelu") -> Any:
    """Derive the CLIPConfig from weights under transformers' names; layer norms have eps 1e-5, as OpenCLIP's.

    Raises:
        UserError: the weights that determine the sizes are missing or of another shape.
    """
    from transformers import CLIPConfig

    try:
        vocabulary, text_width = state["text_model.embeddings.token_embedding.weight"].shape
        width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
        patches = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
        text = {
            **_tower(state, "text_model", text_width, 64),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
            "eos_token_id": _LEGACY_EOS,
        }
        vision = {
            **_tower(state, "vision_model", width, _HEADS.get(width, 64)),
            "patch_size": patch,
            "image_size": math.isqrt(patches) * patch,
        }
        return CLIPConfig(
            text_config={**text, "hidden_act": activation},
            vision_config={**vision, "hidden_act": activation},
            projection_dim=len(state["visual_projection.weight"]),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"reward {name!r}: {source!r} is another model's checkpoint: no OpenCLIP model with a vision "
            f"transformer ({type(error).__name__}: {error})"
        ) from error


def _tower(state: Mapping[str, Tensor], tower: str, width: int, head: int) -> dict[str, int]:
    """Return the configuration entries common to both towers; ``head`` is the width of an attention head."""
    pattern = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.")
    numbers = [int(match[1]) for key in state if (match := pattern.match(key))]
    return {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(numbers),
        "num_attention_heads": max(1, width // head),
        "intermediate_size": len(state[f"{tower}.encoder.layers.0.mlp.fc1.weight"]),
    }


def load_open_clip(
    name: str, state: Mapping[str, Tensor], source: str, config: Any = None, activation: str = "gelu"
) -> Any:
    """Return a CLIPModel with the weights of an open_clip CLIP, on the CPU in their dtype.

    Args:
        name: the reward's name, for messages.
        state: weights under open_clip's names.
        source: file or hub id of the weights, for messages.
        config: a CLIPConfig; None derives it from the weights.
        activation: ``gelu``, or ``quick_gelu`` for OpenAI's weights; ignored if ``config`` is given.

    Raises:
        UserError: weights of another model.
    """
    renamed = to_clip_state(name, state, source)
    config = config or clip_config(name, renamed, source, activation)
    return filled(name, empty_clip(config), renamed, source)
