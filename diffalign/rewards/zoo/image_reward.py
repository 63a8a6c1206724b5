"""ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977; THUDM/ImageReward): BLIP with a scalar head.

A ViT encodes the image. A BERT with cross-attention to the patches in every layer reads at most 35 tokens of
the prompt. Its first hidden state passes five linear layers without activations. The score is that value,
standardised by mean and std over the training data.

The networks are transformers' BlipVisionModel and BlipTextModel; weights are renamed from ImageReward.pt.
Sizes are read from the weights and from med_config.json.

What differs from the released code: images are converted to RGB before resizing and cropping, not after.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fetched, fill, is_hub_id, read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.preprocess import Crop
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.utils.text import read_json_object

LENGTH = 35
"""Tokens of a prompt, [CLS] and [SEP] included; longer prompts are truncated."""

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and std of raw scores over the training data, from the released code."""

_NAME = "image_reward"
_WEIGHTS, _CONFIG = "ImageReward.pt", "med_config.json"
_TOKENIZER = "google-bert/bert-base-uncased"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_MARKS = ["[DEC]", "[ENC]"]  # BLIP's own tokens, after those of BERT
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)
_HEAD_WIDTH = 64  # width of an attention head, in all published ViTs of BLIP
_MLP = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}  # the indices between are dropouts
_RENAMED = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.proj\.": ".self_attn.projection.",
    r"\.attn\.": ".self_attn.",
}


@dataclass(frozen=True)
class ImageReward:
    """The reward.

    Attributes:
        vision: a BlipVisionModel.
        text: a BlipTextModel with cross-attention.
        head: linear layers in float32.
        tokenizer: BERT's tokenizer with BLIP's tokens.
        batch_size: images a forward pass.
    """

    vision: Any
    text: Any
    head: nn.Module
    tokenizer: Any
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        device = self.vision.device
        crop = Crop(self.vision.config.image_size, to_even=True)
        patches = self.vision(crop(images, device).to(self.vision.dtype)).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(device)
        states = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,  # without padding, so that they need no mask
        ).last_hidden_state
        return (self.head(states[:, 0].float()).squeeze(-1) - MEAN) / STD


def load(source: str | None, place: Place) -> ImageReward:
    """Load ImageReward v1.0 from the hub, or a model of its format.

    Args:
        source: a folder or hub id with ImageReward.pt and med_config.json, or a file with med_config.json
            beside it; each optionally with ``@TOKENIZER``, the folder or hub id of BERT's tokenizer.
        place: device and dtype.

    Raises:
        UserError: a missing file, the hub cannot be reached, or weights or tokenizer of another model.
    """
    path, _, tokenizer_source = (source or REGISTRY[_NAME].checkpoint).partition("@")
    weights, config = _files(path)
    if not tokenizer_source:
        beside = any((weights.parent / name).is_file() for name in _TOKENIZER_FILES)
        tokenizer_source = str(weights.parent) if beside else _TOKENIZER
    state = read_state(_NAME, weights)
    vision, text, head = _networks(state, _read_config(config), str(weights))
    tokenizer = _load_tokenizer(tokenizer_source, text.config.vocab_size)
    for network in (vision, text):
        network.to(place.device, getattr(torch, place.dtype)).eval().requires_grad_(False)
    head.to(place.device, torch.float32).eval().requires_grad_(False)
    return ImageReward(vision, text, head, tokenizer, place.batch_size)


def _files(path: str) -> tuple[Path, Path]:
    """Return the paths of weights and configuration for a folder, a weights file or a hub id."""
    local = Path(path)
    if local.is_dir():
        weights = local / _WEIGHTS
    elif is_hub_id(path):
        return fetched(_NAME, path, _WEIGHTS, "FOLDER"), fetched(_NAME, path, _CONFIG, "FOLDER")
    else:
        weights = local
    for file in (weights, weights.parent / _CONFIG):
        if not file.is_file():
            raise UserError(
                f"reward {_NAME!r}: there is no file {str(file)!r}; {_WEIGHTS} and {_CONFIG} of "
                f"{REGISTRY[_NAME].checkpoint} are needed beside each other"
            )
    return weights, weights.parent / _CONFIG


def _read_config(path: Path) -> dict[str, Any]:
    """Return the arguments of BlipTextConfig that the published BERT configuration states."""
    try:
        config = read_json_object(path)
        return {name: config[name] for name in _CONFIG_KEYS}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"reward {_NAME!r}: {str(path)!r} is no configuration of BLIP's BERT ({type(error).__name__}: "
            f"{error})"
        ) from error


def _networks(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> tuple[Any, Any, nn.Module]:
    """Return vision model, text model and head with their weights, on the CPU in the weights' dtype."""
    from transformers.models.blip import BlipTextConfig, BlipTextModel, BlipVisionModel

    # the file also holds projections of BLIP's pre-training, which the score does not use
    vision_state = {_renamed(name): value for name, value in _under(state, "blip.visual_encoder.").items()}
    text_state = _under(state, "blip.text_encoder.")
    text_state.pop("embeddings.position_ids", None)
    vision_config = _vision_config(vision_state, source)
    text_config = BlipTextConfig(**config, encoder_hidden_size=vision_config.hidden_size, is_decoder=True)
    head, width = nn.Sequential(), text_config.hidden_size
    with torch.device("meta"):
        vision: Any = BlipVisionModel(vision_config)
        # is_decoder adds cross-attention; attention is bidirectional all the same
        text: Any = BlipTextModel(text_config, add_pooling_layer=False)
        for number, size in _MLP.items():
            head.add_module(number, nn.Linear(width, size))
            width = size
    fill(_NAME, vision, vision_state, source)
    fill(_NAME, text, text_state, source)
    fill(_NAME, head, _under(state, "mlp.layers."), source)
    # a non-persistent buffer, which no checkpoint holds
    positions = torch.arange(text_config.max_position_embeddings)[None]
    text.embeddings.register_buffer("position_ids", positions, persistent=False)
    return vision, text, head


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = re.sub(theirs, ours, name)
    return name


def _vision_config(state: Mapping[str, Tensor], source: str) -> Any:
    """Return the BlipVisionConfig of weights under transformers' names."""
    from transformers.models.blip import BlipVisionConfig

    try:
        width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
        side = math.isqrt(state["embeddings.position_embedding"].shape[1] - 1)
        inner = len(state["encoder.layers.0.mlp.fc1.weight"])
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"reward {_NAME!r}: {source!r} is another model's checkpoint: there is no BLIP under "
            "blip.visual_encoder in it"
        ) from error
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _load_tokenizer(source: str, tokens: int) -> Any:
    """Load BERT's tokenizer and add BLIP's tokens; UserError if the vocabulary has not ``tokens`` entries."""
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except Exception as error:  # absent, unreachable and broken files each raise their own kind
        raise UserError(
            f"reward {_NAME!r}: cannot load the tokenizer {source!r} ({type(error).__name__}); a downloaded "
            f"one of {_TOKENIZER} can be given as {_NAME}:FILE@FOLDER"
        ) from error
    tokenizer.add_tokens(_MARKS, special_tokens=True)
    if len(tokenizer) != tokens:
        raise UserError(
            f"reward {_NAME!r}: the tokenizer {source!r} has {len(tokenizer)} tokens with BLIP's two, the "
            f"weights have {tokens}; {_TOKENIZER} is the one that belongs to {_WEIGHTS}"
        )
    return tokenizer
