"""What rewards there are. Importing this module imports no torch: the command line lists rewards from it.

A reward is asked for by a spec: a name of ``REGISTRY``, or ``name:source`` where the source is a local file
or folder, or a hub id, that replaces the card's own checkpoint: ``pickscore:/models/PickScore_v1``,
``aesthetic_v2:/models/head.pth``. The aesthetic heads take a backbone as well:
``aesthetic_v2:/models/head.pth@/models/clip-vit-large-patch14``. A spec that starts with ``http://`` or
``https://`` is a reward behind an address, as ``diffalign serve-rewards`` serves them.

A new reward is a module with a factory ``(source: str | None, place: Place) -> Reward`` and a card here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from diffalign.errors import UserError, unknown

if TYPE_CHECKING:
    from diffalign.types import Reward


@dataclass(frozen=True)
class RewardCard:
    """What a reader of ``diffalign rewards`` needs to know, and where the code is.

    Attributes:
        name: how a spec names it.
        title: one line.
        range: usual values.
        licence: of the weights.
        size: of the download.
        checkpoint: hub id or file that is loaded when a spec has no source; empty: a source must be given.
        target: ``module:factory``.
        notes: what it measures, what to beware of, where it comes from.
        differentiable: gradients flow to pixels given as a tensor.
        cached: scores are worth keeping on disk; False where computing is as cheap as looking up.
        video: judges videos (``diffalign.videos.Video``) and no images.
    """

    name: str
    title: str
    range: str
    licence: str
    size: str
    checkpoint: str
    target: str
    notes: str
    differentiable: bool = False
    cached: bool = True
    video: bool = False


@dataclass(frozen=True)
class Place:
    """Where a reward runs: a torch device, a dtype name, and how many images it takes at once."""

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16


_CARDS = (
    RewardCard(
        name="judge",
        title="Drawn scenes: share of the caption's statements that hold",
        range="0 to 1",
        licence="Apache-2.0",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.tiny:judge",
        notes="Reads pixels by rules, no network. Only for captions of diffalign.tiny.",
        cached=False,
    ),
    RewardCard(
        name="taste",
        title="Drawn scenes: how vivid the things are, which captions never say",
        range="0 to 1",
        licence="Apache-2.0",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.tiny:taste",
        notes="Reads pixels by rules and ignores the prompt: the second judge that shows over-optimisation.",
        cached=False,
    ),
    RewardCard(
        name="video_content",
        title="Moving shapes: number, colours and shapes as the caption says, in every frame",
        range="0 to 1",
        licence="Apache-2.0",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.tiny:video_content",
        notes="Reads pixels by rules, no network. Half the mean of the frames, half the worst of them.",
        cached=False,
        video=True,
    ),
    RewardCard(
        name="video_motion",
        title="Moving shapes: direction and speed as the caption says, and even motion",
        range="0 to 1",
        licence="Apache-2.0",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.tiny:video_motion",
        notes="Follows things by rules, no network. A halt of a second costs, a wrong direction costs all.",
        cached=False,
        video=True,
    ),
    RewardCard(
        name="video_dynamics",
        title="Moving shapes: how fast things move, whatever the caption says of it",
        range="0 to 10 pixels a second, about 6",
        licence="Apache-2.0",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.tiny:video_dynamics",
        notes="The dynamic degree of moving shapes: what alignment to quality alone loses.",
        cached=False,
        video=True,
    ),
    RewardCard(
        name="tiny_clip",
        title="Tiny CLIP trained on drawn scenes, in PickScore's format",
        range="about -10 to 40",
        licence="Apache-2.0",
        size="under 1 MB, built in",
        checkpoint="built in",
        target="diffalign.rewards.pickscore:tiny_clip",
        notes="exp(logit_scale) * cos(text, image), as PickScore: a learned reward that runs anywhere.",
        differentiable=True,
    ),
    RewardCard(
        name="pickscore",
        title="PickScore v1: what users of Pick-a-Pic preferred",
        range="17 to 24 (SD1.5 about 20.5, SDXL about 22)",
        licence="MIT",
        size="3.9 GB",
        checkpoint="yuvalkirstain/PickScore_v1",
        target="diffalign.rewards.pickscore:load",
        notes="CLIP ViT-H/14, exp(logit_scale) * cos(text, image) (arXiv 2305.01569). Within a prompt.",
        differentiable=True,
    ),
    RewardCard(
        name="step_aware",
        title="SPO's step-aware preference model: judges clean estimates at noisy times as well",
        range="as PickScore",
        licence="MIT (PickScore); the published weights name none",
        size="about 5 GB",
        checkpoint="SPO-Diffusion-Models/Step-Aware_Preference_Models",
        target="diffalign.rewards.step_aware:load",
        notes="step_aware:sd15, step_aware:sdxl, step_aware:tiny (built in, of the tiny SDXL), or "
        "step_aware:FOLDER of `diffalign train-reward` (arXiv 2406.04314). Finished images are at time 0.",
        differentiable=True,
    ),
    RewardCard(
        name="aesthetic_v2",
        title="LAION aesthetic predictor v2 (improved-aesthetic-predictor)",
        range="1 to 10 (SD1.5 about 5.4, SDXL above 6)",
        licence="Apache-2.0 (head), MIT (CLIP L/14)",
        size="3.7 MB + 1.7 GB",
        checkpoint="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        target="diffalign.rewards.aesthetic:load_v2",
        notes="Affine in the unit CLIP L/14 embedding, so easily hacked. The prompt is not read.",
        differentiable=True,
    ),
    RewardCard(
        name="aesthetic_v1",
        title="LAION aesthetic predictor v1 (linear)",
        range="0 to 10",
        licence="MIT (head), MIT (CLIP)",
        size="4 KB + 1.7 GB",
        checkpoint="",
        target="diffalign.rewards.aesthetic:load_v1",
        notes="Give a head of LAION-AI/aesthetic-predictor: aesthetic_v1:/x/sa_0_4_vit_l_14_linear.pth.",
        differentiable=True,
    ),
    RewardCard(
        name="jpeg",
        title="JPEG compressibility: minus the kilobytes at quality 95",
        range="-500 to 0, by image size",
        licence="none needed",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.jpeg:compressibility",
        notes="DDPO's task (arXiv 2305.13301). Good for testing a pipeline; it says nothing of quality.",
        cached=False,
    ),
    RewardCard(
        name="jpeg_incompressibility",
        title="JPEG incompressibility: the kilobytes at quality 95",
        range="0 to 500, by image size",
        licence="none needed",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.jpeg:incompressibility",
        notes="The same with the other sign.",
        cached=False,
    ),
)

REGISTRY: dict[str, RewardCard] = {card.name: card for card in _CARDS}

_DTYPES = ("float32", "bfloat16", "float16")


def parse(spec: str) -> tuple[RewardCard, str | None]:
    """The card and the source of ``name``, ``name:source`` or an address; UserError for a name that there is
    not.
    """
    if spec.startswith(("http://", "https://")):
        return _remote(spec), spec
    name, colon, source = spec.partition(":")
    if name not in REGISTRY:
        raise unknown("reward", name, REGISTRY)
    if colon and not source:
        raise UserError(f"reward {spec!r}: nothing after the colon; give a file, a folder or a hub id")
    return REGISTRY[name], source or None


def _remote(url: str) -> RewardCard:
    """The card of a reward behind an address, named by the last part of its path."""
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
        title=f"What {url} says",
        range="unknown",
        licence="unknown",
        size="none here",
        checkpoint=url,
        target="diffalign.rewards.remote:load",
        notes="Asked over HTTP, and never cached: another model may answer tomorrow.",
        cached=False,
    )


def load(spec: str, device: str = "cpu", dtype: str = "float32", batch_size: int = 16) -> "Reward":
    """The reward that a spec names, ready to be called: ``reward(images, prompts) -> (B,) float32``.

    ``images`` are B PIL images, or pixels (B, 3, H, W) in [0, 1]; they are scored ``batch_size`` at a time.
    A reward of videos is a ``VideoReward`` and takes B ``Video``s; ``rewards.of_videos.takes_videos`` makes
    any reward take them.
    ``dtype`` is that of the reward's network: float32, bfloat16 or float16.

    Raises:
        UserError: no such reward, or its weights are missing, unreachable or of another kind.
    """
    card, source = parse(spec)
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    if batch_size < 1:
        raise UserError(f"reward {spec!r}: batch_size is {batch_size}; it must be at least 1")
    module, _, factory = card.target.partition(":")
    make: Callable[[str | None, Place], Reward] = getattr(import_module(module), factory)
    reward = make(source, Place(str(device), dtype, batch_size))
    if not card.video:
        return reward
    from diffalign.rewards.of_videos import VideoReward

    return VideoReward(card.name, reward)


def no_source(name: str, source: str | None) -> None:
    """UserError if a reward without weights of its own was given a source."""
    if source is not None:
        raise UserError(
            f"reward {name!r} has no weights, so {source!r} after the colon means nothing; write {name!r}"
        )
