"""Aesthetic predictors: heads on unit image embeddings of OpenAI's CLIP (quick GELU).

v2 (christophschuhmann/improved-aesthetic-predictor): Linear 768-1024-128-64-16-1 with dropout and **no**
activation, so the score is affine in the embedding and its gradient has one fixed direction; the reluMSE file
has a ReLU between consecutive layers. v1 (LAION-AI/aesthetic-predictor): one Linear. Simulacra
(crowsonkb/simulacra-aesthetic-models): one Linear of the embedding times the square root of its width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fetched, read_state
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.clip import Clip, load_clip

_BACKBONES = {
    "vit_l_14": "openai/clip-vit-large-patch14",
    "vit_b_32": "openai/clip-vit-base-patch32",
    "vit_b_16": "openai/clip-vit-base-patch16",
}
_SIMULACRA = ("linear.",)
_RELU = tuple(f"layers.{i}." for i in (0, 3, 6, 9, 11))
_LAYOUTS = {
    ("",): ("aesthetic_v1", "one Linear"),
    _SIMULACRA: ("simulacra", "one Linear under linear."),
    tuple(f"layers.{i}." for i in (0, 2, 4, 6, 7)): ("aesthetic_v2", "linearMSE (dropouts are 1, 3 and 5)"),
    _RELU: ("aesthetic_v2", "reluMSE"),
    tuple(f"scoring_head.{i}." for i in (0, 2, 4, 6, 8)): (
        "aesthetic_v2_5",
        "five layers under scoring_head.",
    ),
}
"""Layer names of each published file, in order -> the reward it belongs to, and the file's name."""


@dataclass(frozen=True)
class Aesthetic:
    """A head on the unit image embeddings of a CLIP; prompts are ignored."""

    clip: Clip
    head: nn.Module
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; PIL images take the exact path, tensors the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return score_embeddings(self.head, self.clip.image_embeddings(images))


def score_embeddings(head: nn.Module, embeddings: Tensor) -> Tensor:
    """Return scores (B,), float32, of unit CLIP embeddings (B, D)."""
    return head(embeddings.float()).squeeze(-1)


def load_head(path: str | Path, name: str) -> nn.Sequential:
    """Load the head of the reward ``name``, frozen, in float32; the keys of the file determine its layout.

    Raises:
        UserError: no such file, no known layout, or the head of another reward.
    """
    state = read_state(name, path)
    for layers in _LAYOUTS:
        if set(state) == {f"{layer}{kind}" for layer in layers for kind in ("weight", "bias")}:
            break
    else:
        raise UserError(
            f"reward {name!r}: {str(path)!r} has the keys {', '.join(sorted(state)[:4])} ...; known are the "
            f"heads {', '.join(f'{title} ({owner})' for owner, title in _LAYOUTS.values())}"
        )
    owner, title = _LAYOUTS[layers]
    if owner != name:
        raise UserError(f"reward {name!r}: {str(path)!r} is a head of {owner} ({title}); write {owner}:HEAD")
    modules: list[nn.Module] = []
    for layer in layers:
        weight, bias = state[f"{layer}weight"].float(), state[f"{layer}bias"].float()
        if layers == _SIMULACRA:
            weight = weight * weight.shape[1] ** 0.5  # trained on embeddings scaled to length sqrt(D)
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [nn.ReLU(), linear] if modules and layers == _RELU else [linear]
    return nn.Sequential(*modules).eval().requires_grad_(False)


def load_v2(source: str | None, place: Place) -> Aesthetic:
    """Load version 2; ``source`` is HEAD or HEAD@BACKBONE, None takes the head from the hub."""
    head, _, backbone = (source or str(_hub_head())).partition("@")
    return _build("aesthetic_v2", head, backbone or _BACKBONES["vit_l_14"], place)


def load_v1(source: str | None, place: Place) -> Aesthetic:
    """Load version 1; ``source`` is HEAD or HEAD@BACKBONE, else the head's file name tells the backbone."""
    return _by_file_name("aesthetic_v1", source, place)


def load_simulacra(source: str | None, place: Place) -> Aesthetic:
    """Load Simulacra; ``source`` is HEAD or HEAD@BACKBONE, else the head's file name tells the backbone."""
    return _by_file_name("simulacra", source, place)


def _by_file_name(name: str, source: str | None, place: Place) -> Aesthetic:
    if source is None:
        raise UserError(f"reward {name!r} needs its head. {REGISTRY[name].notes}")
    head, _, backbone = source.partition("@")
    named = [hub for key, hub in _BACKBONES.items() if key in Path(head).name]
    if not backbone and not named:
        raise UserError(
            f"reward {name!r}: cannot tell the CLIP from the file name {Path(head).name!r} "
            f"(none of {', '.join(_BACKBONES)} in it); write {name}:HEAD@BACKBONE"
        )
    return _build(name, head, backbone or named[0], place)


def _build(name: str, path: str, backbone: str, place: Place) -> Aesthetic:
    head = load_head(path, name).to(place.device)
    clip = load_clip(name, backbone, place)
    check_width(name, path, head, backbone, clip.width)
    return Aesthetic(clip, head, place.batch_size)


def check_width(name: str, path: str, head: nn.Sequential, backbone: str, width: int) -> None:
    """Raise a UserError if a head's input width is not ``width``, that of its backbone's embeddings."""
    expected = next(head.parameters()).shape[1]
    if width != expected:
        raise UserError(
            f"reward {name!r}: the head {path!r} takes embeddings of {expected} numbers, but {backbone!r} "
            f"makes {width}; they must belong together"
        )


def _hub_head() -> Path:
    repository, _, filename = REGISTRY["aesthetic_v2"].checkpoint.rpartition("/")
    return fetched("aesthetic_v2", repository, filename)
