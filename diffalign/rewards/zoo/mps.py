"""MPS (Zhang et al. 2024, "Multi-dimensional Human Preference", arXiv 2405.14705; Kwai-Kolors/MPS).

A CLIP ViT-H/14 whose image tokens cross-attend to the prompt tokens that are relevant to a list of criteria:
score = exp(logit_scale) cos(text, class token after cross-attention). The published checkpoint is a pickle
that needs the authors' classes; RE-N-Y/mpsv1 holds the same weights as safetensors, and this layout is read.

What differs from the released code: token similarities are divided by the largest one of the prompt, not of
the whole batch, so that a score does not depend on the other images of the batch. README and model of the
release use the threshold 0.01, both evaluation scripts 0.3: ``threshold=0.3``.

``FILE@CLIP`` names the folder or hub id of its architecture and tokenizer (default: LAION's ViT-H/14).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fill, read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import file_of, number, places_and_options
from diffalign.rewards.zoo.clip import (
    VIT_H,
    Clip,
    empty_clip,
    filled,
    load_tokenizer,
    pixel_statistics,
    placed,
    read_config,
    unit,
)
from diffalign.rewards.zoo.cross_model import CrossModel, empty_cross_model, own_names

CRITERIA = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of overall preference, as in training and release."""

_NAME = "mps"
_FILE = "model.safetensors"
_LEGACY_EOS = 2  # makes CLIPTextModel pool at the highest token id, as the published code does


@dataclass(frozen=True)
class Mps:
    """The reward.

    Attributes:
        clip: the CLIP.
        cross: the cross model on its projected tokens.
        threshold: share of the prompt's largest similarity to the criteria that a relevant token exceeds.
        batch_size: images a forward pass.
    """

    clip: Clip
    cross: CrossModel
    threshold: float = 0.01
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        model = self.clip.model
        with torch.no_grad():
            tokens, texts = self._encode(prompts)
            criteria, _ = self._encode([CRITERIA])
            relevant = relevant_tokens(tokens, criteria[0], self.threshold)
        states = model.vision_model(pixel_values=self.clip.inputs(images)).last_hidden_state
        conditioned = self.cross(model.visual_projection(states), tokens, relevant)[:, 0]
        return self.clip.scale * (unit(texts) * unit(conditioned)).sum(-1)

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the projected embeddings of each token (B, L, D) and of the text (B, D)."""
        model = self.clip.model
        output = model.text_model(input_ids=self.clip.tokens(texts).to(model.device))
        return model.text_projection(output.last_hidden_state), model.text_projection(output.pooler_output)


def relevant_tokens(
    tokens: Float[Tensor, "B L D"], criteria: Float[Tensor, "M D"], threshold: float
) -> Bool[Tensor, "B L"]:
    """Return which prompt tokens are relevant to the criteria.

    A token's similarity is its largest inner product with a token of the criteria. It is relevant if its
    similarity, divided by the largest of its prompt, exceeds ``threshold``.
    """
    similarity = (tokens.float() @ criteria.float().T).amax(-1)
    return similarity / similarity.amax(-1, keepdim=True) > threshold


def load(source: str | None, place: Place) -> Mps:
    """Load MPS from the hub, or from a file of its safetensors layout.

    Raises:
        UserError: a missing file, the hub cannot be reached, or weights of another model.
    """
    (weights, architecture), options = places_and_options(_NAME, source, 2, ["threshold"])
    threshold = number(_NAME, "threshold", options.get("threshold", "0.01"))
    if not threshold < 1:
        raise UserError(f"reward {_NAME!r}: threshold={threshold:g} would keep no word; allowed: below 1")
    path = file_of(_NAME, weights or REGISTRY[_NAME].checkpoint, _FILE)
    clip_state, cross = _parts(read_state(_NAME, path), str(path))
    architecture = architecture or VIT_H
    config = read_config(_NAME, architecture)
    config.text_config.eos_token_id = _LEGACY_EOS
    model = filled(_NAME, empty_clip(config), clip_state, str(path))
    tokenizer = load_tokenizer(_NAME, architecture)
    return Mps(
        Clip(placed(model, place), tokenizer, *pixel_statistics(_NAME, architecture)),
        cross.to(place.device, getattr(torch, place.dtype)).eval().requires_grad_(False),
        threshold,
        place.batch_size,
    )


def _parts(state: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], CrossModel]:
    """Split a checkpoint into the weights of the CLIP and the cross model with its weights."""
    parts: dict[str, dict[str, Tensor]] = {"mps.model.": {}, "mps.cross_model.": {}}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            raise UserError(
                f"reward {_NAME!r}: {path!r} is another model's checkpoint: MPS has no weight {key} (the "
                "layout of RE-N-Y/mpsv1 is read; the pickle of the authors cannot be)"
            )
        if not key.endswith(".position_ids"):  # a buffer that older versions of transformers saved
            parts[prefix][key.removeprefix(prefix)] = tensor
    cross = own_names(parts["mps.cross_model."])
    try:
        empty = empty_cross_model(cross)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"reward {_NAME!r}: {path!r} is another model's checkpoint: there is no cross model in it"
        ) from error
    fill(_NAME, empty, cross, path)
    return parts["mps.model."], empty
