"""CLIP with its pre-processing, the backbone of most rewards, as transformers' CLIPModel.

``preprocess.Crop`` crops and resizes images. Mean and std are those of the checkpoint's
preprocessor_config.json, OpenAI's if it has none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import check_complete, fill, is_hub_id, unloadable
from diffalign.rewards.images import Images
from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Crop
from diffalign.rewards.registry import Place
from diffalign.utils.text import read_json_object
from diffalign.utils.transfer import sent


def unit(features: Tensor) -> Tensor:
    """Return features (B, D) normalised to unit length, float32."""
    return F.normalize(features.float(), dim=-1)


VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Hub id with the architecture and the tokenizer of rewards fine-tuned from this model."""


@dataclass(frozen=True)
class Clip:
    """A frozen CLIPModel of transformers with its tokenizer and pre-processing.

    Attributes:
        model: a CLIPModel, or a module with its parts.
        tokenizer: its tokenizer, of transformers.
        mean: mean of pixels in [0, 1], by channel.
        std: standard deviation of pixels in [0, 1], by channel.
        square: a pre-processing class of ``preprocess``, called with size, mean and std.
    """

    model: Any
    tokenizer: Any
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    square: Callable[..., Callable[..., Tensor]] = Crop

    @property
    def size(self) -> int:
        """The side of the vision tower's square input, in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def width(self) -> int:
        """D, the width of the shared embeddings."""
        return self.model.config.projection_dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; ``logit_scale`` alone is always float32."""
        return self.model.visual_projection.weight.dtype

    def image_embeddings(self, images: Images) -> Tensor:
        """Return unit image embeddings (B, D), float32; differentiable for a tensor of pixels."""
        return unit(self.model.get_image_features(pixel_values=self.inputs(images)).pooler_output)

    def inputs(self, images: Images) -> Tensor:
        """Return the vision tower's input, (B, 3, size, size) in its dtype; differentiable for tensors."""
        square = self.square(self.size, self.mean, self.std)
        return square(images, self.model.device).to(self.dtype)

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Return unit text embeddings (B, D), float32; prompts are truncated to the model's context."""
        return self.embeddings_of(self.tokens(prompts))

    def embeddings_of(self, ids: Tensor) -> Tensor:
        """Return unit text embeddings (B, D), float32, of token ids (B, L)."""
        with torch.no_grad():
            output = self.model.get_text_features(input_ids=sent(ids, self.model.device))
        return unit(output.pooler_output)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids (B, L), int64, padded and truncated to the model's context length L.

        Raises:
            UserError: a prompt holds a special token such as <|endoftext|>, at which the model would stop.
        """
        refuse_marks(prompts, (self.tokenizer.bos_token, self.tokenizer.eos_token))
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens.input_ids

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), a scalar."""
        return self.model.logit_scale.detach().float().exp()


def refuse_marks(prompts: Sequence[str], marks: Sequence[str | None]) -> None:
    """Raise a UserError if a prompt holds one of the special tokens ``marks``, which is not read as text."""
    for prompt in prompts:
        for mark in marks:
            if mark and mark.lower() in prompt.lower():
                raise UserError(
                    f"the prompt {prompt!r} holds {mark}, which is a mark of the tokenizer and no text; "
                    "leave it out"
                )


def load_clip(name: str, source: str, place: Place, tokenizer: str | None = None) -> Clip:
    """Load a CLIP, frozen, in eval mode.

    Args:
        name: the reward's name, for messages.
        source: a folder or a hub id.
        place: device and dtype.
        tokenizer: folder or hub id of the tokenizer if ``source`` is not a folder that holds one; None:
            ``source``.

    Raises:
        UserError: no such checkpoint, the hub cannot be reached, or it is not a complete CLIP.
    """
    from transformers import CLIPModel

    # float32 first, so that logit_scale is not rounded
    model = placed(load_pretrained(name, source, replace(place, dtype="float32"), CLIPModel), place)
    has_one = Path(source, "tokenizer_config.json").is_file() or Path(source, "tokenizer.json").is_file()
    text_tokenizer = load_tokenizer(name, source if has_one or tokenizer is None else tokenizer)
    return Clip(model, text_tokenizer, *pixel_statistics(name, source))


