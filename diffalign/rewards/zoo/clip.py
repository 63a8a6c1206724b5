"""A CLIP with its pre-processing, the backbone of most rewards, on transformers' CLIPModel alone.

Images are cut and scaled by ``preprocess.Crop``, with OpenAI's mean and std or those of the checkpoint's
preprocessor_config.json.
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
from diffalign.rewards.checkpoints import check_whole, fill, is_hub_id, unloadable
from diffalign.rewards.images import Images
from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Crop
from diffalign.rewards.registry import Place
from diffalign.utils.text import read_json_object


def unit(features: Tensor) -> Tensor:
    """Features (B, D) as float32 of length one."""
    return F.normalize(features.float(), dim=-1)


VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Where the architecture and the tokenizer are of rewards that began as this model."""


@dataclass(frozen=True)
class Clip:
    """A frozen transformers CLIPModel, its tokenizer, and how images become what it takes.

    Attributes:
        model: a CLIPModel, or what has its parts.
        tokenizer: transformers', that goes with it.
        mean: of pixels, by channel.
        std: likewise.
        square: what makes squares of images, given size, mean and std; see ``preprocess``.
    """

    model: Any
    tokenizer: Any
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    square: Callable[..., Callable[..., Tensor]] = Crop

    @property
    def size(self) -> int:
        """Pixels of the square that the vision tower takes."""
        return self.model.config.vision_config.image_size

    @property
    def width(self) -> int:
        """D, the length of the shared embeddings."""
        return self.model.config.projection_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, but for the scale of the cosine."""
        return self.model.visual_projection.weight.dtype

    def images(self, images: Images) -> Tensor:
        """Return unit image embeddings (B, D), float32; gradients flow to pixels given as a tensor."""
        return unit(self.model.get_image_features(pixel_values=self.inputs(images)).pooler_output)

    def inputs(self, images: Images) -> Tensor:
        """Return what the vision tower takes, (B, 3, size, size) in its dtype; differentiable for a
        tensor.
        """
        square = self.square(self.size, self.mean, self.std)
        return square(images, self.model.device).to(self.dtype)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit text embeddings (B, D), float32; prompts are cut at the model's number of tokens."""
        return self.sentences(self.tokens(prompts))

    def sentences(self, ids: Tensor) -> Tensor:
        """Return unit text embeddings (B, D), float32, of token ids (B, L)."""
        with torch.no_grad():
            output = self.model.get_text_features(input_ids=ids.to(self.model.device))
        return unit(output.pooler_output)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), int64, padded and cut to the model's number of tokens.

        Raises:
            UserError: a prompt holds a mark of the tokenizer, such as <|endoftext|>, where reading would end.
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
    """UserError if a prompt holds one of a tokenizer's own marks: it would be read as one, not as text."""
    for prompt in prompts:
        held = [mark for mark in marks if mark and mark.lower() in prompt.lower()]
        if held:
            raise UserError(
                f"the prompt {prompt!r} holds {held[0]}, which is a mark of the tokenizer and no text; leave "
                "it out"
            )


def load_clip(name: str, source: str, place: Place, tokenizer: str | None = None) -> Clip:
    """Return the CLIP in a folder or on the hub, frozen, in eval mode. ``name`` is the reward that asks.

    ``tokenizer`` is where the tokenizer is if ``source`` is not a folder that has one; None: at ``source``.

    Raises:
        UserError: nothing there, the hub cannot be reached, or it is not a whole CLIP.
    """
    from transformers import CLIPModel

    # read in float32, for the scale's sake
    model = placed(load_whole(name, source, replace(place, dtype="float32"), CLIPModel), place)
    own = Path(source, "tokenizer_config.json").is_file() or Path(source, "tokenizer.json").is_file()
    words = load_tokenizer(name, source if own or tokenizer is None else tokenizer)
    return Clip(model, words, *colours(name, source))


def load_whole(name: str, source: str, place: Place, kind: Any) -> Any:
    """Return a model of transformers in a folder or on the hub, frozen, in eval mode, where and as ``place``
    says.

    Args:
        name: of the reward that asks.
        source: a folder or a hub id.
        place: where it runs.
        kind: its class.

    Raises:
        UserError: nothing there, the hub cannot be reached, or weights are missing.
    """
    _check(name, source, kind.__name__)
    # Whatever the libraries raise for an absent, unreachable or broken checkpoint is for the user to mend.
    try:
        loaded: Any = kind.from_pretrained(
            source, dtype=getattr(torch, place.dtype), output_loading_info=True
        )
    except Exception as error:
        raise _unloadable(name, source, error, kind.__name__) from error
    model, loading = loaded
    check_whole(name, source, kind.__name__, loading)
    return model.to(place.device).eval().requires_grad_(False)


def placed(model: Any, place: Place) -> Any:
    """Return a CLIPModel, or what has its ``logit_scale``, frozen, in eval mode, where and as ``place`` says.

    That one number stays float32: bfloat16 moves exp(4.6052) = 100 to 98.9.
    """
    logit_scale = model.logit_scale.detach().float()
    model.to(place.device, getattr(torch, place.dtype))
    model.logit_scale.data = logit_scale.to(place.device)
    return model.eval().requires_grad_(False)


def read_config(name: str, architecture: str) -> Any:
    """Return the CLIPConfig in a folder or on the hub.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    from transformers import CLIPConfig

    return _pretrained(CLIPConfig, name, architecture)


def empty_clip(config: Any) -> Any:
    """Return a CLIPModel of a CLIPConfig, without memory for its weights."""
    from transformers import CLIPModel

    with torch.device("meta"):
        return CLIPModel(config)


def filled(name: str, model: Any, state: Mapping[str, Tensor], source: str) -> Any:
    """Return an empty CLIPModel, or what has its towers, with its weights; dtypes are theirs.

    Raises:
        UserError: weights of another model.
    """
    fill(name, model, state, source)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        # no part of a checkpoint, so nothing has filled it
        positions = embeddings.position_ids.shape[-1]
        embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    return model


def load_tokenizer(name: str, source: str) -> Any:
    """Return the tokenizer in a folder or on the hub.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    return _pretrained(AutoTokenizer, name, source)


def _pretrained(kind: Any, name: str, source: str) -> Any:
    try:
        return kind.from_pretrained(source)
    except Exception as error:  # whatever it is, the user is to mend it
        raise _unloadable(name, source, error) from error


def colours(name: str, source: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the checkpoint's preprocessor_config.json, OpenAI's if it has none."""
    from transformers.utils import cached_file

    file = cached_file(
        source,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    config = read_json_object(file) if file else {}
    mean, std = config.get("image_mean", OPENAI_MEAN), config.get("image_std", OPENAI_STD)
    if not all(_is_colour(value) for value in (mean, std)):
        raise UserError(
            f"reward {name!r}: preprocessor_config.json of {source!r} has not three means and stds"
        )
    return tuple(mean), tuple(std)


def _is_colour(value: Any) -> bool:
    """Whether a value is three finite numbers."""
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
