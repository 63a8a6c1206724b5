"""LoRA adapters of CLIP text encoders, trained with the network's (``model.text_encoder.lora``)."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign.config.schema import LoraConfig, ModelConfig, TextLoraConfig
from diffalign.errors import UserError
from diffalign.models.families.base import Family
from diffalign.models.loaded import LoadedModel
from diffalign.models.lora import add_lora, check_targets, has_lora_loader, trainable
from diffalign.models.text_encoders import TextConditioned, clip_layer


def trained_encoders(config: TextLoraConfig, family: Family) -> tuple[str, ...]:
    """Return the text encoders that get adapters, in the family's order; none where the rank is 0.

    Raises:
        UserError: a family without CLIP encoders, or an encoder that it does not have.
    """
    if not config.rank:
        return ()
    if not hasattr(family, "clip_layer") or not has_lora_loader(family):
        raise UserError(
            f"model.text_encoder.lora.rank={config.rank}: text encoders of {family.name} are not trained; "
            "allowed: 0, or a model of sd15, sd21, animatediff or sdxl"
        )
    unknown = [name for name in config.encoders if name not in family.text_encoders]
    if unknown:
        raise UserError(
            f"model.text_encoder.lora.encoders: {family.name} has no {unknown[0]!r}; "
            f"allowed: {', '.join(family.text_encoders)}"
        )
    return tuple(name for name in family.text_encoders if not config.encoders or name in config.encoders)


def begin_training_text(model: LoadedModel, config: ModelConfig) -> tuple[str, ...]:
    """Switch the model to tokens for the text encoders that a run trains; return their names.

    Call it before anything is encoded: the key of a cache depends on it.

    Raises:
        UserError: see ``trained_encoders``; or an encoder that takes an attention mask.
    """
    names = trained_encoders(config.text_encoder.lora, model.family)
    for name in names:
        if getattr(getattr(model.pipeline, name).config, "use_attention_mask", False):
            raise UserError(
                f"model.text_encoder.lora: the {name} of {model.source} takes an attention mask, which "
                "tokens in a batch do not have; allowed: model.text_encoder.lora.rank 0"
            )
    model.trained_encoders = names
    return names


def prepare_text_policy(
    model: LoadedModel, config: ModelConfig, seed: int
) -> tuple[TextConditioned, list[tuple[str, nn.Parameter]]]:
    """Add adapters to the trained text encoders, in place.

    Returns:
        The network with the encoders as one module, and names and float32 parameters to train besides the
        network's; a name begins with the encoder's.

    Raises:
        UserError: a target that matches no module of an encoder.
    """
    encoders = {name: getattr(model.pipeline, name) for name in model.trained_encoders}
    for encoder in encoders.values():
        encoder.to(model.device)
        for module in encoder.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # of attention: policy and reference must be the same function
        if config.gradient_checkpointing:
            every = int(config.gradient_checkpointing)
            checkpoint_encoder(encoder, partial(checkpoint, use_reentrant=False), every)
    parameters = add_text_lora(encoders, config.text_encoder.lora, model.family, seed)
    joint = TextConditioned(model.network, encoders, model.family, model.denoiser().call)
    return joint.train(), parameters


def checkpoint_encoder(encoder: nn.Module, function: Callable[..., Any], every: int = 1) -> None:
    """Checkpoint every ``every``-th layer of a text encoder in place, the first one first; ``function`` calls
    one, (layer, *inputs).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in encoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[::every]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = function


def add_text_lora(
    encoders: Mapping[str, Any], config: TextLoraConfig, family: Family, seed: int = 0
) -> list[tuple[str, nn.Parameter]]:
    """Add float32 adapters to text encoders; see ``prepare_text_policy``.

    A last layer whose output the family does not use gets none: it would have no gradient.
    """
    parameters: list[tuple[str, nn.Parameter]] = []
    for number, (name, encoder) in enumerate(encoders.items(), 1):
        encoder.requires_grad_(False)
        check_targets(encoder, config.targets, "model.text_encoder.lora.targets")
        targets = tuple(_read_modules(encoder, config.targets, clip_layer(family)))
        # peft compares the ends of names: whole names match themselves alone
        add_lora(encoder, LoraConfig(config.rank, config.alpha, targets=targets), seed + number)
        parameters += [(f"{name}.{key}", parameter) for key, parameter in trainable(encoder)]
    return parameters


def _read_modules(encoder: nn.Module, targets: tuple[str, ...], layer: int) -> list[str]:
    """Return the targeted modules that the used output of an encoder depends on."""
    last: int = encoder.config.num_hidden_layers - 1  # type: ignore[union-attr, assignment, operator]
    unread = layer == -2 and not hasattr(encoder, "text_projection")
    return [
        name
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == target or name.endswith(f".{target}") for target in targets)
        and not (unread and re.search(rf"\.layers\.{last}\.", f".{name}"))
    ]


def load_text_state(model: LoadedModel, config: ModelConfig, state: Mapping[str, Tensor]) -> list[str]:
    """Load the text encoders' adapters of a checkpoint into the model; return these encoders.

    Args:
        config: of the run that the checkpoint is of.
        state: its tensors by name, the network's among them.

    Raises:
        UserError: tensors of other adapters than the configuration's.
    """
    names = trained_encoders(config.text_encoder.lora, model.family)
    encoders = {name: getattr(model.pipeline, name) for name in names}
    here = dict(add_text_lora(encoders, config.text_encoder.lora, model.family))
    saved = {key: value for key, value in state.items() if is_text(key)}
    odd = sorted(here.keys() ^ saved.keys()) or [k for k in here if here[k].shape != saved[k].shape]
    if odd:
        raise UserError(f"incompatible checkpoint: {odd[0]} is not as its run's model.text_encoder says")
    with torch.no_grad():
        for key, parameter in here.items():
            parameter.copy_(saved[key])
    return list(names)


def is_text(name: str) -> bool:
    """Return whether a trained tensor is a text encoder's, by its name."""
    return name.startswith(("text_encoder.", "text_encoder_2."))
