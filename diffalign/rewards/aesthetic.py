"""LAION's aesthetic predictors: heads over unit CLIP image embeddings.

v2 (christophschuhmann/improved-aesthetic-predictor): Linear 768-1024-128-64-16-1 with dropout and **no**
activation, so the score is affine in the embedding and its gradient one fixed direction. v1
(LAION-AI/aesthetic-predictor): one Linear. Both were fitted on OpenAI's CLIP (quick GELU).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fetched, read_state
from diffalign.rewards.clip import Clip, load_clip
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.registry import REGISTRY, Place

_BACKBONES = {
    "vit_l_14": "openai/clip-vit-large-patch14",
    "vit_b_32": "openai/clip-vit-base-patch32",
    "vit_b_16": "openai/clip-vit-base-patch16",
}
_V2_LAYERS = (0, 2, 4, 6, 7)  # the dropouts are 1, 3 and 5


@dataclass(frozen=True)
class Aesthetic:
    """A head over the unit image embeddings of a CLIP; prompts are not read."""

    clip: Clip
    head: nn.Module
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32; PIL images take the exact path, pixels (B, 3, H, W) the differentiable one."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return score_embeddings(self.head, self.clip.images(images))


def score_embeddings(head: nn.Module, embeddings: Tensor) -> Tensor:
    """(B,) float32 scores of unit CLIP embeddings (B, D)."""
    return head(embeddings.float()).squeeze(-1)


def load_head(path: str | Path) -> nn.Sequential:
    """A head of either version, told apart by its keys; frozen, float32.

    Raises:
        UserError: no such file, or not a head.
    """
    state = read_state("aesthetic", path)
    if set(state) == {"weight", "bias"}:
        layers = [(state["weight"], state["bias"])]
    elif set(state) == {f"layers.{i}.{kind}" for i in _V2_LAYERS for kind in ("weight", "bias")}:
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in _V2_LAYERS]
    else:
        raise UserError(
            f"reward 'aesthetic': {str(path)!r} has the keys {', '.join(sorted(map(str, state))[:4])} ...; "
            "known are weight and bias (v1), or layers.{0,2,4,6,7} (v2, the linearMSE files)"
        )
    return _stack(layers)


def _stack(layers: list[tuple[Tensor, Tensor]]) -> nn.Sequential:
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight.float(), "bias": bias.float()})
        modules.append(linear)
    return nn.Sequential(*modules).eval().requires_grad_(False)


def load_v2(source: str | None, place: Place) -> Aesthetic:
    """Version 2: ``source`` is HEAD or HEAD@BACKBONE; without one the head comes from the hub."""
    head, _, backbone = (source or str(_hub_head())).partition("@")
    return _build("aesthetic_v2", head, backbone or _BACKBONES["vit_l_14"], place)


def load_v1(source: str | None, place: Place) -> Aesthetic:
    """Version 1: ``source`` is HEAD or HEAD@BACKBONE; the backbone is read off the head's file name."""
    if source is None:
        raise UserError(f"reward 'aesthetic_v1' needs its head. {REGISTRY['aesthetic_v1'].notes}")
    head, _, backbone = source.partition("@")
    named = [hub for key, hub in _BACKBONES.items() if key in Path(head).name]
    if not backbone and not named:
        raise UserError(
            f"reward 'aesthetic_v1': cannot tell the CLIP from the file name {Path(head).name!r} "
            f"(none of {', '.join(_BACKBONES)} in it); write aesthetic_v1:HEAD@BACKBONE"
        )
    return _build("aesthetic_v1", head, backbone or named[0], place)


def _build(name: str, head_path: str, backbone: str, place: Place) -> Aesthetic:
    head = load_head(head_path).to(place.device)
    clip = load_clip(name, backbone, place)
    wanted = head[0].in_features
    if clip.width != wanted:
        raise UserError(
            f"reward {name!r}: the head {head_path!r} takes embeddings of {wanted} numbers, but {backbone!r} "
            "makes "
            f"{clip.width}; they must belong together"
        )
    return Aesthetic(clip, head, place.batch_size)


def _hub_head() -> Path:
    repository, _, filename = REGISTRY["aesthetic_v2"].checkpoint.rpartition("/")
    return fetched("aesthetic_v2", repository, filename)
