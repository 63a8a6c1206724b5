"""HPS v2 and v2.1 (Wu et al., "Human Preference Score v2", arXiv 2306.09341; github.com/tgxs002/HPSv2).

A CLIP ViT-H/14 fine-tuned on human choices. The score is the cosine without the logit scale; there is no
prompt template. The published files have open_clip's layout. Of that package only the tokenizer is needed,
which repairs encodings and HTML before it splits words. Images are letterboxed, not cropped.

A source is a file in that layout, a folder that holds it under its published name, or a hub id; ``FILE@CLIP``
reads the sizes from the config.json of a folder or hub id instead of from the weights. ``antialias=no``
resizes as the torchvision of the published numbers did (upstream's requirements pin that version).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.preprocess import Letterbox
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import file_of, places_and_options, yes_or_no
from diffalign.rewards.zoo.clip import Clip, placed, read_config
from diffalign.rewards.zoo.open_clip_layout import load_open_clip


@dataclass(frozen=True)
class Hps:
    """The cosine of a CLIP whose tokenizer is open_clip's."""

    clip: Clip
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; differentiable for tensors, which score exactly as their image."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        length = self.clip.model.config.text_config.max_position_embeddings
        ids = token_ids(self.clip.tokenizer, prompts, length)
        return (self.clip.embeddings_of(ids) * self.clip.image_embeddings(images)).sum(-1)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Return ids (B, length), int64, of open_clip's tokenizer; truncated prompts keep the end token.

    Shorter prompts are padded with 0.

    Raises:
        UserError: a prompt holds the start or end token, at which the model would stop.
    """
    ids = tokenizer(list(prompts), context_length=length)
    for mark in tokenizer.all_special_ids:
        for prompt in (prompts[i] for i in (ids == mark).sum(1).ne(1).nonzero().flatten().tolist()):
            raise UserError(
                f"the prompt {prompt!r} holds {tokenizer.decode([mark])}, which is a mark of the tokenizer "
                "and no text; leave it out"
            )
    return ids


def load_v2(source: str | None, place: Place) -> Hps:
    """Load HPS v2 from the hub, or from a file of its layout."""
    return _load("hpsv2", source, place)


def load_v2_1(source: str | None, place: Place) -> Hps:
    """Load HPS v2.1 from the hub, or from a file of its layout."""
    return _load("hpsv2_1", source, place)


def _load(name: str, source: str | None, place: Place) -> Hps:
    (weights, architecture), options = places_and_options(name, source, 2, ["antialias"])
    antialias = yes_or_no(name, "antialias", options.get("antialias", "yes"))
    repository, _, filename = REGISTRY[name].checkpoint.rpartition("/")
    path = file_of(name, weights or repository, filename)
    config = read_config(name, architecture) if architecture else None
    model = load_open_clip(name, read_state(name, path), str(path), config)
    tokenizer = _tokenizer(name)
    if tokenizer.vocab_size != model.config.text_config.vocab_size:
        raise UserError(
            f"reward {name!r}: {str(path)!r} is another model's checkpoint: it knows "
            f"{model.config.text_config.vocab_size} tokens, and HPS those {tokenizer.vocab_size} of open_clip"
        )
    square = partial(Letterbox, antialias=antialias)
    return Hps(Clip(placed(model, place), tokenizer, square=square), place.batch_size)


def _tokenizer(name: str) -> Any:
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except (ImportError, RuntimeError) as error:  # torchvision raises the second where it does not fit torch
        raise UserError(
            f"reward {name!r} reads prompts with the tokenizer of open_clip, which cannot be imported "
            f"({error}); pip install open_clip_torch"
        ) from error
    return SimpleTokenizer()
