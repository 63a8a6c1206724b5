"""The registry of rewards. Importing it does not import torch, so that the command line can list rewards.

A spec names a reward:

* a name of ``REGISTRY``: ``pickscore``;
* ``name:source``, where a local file or folder, or a hub id, replaces the checkpoint of the card:
  ``pickscore:/models/PickScore_v1``, ``aesthetic_v2:/models/head.pth``;
* with a backbone or options after ``@``, as the card says:
  ``aesthetic_v2:/models/head.pth@/models/clip-vit-large-patch14``, ``clipscore:scale=1``,
  ``mps:/models/mps.safetensors@threshold=0.3``;
* an ``http://`` or ``https://`` address: a reward served by ``diffalign serve-rewards``;
* ``ensemble:FILE.yaml``: a weighted sum of rewards (``rewards.ensemble``), named after its file;
* ``my_module:MyReward``: a reward from user code, by its Python import path (``rewards.imported``).

A new reward is a module with a factory ``(source: str | None, place: Place) -> Reward`` and a card in
``rewards.cards``.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from diffalign.errors import UserError, unknown
from diffalign.rewards.cards import CARDS
from diffalign.rewards.cards import RewardCard as RewardCard
from diffalign.rewards.imported import imported_card, is_import_path
from diffalign.rewards.place import Place as Place
from diffalign.utils.devices import DTYPES, device_name

if TYPE_CHECKING:
    from diffalign.types import Reward


REGISTRY: dict[str, RewardCard] = {card.name: card for card in CARDS}


def parse(spec: str) -> tuple[RewardCard, str | None]:
    """Return the card of a spec and its source (None if the spec has none).

    Raises:
        UserError: no text, an unknown name, or nothing after the colon.
    """
    if not isinstance(spec, str):
        raise UserError(f"reward {spec!r} is a {type(spec).__name__}; allowed: a text, such as 'pickscore'")
    if spec.startswith(("http://", "https://")):
        return _remote(spec), spec
    name, colon, source = spec.partition(":")
    if name not in REGISTRY:
        if colon and is_import_path(spec):
            return imported_card(spec), spec
        raise unknown("reward", name, REGISTRY)
    if colon and not source:
        raise UserError(f"reward {spec!r}: nothing after the colon; give a file, a folder or a hub id")
    card = REGISTRY[name]
    return (replace(card, name=Path(source).stem) if card.of_others and source else card), source or None


def _remote(url: str) -> RewardCard:
    """Return the card of a remote reward, named by the last part of the address's path."""
    try:
        parts = urlsplit(url)
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        known = False
    name = parts.path.rstrip("/").rpartition("/")[2] if known else ""
    if not name:
        raise UserError(f"reward {url!r}: no address of a reward; allowed: http://HOST:PORT/NAME, or https")
    return RewardCard(
        name=name,
        title=f"The reward served at {url}",
        licence="unknown",
        size="none here",
        checkpoint=url,
        target="diffalign.rewards.serving.remote:load",
        notes="Requested over HTTP and never cached, since the model behind the address may change.",
        cached=False,
    )


def load(spec: str, device: str = "cpu", dtype: str = "float32", batch_size: int = 16) -> "Reward":
    """Load the reward that a spec names; call it as ``reward(images, prompts) -> (B,) float32``.

    ``images`` are B PIL images, or pixels (B, 3, H, W) in [0, 1]. A video reward is a ``VideoReward`` and
    takes B ``Video``s; ``rewards.videos.takes_videos`` adapts an image reward to videos.

    Args:
        spec: see the module docstring.
        device: torch device of the network; ``auto`` is the accelerator if there is one.
        dtype: dtype of the network: float32, bfloat16 or float16.
        batch_size: images a forward pass.

    Raises:
        UserError: no such reward, an unknown dtype, a device that is not there, or weights that are missing,
            unreachable or of another model.
    """
    card, source = parse(spec)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if batch_size < 1:
        raise UserError(f"reward {spec!r}: batch_size is {batch_size}; it must be at least 1")
    module, _, factory = card.target.partition(":")
    make: Callable[[str | None, Place], Reward] = getattr(import_module(module), factory)
    reward = make(source, Place(_usable(str(device)), dtype, batch_size))
    if not card.video:
        return reward
    from diffalign.rewards.videos import VideoReward

    return VideoReward(card.name, reward)


def _usable(device: str) -> str:
    """Return the name of a device that holds tensors; UserError for another."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # the latter by a build without it
        return device_name(device)  # "auto", or the error that says what is allowed
    return device


def usual_range(spec: str) -> tuple[float, float] | None:
    """Return the usual lowest and highest score of a spec; None if its card states none.

    The option ``scale`` of cosine rewards is taken into account: ``pickscore:scale=1`` gives (0.17, 0.24).

    Raises:
        UserError: as ``parse``, or ``scale`` is no number.
    """
    card, source = parse(spec)
    if card.low is None or card.high is None:
        return None
    factor = next((part[6:] for part in (source or "").split("@") if part.startswith("scale=")), None)
    if factor is None or card.factor is None:
        return card.low, card.high
    from diffalign.rewards.sources import number

    ends = [end * number(card.name, "scale", factor) / card.factor for end in (card.low, card.high)]
    return min(ends), max(ends)


def takes_pixels(spec: str) -> bool:
    """Return whether a spec sets its card's ``pixels_option``: a rollout passes pixels, not 8-bit images."""
    card, source = parse(spec)
    return bool(card.pixels_option) and card.pixels_option in (source or "").split("@")


def with_prompts(spec: str, prompts: str) -> str:
    """Return a spec that also reads the copy of its prompt set that ``prompts`` names (``geneval2:FILE``).

    Without a copy, for another set, or with an option ``questions`` the spec stays as it is.

    Raises:
        UserError: as ``parse``, or the copy's path holds an "@", which parts the options of a spec.
    """
    card, source = parse(spec)
    name, _, file = prompts.partition(":")
    parts = (source or "").split("@") if source else []
    if not card.prompt_set or name != card.prompt_set or not file:
        return spec
    if any(part.startswith("questions=") for part in parts):
        return spec
    if "@" in file:
        raise UserError(
            f"reward {spec!r} cannot read its questions from {file!r}: allowed: a path without '@'"
        )
    return f"{card.name}:{'@'.join([*parts, f'questions={Path(file).expanduser()}'])}"


def no_source(name: str, source: str | None) -> None:
    """Raise a UserError if the spec of a reward without weights has a source."""
    if source is not None:
        raise UserError(
            f"reward {name!r} has no weights, so {source!r} after the colon means nothing; write {name!r}"
        )