def load_pretrained(name: str, source: str, place: Place, kind: Any) -> Any:
    """Load a model of transformers, frozen, in eval mode.

    Args:
        name: the reward's name, for messages.
        source: a folder or a hub id.
        place: device and dtype.
        kind: the model's class.

    Raises:
        UserError: no such checkpoint, the hub cannot be reached, or weights are missing.
    """
    _check(name, source, kind.__name__)
    # the libraries raise many types for an absent, unreachable or broken checkpoint
    try:
        loaded: Any = kind.from_pretrained(
            source, dtype=getattr(torch, place.dtype), output_loading_info=True
        )
    except Exception as error:
        raise _unloadable(name, source, error, kind.__name__) from error
    model, loading = loaded
    check_complete(name, source, kind.__name__, loading)
    return model.to(place.device).eval().requires_grad_(False)


def placed(model: Any, place: Place) -> Any:
    """Move a CLIPModel (or a module with its ``logit_scale``) to ``place``, frozen, in eval mode.

    ``logit_scale`` stays float32: bfloat16 would change exp(4.6052) = 100 to 98.9.
    """
    logit_scale = model.logit_scale.detach().float()
    model.to(place.device, getattr(torch, place.dtype))
    model.logit_scale.data = logit_scale.to(place.device)
    return model.eval().requires_grad_(False)


def read_config(name: str, architecture: str) -> Any:
    """Load the CLIPConfig of a folder or hub id.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    from transformers import CLIPConfig

    return _pretrained(CLIPConfig, name, architecture)


def empty_clip(config: Any) -> Any:
    """Return a CLIPModel of a CLIPConfig on the meta device."""
    from transformers import CLIPModel

    with torch.device("meta"):
        return CLIPModel(config)


def filled(name: str, model: Any, state: Mapping[str, Tensor], source: str) -> Any:
    """Load weights into a CLIPModel (or a module with its towers) on the meta device, keeping their dtypes.

    Raises:
        UserError: weights of another model.
    """
    fill(name, model, state, source)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        # a non-persistent buffer, which no checkpoint holds
        positions = embeddings.position_ids.shape[-1]
        embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    return model


def load_tokenizer(name: str, source: str) -> Any:
    """Load the tokenizer of a folder or hub id.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    return _pretrained(AutoTokenizer, name, source)


def _pretrained(kind: Any, name: str, source: str) -> Any:
    try:
        return kind.from_pretrained(source)
    except Exception as error:  # hub, file and format errors, of many types
        raise _unloadable(name, source, error) from error


def pixel_statistics(name: str, source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std by channel of the checkpoint's preprocessor_config.json, OpenAI's if it has none.

    Raises:
        UserError: an entry is not three finite numbers.
    """
    from transformers.utils import cached_file

    file = cached_file(
        source,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    config = read_json_object(file) if file else {}
    mean, std = config.get("image_mean", OPENAI_MEAN), config.get("image_std", OPENAI_STD)
    if not all(_is_triple(value) for value in (mean, std)):
        raise UserError(
            f"reward {name!r}: preprocessor_config.json of {source!r} has not three means and stds"
        )
    return tuple(mean), tuple(std)


def _is_triple(value: Any) -> bool:
    """Return whether a value is three finite numbers."""
    three = isinstance(value, list | tuple) and len(value) == 3
    return three and all(isinstance(part, int | float) and math.isfinite(part) for part in value)


def _check(name: str, source: str, kind: str) -> None:
    path = Path(source)
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise UserError(
                f"reward {name!r}: the folder {source!r} has no config.json; it must hold a {kind}"
            )
    elif path.exists():
        raise UserError(f"reward {name!r}: {source!r} is a file; a folder or a hub id of a {kind} is needed")
    elif not is_hub_id(source):
        raise UserError(
            f"reward {name!r}: there is no folder {source!r}, and it is not a hub id (owner/name)"
        )


def _unloadable(name: str, source: str, error: Exception, kind: str = "CLIP") -> UserError:
    given = f"as {name}:FOLDER, or {name}:FILE@FOLDER where this one stands under something else"
    return unloadable(name, f"{source!r} as a {kind}", error, given)
