"""MPS (Zhang et al. 2024, "Multi-dimensional Human Preference", arXiv 2405.14705; Kwai-Kolors/MPS).

A CLIP ViT-H/14 whose image tokens look at those words of the prompt that have to do with a list of criteria:
score = exp(logit_scale) cos(text, what the class token has become). The published checkpoint is a pickle of
classes that are gone; RE-N-Y/mpsv1 holds the same weights as safetensors, and that layout is read here.

What differs from the released code: the largest similarity of words and criteria, by which the others are
divided, is that of the prompt itself and not of the whole batch, so that a score does not depend on what else
is scored. The README and the model keep words above 0.01 of it, both evaluation scripts those above 0.3:
``threshold=0.3``.

``FILE@CLIP`` names where its architecture and tokenizer are (LAION's ViT-H/14 if left out).
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
    colours,
    empty_clip,
    filled,
    load_tokenizer,
    placed,
    read_config,
    unit,
)
from diffalign.rewards.zoo.cross_model import CrossModel, empty_cross_model, own_names

CRITERIA = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of overall preference, as the model was trained and published with."""

_NAME = "mps"
_FILE = "model.safetensors"
_LEGACY_EOS = 2  # reads a text at its highest token id, as the published code does


@dataclass(frozen=True)
class Mps:
    """A CLIP, the cross model over it, and the share of the largest similarity that a word must exceed."""

    clip: Clip
    cross: CrossModel
    threshold: float = 0.01
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32; PIL images take the exact path, pixels (B, 3, H, W) the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        model = self.clip.model
        with torch.no_grad():
            words, sentences = self._read(prompts)
            criteria, _ = self._read([CRITERIA])
            kept = about(words, criteria[0], self.threshold)
        states = model.vision_model(pixel_values=self.clip.inputs(images)).last_hidden_state
        looks = self.cross(model.visual_projection(states), words, kept)[:, 0]
        return self.clip.scale * (unit(sentences) * unit(looks)).sum(-1)

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Every token (B, L, D) and the whole (B, D) of texts, projected."""
        model = self.clip.model
        output = model.text_model(input_ids=self.clip.tokens(texts).to(model.device))
        return model.text_projection(output.last_hidden_state), model.text_projection(output.pooler_output)


def about(
    words: Float[Tensor, "B L D"], criteria: Float[Tensor, "M D"], threshold: float
) -> Bool[Tensor, "B L"]:
    """Which tokens of prompts have to do with the criteria: their largest product with a token of those,
    divided by the largest in the prompt, exceeds ``threshold``.
    """
    nearest = (words.float() @ criteria.float().T).amax(-1)
    return nearest / nearest.amax(-1, keepdim=True) > threshold


def load(source: str | None, place: Place) -> Mps:
    """MPS from the hub, or a file of its safetensors layout.

    Raises:
        UserError: nothing there, the hub cannot be reached, or weights of another model.
    """
    (weights, architecture), options = places_and_options(_NAME, source, 2, ["threshold"])
    threshold = number(_NAME, "threshold", options.get("threshold", "0.01"))
    if not threshold < 1:
        raise UserError(f"reward {_NAME!r}: threshold={threshold:g} would keep no word; allowed: below 1")
    path = file_of(_NAME, weights or REGISTRY[_NAME].checkpoint, _FILE)
    clip, cross = _parts(read_state(_NAME, path), str(path))
    architecture = architecture or VIT_H
    config = read_config(_NAME, architecture)
    config.text_config.eos_token_id = _LEGACY_EOS
    model = filled(_NAME, empty_clip(config), clip, str(path))
    words = load_tokenizer(_NAME, architecture)
    return Mps(
        Clip(placed(model, place), words, *colours(_NAME, architecture)),
        cross.to(place.device, getattr(torch, place.dtype)).eval().requires_grad_(False),
        threshold,
        place.batch_size,
    )


def _parts(state: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], CrossModel]:
    """Return the weights of the CLIP, and the cross model with its own."""
    parts: dict[str, dict[str, Tensor]] = {"mps.model.": {}, "mps.cross_model.": {}}
    for key, tensor in state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            raise UserError(
                f"reward {_NAME!r}: {path!r} is another model's checkpoint: MPS has no weight {key} (the "
                "layout of RE-N-Y/mpsv1 is read; the pickle of the authors cannot be)"
            )
        if not key.endswith(".position_ids"):  # saved by older transformers
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
