"""The step-aware preference model of SPO: a reward that also scores clean estimates made at noisy times.

Liang et al. 2024, arXiv 2406.04314, section 3.2. Score = exp(logit_scale) cos(image, text), as for PickScore,
from which the published models were fine-tuned; ``timed_clip`` is the network. A finished image has time 0.

A source is ``sd15`` or ``sdxl`` (published), ``tiny`` (for the built-in SDXL), a folder written by
``diffalign train-reward``, or a downloaded ``.bin``: ``FILE@CLIP``, where CLIP is the folder or hub id of its
architecture and tokenizer (default: LAION's ViT-H/14).

What differs from the released code: images are resized with antialiasing and clamped, as for the other CLIP
rewards; the released code does not antialias (option ``antialias=no``).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fetched, read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.preprocess import Crop
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.sources import places_and_options, yes_or_no
from diffalign.rewards.zoo.clip import (
    VIT_H,
    Clip,
    empty_clip,
    filled,
    load_clip,
    load_tokenizer,
    pixel_statistics,
    placed,
    read_config,
)
from diffalign.rewards.zoo.timed_clip import TimedClip

WEIGHTS = "step_aware.safetensors"
"""File name of our weights; CLIPModel does not load this name, since it would drop the time embedding."""

TIMESTEPS = 1000
_NAME = "step_aware"
_FILES = {
    "sd15": "sd-v1-5_step-aware_preference_model.bin",
    "sdxl": "sdxl_step-aware_preference_model.bin",
}


@runtime_checkable
class TimedReward(Protocol):
    """A Reward that also scores clean estimates made at noisy times."""

    def __call__(self, images: Any, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32, of finished images: those at t = 0."""
        ...

    def at(self, images: Any, prompts: Sequence[str], t: Tensor) -> Tensor:
        """Return scores (B,), float32, of clean estimates made at times ``t`` (B,) in [0, 1]."""
        ...


def timesteps(t: Float[Tensor, " B"]) -> Tensor:
    """Return the model's timesteps of times in [0, 1]: round(1000 t), (B,) float32.

    Raises:
        ValueError: a time outside [0, 1].
    """
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t={t.tolist()}; allowed: times in [0, 1]")
    return (t.double() * TIMESTEPS).round().float()


@dataclass(frozen=True)
class StepAware:
    """A ``TimedReward``; ``clip`` holds a ``TimedClip``, its tokenizer and its pre-processing."""

    clip: Clip
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32, of finished images: those at t = 0."""
        return self.at(images, prompts, torch.zeros(len(prompts)))

    def at(self, images: Images, prompts: Sequence[str], t: Float[Tensor, " B"]) -> Tensor:
        """Return scores (B,), float32, of clean estimates made at ``t`` (B,) in [0, 1].

        PIL images take the exact path, pixels (B, 3, H, W) in [0, 1] the differentiable one.

        Raises:
            ValueError: counts or shapes do not match, or a time outside [0, 1].
        """
        if t.shape != (len(prompts),):
            raise ValueError(f"times of shape {tuple(t.shape)} for {len(prompts)} images; one each is needed")
        pieces = iter(timesteps(t).split(self.batch_size))
        return in_batches(
            lambda batch, texts: self._score(batch, texts, next(pieces)), images, prompts, self.batch_size
        )

    def _score(self, images: Images, prompts: list[str], timestep: Tensor) -> Tensor:
        model = self.clip.model
        distinct = list(dict.fromkeys(prompts))  # a rollout scores many images of a few prompts
        owner = torch.tensor([distinct.index(prompt) for prompt in prompts])
        ids = self.clip.tokens(distinct)
        return model(self.clip.inputs(images), *(x.to(model.device) for x in (timestep, ids, owner)))


def from_clip(source: str, place: Place) -> Clip:
    """Return a TimedClip with the scores of the CLIP at ``source`` (a folder or hub id), and its tokenizer.

    Raises:
        UserError: no such checkpoint, or it is not a complete CLIP.
    """
    has_tokenizer = not Path(source).exists() and source != REGISTRY["pickscore"].checkpoint
    clip = load_clip(_NAME, source, place, tokenizer=None if has_tokenizer else VIT_H)
    return replace(clip, model=placed(TimedClip(clip.model), place))


def save(clip: Clip, folder: Path) -> None:
    """Write a TimedClip, its tokenizer and its pre-processing into the existing ``folder``."""
    from safetensors.torch import save_file

    model = clip.model
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    clip.tokenizer.save_pretrained(folder)
    settings = {"image_mean": list(clip.mean), "image_std": list(clip.std), "size": clip.size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def load(source: str | None, place: Place) -> StepAware:
    """Load a published step-aware model, a folder of ``diffalign train-reward``, or a file as published.

    Raises:
        UserError: no source, a missing file, or weights of another model.
    """
    if source is None:
        raise UserError(
            f"reward {_NAME!r} needs the diffusion model that it judges: {_NAME}:sd15 or {_NAME}:sdxl "
            f"(published), or {_NAME}:FOLDER of `diffalign train-reward`"
        )
    (path, architecture), options = places_and_options(_NAME, source, 2, ["antialias"])
    antialias = yes_or_no(_NAME, "antialias", options.get("antialias", "yes"))
    if path in _FILES:
        path = str(fetched(_NAME, REGISTRY[_NAME].checkpoint, _FILES[path]))
    elif path == "tiny":
        from diffalign import tiny

        path = str(tiny.step_aware_path())
    folder = next((f for f in (Path(path), Path(path, "reward")) if (f / WEIGHTS).is_file()), None)
    if folder is not None:
        state, architecture = _read(folder / WEIGHTS), str(folder)
    elif Path(path).is_file():
        state, architecture = _read(Path(path)), architecture or VIT_H
    else:
        what = f"has no {WEIGHTS}" if Path(path).is_dir() else "does not exist"
        raise UserError(
            f"reward {_NAME!r}: {path!r} {what}; allowed: sd15, sdxl, a folder that `diffalign train-reward` "
            "made, or a .bin file in the published format"
        )
    with torch.device("meta"):
        empty = TimedClip(empty_clip(read_config(_NAME, architecture)))
    model = placed(filled(_NAME, empty, state, path), place)
    tokenizer = load_tokenizer(_NAME, architecture)
    square = partial(Crop, antialias=antialias)
    statistics = pixel_statistics(_NAME, architecture)
    clip = Clip(model.eval().requires_grad_(False), tokenizer, *statistics, square)
    return StepAware(clip, place.batch_size)


def _read(path: Path) -> dict[str, Tensor]:
    """Read weights under TimedClip's names, without the prefix ``model.`` and old buffers."""
    named = {key.removeprefix("model."): tensor for key, tensor in read_state(_NAME, path).items()}
    return {key: tensor for key, tensor in named.items() if not key.endswith(".position_ids")}
