"""CLIP text encoders that are trained beside the network: batches hold token ids, not embeddings.

The conditions of a batch have one group of names an encoder: ``text_encoder.tokens`` (B, tokens) of a trained
one, ``text_encoder_2.encoder_hidden_states`` and ``text_encoder_2.text_embeds`` of a frozen one, whose
embeddings are cached. ``TextConditioned`` makes the family's conditions of them in each call, so that the
policy encodes with its adapters and the reference without.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.denoisers import Call
from diffalign.models.families.base import Family, rows
from diffalign.types import Cond

NOTHING = -1
"""Token id of a prompt whose embedding is zeros: SDXL's default negative condition."""


class TextConditioned(nn.Module):
    """A network and its trained text encoders, as one module.

    Attributes:
        network: the diffusion network.
        encoders: the trained encoders by component.
    """

    def __init__(
        self, network: nn.Module, encoders: Mapping[str, nn.Module], family: Family, call: Call
    ) -> None:
        """Hold the modules, which remain components of their pipeline, and the network's call."""
        super().__init__()
        self.network = network
        self.encoders = nn.ModuleDict(encoders)
        self._family = family
        self._call = call

    def forward(self, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the network's raw prediction, shaped like ``x_t``."""
        return self._call(self.network, x_t, model_time, self.conditions(cond))

    def conditions(self, cond: Cond) -> dict[str, Tensor]:
        """Return the family's conditions, with the tokens of a batch's conditions encoded."""
        joined = {name: value for name, value in cond.items() if "." not in name}
        states: list[Tensor] = []
        for name in self._family.text_encoders:
            own = {key.partition(".")[2]: v for key, v in cond.items() if key.startswith(f"{name}.")}
            if name in self.encoders:
                own = hidden_states(self.encoders[name], own["tokens"], clip_layer(self._family))
            states.append(own.pop("encoder_hidden_states"))
            joined |= own
        return joined | {"encoder_hidden_states": torch.cat(states, dim=-1)}


def call_conditioned(network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
    """Call a ``TextConditioned``, bare or prepared: the ``call`` of its denoiser."""
    prediction: Tensor = network(x_t, model_time, cond)
    return prediction


def clip_layer(family: Family) -> int:
    """Return the layer of its CLIP encoders that a family reads: -1 the last, normed; -2 the one before."""
    layer: int = family.clip_layer  # type: ignore[attr-defined]
    return layer


def hidden_states(encoder: nn.Module, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """Return the output of a CLIP text encoder for tokens, in float32.

    Args:
        tokens: (B, tokens) ids; a row of ``NOTHING`` becomes zeros.
        layer: see ``clip_layer``.

    Returns:
        ``encoder_hidden_states`` (B, tokens, width), and ``text_embeds`` (B, projection) of an encoder that
        projects.
    """
    output: Any = encoder(tokens.long().clamp_min(0), output_hidden_states=layer != -1)
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    known = (tokens[:, :1] != NOTHING).float()
    result = {"encoder_hidden_states": states.float() * known[..., None]}
    if "text_embeds" in output:
        result["text_embeds"] = output.text_embeds.float() * known
    return result


def encode_parts(
    pipeline: Any, family: Family, trained: Sequence[str], prompts: list[str]
) -> dict[str, Tensor]:
    """Return the conditions of prompts by encoder: tokens (int32) of trained ones, embeddings of frozen ones.

    Prompts are padded and truncated as in the stock pipeline.
    """
    parts: dict[str, Tensor] = {}
    for name in family.text_encoders:
        tokenizer, encoder = (
            getattr(pipeline, name.replace("text_encoder", "tokenizer")),
            getattr(pipeline, name),
        )
        tokens: Tensor = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        if name in trained:
            parts[f"{name}.tokens"] = tokens.int()
            continue
        with torch.no_grad():
            states = hidden_states(encoder, tokens.to(encoder.device), clip_layer(family))
        parts |= {f"{name}.{key}": value for key, value in states.items()}
    return parts


def negative_parts(pipeline: Any, family: Family, trained: Sequence[str], n: int) -> dict[str, Tensor]:
    """Return the stock pipeline's default negative conditions by encoder, (n, ...)."""
    one = encode_parts(pipeline, family, trained, [""])
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        one = {
            key: torch.full_like(value, NOTHING if key.endswith(".tokens") else 0)
            for key, value in one.items()
        }
    return rows(one, n)
