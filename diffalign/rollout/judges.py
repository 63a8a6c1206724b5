"""Judges score the samples of a rollout; several scores are combined into one.

A judge takes pixels and returns a ``Future``, so that scoring may overlap the sampling of the next part. All
judges score the 8-bit image that would be saved: training is the same whether ``rollout.scoring`` is inline
or process, and ``diffalign score`` reproduces the scores. Of videos rewards get the 8-bit frames before they
are compressed; a reward of images gives the mean over some of them (``rewards.videos``). A NoisyReward may
score latents instead (``rollout.estimate: none``).

A failed request is repeated (once in this process, three times with doubling waits over HTTP); then a
UserError names the reward and the prompts, and the run stops.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.config.schema import RolloutConfig
from diffalign.errors import UserError
from diffalign.media.videos import Video
from diffalign.rewards.combine import combine, standardised, standardised_in_groups, towards_higher
from diffalign.rewards.images import to_pil
from diffalign.rewards.prompt_checks import check_prompts
from diffalign.rewards.registry import load, takes_pixels
from diffalign.rewards.serving.remote import RemoteReward, shortened
from diffalign.rewards.specs import Weighted, all_weighted
from diffalign.rewards.videos import VideoReward, needs_videos, takes_videos, to_videos
from diffalign.rewards.zoo.latent_reward import NoisyReward
from diffalign.rewards.zoo.step_aware import TimedReward
from diffalign.rollout.worker import RewardProcess
from diffalign.types import Reward

_ASKING = 4  # threads that wait for answers
_INLINE_TRIES = 2
Shown = list[Image.Image] | list[Video]


@runtime_checkable
class Judge(Protocol):
    """Scores images or videos by R rewards."""

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names of the R rewards."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the rewards, not applied to the scores yet: see ``combined``."""
        ...

    def submit(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Future[Tensor]:
        """Ask for scores.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device; videos (B, 3, F, H, W); latents (B, *d) where
                nothing is estimated.
            prompts: B.
            t: (B,) the times in [0, 1] at which these clean estimates were made, 0 for finished images. For
                latents, the times that they were drawn at.

        Returns:
            A future of (B, R) float32 on the CPU, higher is better; it raises a UserError if scoring failed.
        """
        ...

    def close(self) -> None:
        """Stop threads and processes; pending requests are dropped."""
        ...


def judge_of(
    config: RolloutConfig,
    device: torch.device | str,
    load: Callable[[str, str], Reward] = load,
    fps: float | None = None,
    prompts: Sequence[str] = (),
) -> Judge:
    """Return the judge that a run names, with its rewards loaded.

    Args:
        config: the run's rollout section.
        device: of its rewards.
        load: (spec, device) -> reward; a caching one shares rewards with validation.
        fps: frames a second of the videos that are judged; None: images are.
        prompts: those of the run, which rewards of this process check before anything is sampled.

    Raises:
        UserError: no reward, an unknown one, one that cannot be loaded or does not judge what is sampled, or
            a prompt that one cannot score.
    """
    if config.by == "people":
        return People()
    if not config.rewards:
        return InlineJudge((), ())
    rewards = all_weighted(config.rewards)
    if config.scoring == "process":
        for reward in rewards:
            if takes_pixels(reward.spec):
                raise UserError(
                    f"rollout.rewards has {reward.spec!r}, which takes decoded pixels, and rollout.scoring "
                    "is process, which sends 8-bit images; allowed: rollout.scoring inline"
                )
        return ProcessJudge(rewards, str(device))
    loaded = [load(reward.spec, str(device)) for reward in rewards]
    for scorer in loaded:
        check_prompts(scorer, prompts)
    if config.estimate != "none" and fps is not None:
        return InlineJudge(rewards, list(map(_watching, rewards, loaded)), fps=fps)
    if config.estimate != "none":
        for reward, scorer in zip(rewards, loaded, strict=True):
            if isinstance(scorer, VideoReward):
                raise needs_videos(reward.spec)
        exact = [reward.name for reward in rewards if takes_pixels(reward.spec)]
        return InlineJudge(rewards, loaded, pixels=exact)
    images = [
        name.spec for name, reward in zip(rewards, loaded, strict=True) if not isinstance(reward, NoisyReward)
    ]
    if images:
        raise UserError(
            f"rollout.estimate='none' shows noisy latents, and {images[0]!r} judges images; "
            "allowed: latent_reward, or rollout.estimate candidate or parent"
        )
    return InlineJudge(rewards, loaded, latents=True)


def _watching(name: Weighted, reward: Reward) -> Reward:
    """Return a reward as one of videos; UserError for one that needs times, which frames do not have."""
    if isinstance(reward, TimedReward) and not isinstance(reward, RemoteReward):
        raise UserError(
            f"rollout.rewards has {name.spec!r}, which judges clean estimates of images by their times; "
            "allowed for videos: rewards of videos, or of images without a time"
        )
    return takes_videos(reward)


@dataclass(frozen=True)
class People:
    """Human judges: they label between rounds (``rollout.labels``), never in ``submit``."""

    rewards: tuple[str, ...] = ("people",)
    weights: tuple[float, ...] = (1.0,)

    def submit(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Future[Tensor]:
        """Raise a ValueError: people cannot be asked during sampling."""
        raise ValueError("rollout.by is people: images are labelled between rounds, not submitted")

    def close(self) -> None:
        """Nothing was started."""


class InlineJudge:
    """Scores in this process: ``submit`` blocks until the scores are there."""

    def __init__(
        self,
        names: Sequence[Weighted],
        rewards: Sequence[Reward],
        latents: bool = False,
        pixels: Collection[str] = (),
        fps: float | None = None,
    ):
        """Hold names, weights and a reward for each.

        Args:
            names: names and weights.
            rewards: NoisyRewards that score latents, or rewards of images or of videos.
            latents: whether latents are scored.
            pixels: names of the rewards that take pixels instead of 8-bit images.
            fps: frames a second of videos; None: images are scored.
        """
        self.rewards = tuple(name.name for name in names)
        self.weights = tuple(name.weight for name in names)
        self._scorers = list(zip(self.rewards, rewards, strict=True))
        self._latents, self._fps = latents, fps
        self._pixels = frozenset(pixels)

    def submit(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Future[Tensor]:
        """Return a future that is done; see ``Judge``."""
        future: Future[Tensor] = Future()
        try:
            shown = images if self._latents else _shown(images, prompts, t, self._fps)
            exact = images.float().clamp(0, 1) if self._pixels else shown
            columns = [
                _scored(name, reward, exact if name in self._pixels else shown, prompts, t)
                for name, reward in self._scorers
            ]
            future.set_result(torch.stack(columns, 1))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Nothing was started."""


class ProcessJudge:
    """Scores in a separate process, which ends with this one and also calls remote rewards."""

    def __init__(
        self, names: Sequence[Weighted], device: str = "cpu", dtype: str = "float32", pause: float = 0.5
    ):
        """Start the process and wait until its rewards are loaded.

        Args:
            names: rewards and weights.
            device: where the process runs them.
            dtype: of their networks.
            pause: seconds before the second try of a request; each further wait is twice as long.

        Raises:
            UserError: the process ends before it serves, for example because weights are missing.
        """
        self.rewards = tuple(name.name for name in names)
        self.weights = tuple(name.weight for name in names)
        own = [name.spec for name in names if not _is_address(name.spec)]
        self._process = RewardProcess(own, device, dtype) if own else None
        address = self._process.address if self._process else ""
        self._scorers = [
            (n.name, RemoteReward(n.spec if _is_address(n.spec) else f"{address}/{n.name}", pause=pause))
            for n in names
        ]
        self._pool = ThreadPoolExecutor(_ASKING, "judge")

    def submit(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> Future[Tensor]:
        """Return a future that is done when the process has answered; see ``Judge``."""
        return self._pool.submit(self._scores, _shown(images, prompts, t), list(prompts), t.cpu())

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.end()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _scores(self, images: "Shown", prompts: list[str], t: Tensor) -> Tensor:
        columns = []
        for name, reward in self._scorers:
            try:
                columns.append(_asked(reward, images, prompts, t))
            except UserError as error:
                why = self._process.post_mortem() if self._process else None
                if why is None:
                    raise
                raise UserError(
                    f"reward {name!r}: no scores for {shortened(prompts)}: the process of the rewards {why}"
                ) from error
        return torch.stack(columns, 1)


def combined(
    scores: Float[Tensor, "N S K R"], weights: Sequence[float], config: RolloutConfig
) -> Float[Tensor, "N S K"] | Float[Tensor, "N S K R"]:
    """Return one score of R, by ``config.combine`` (see ``rewards.combine``) after ``config.normalise``.

    "pareto" keeps the R columns and negates those of negative weights. "round" standardises each reward to
    mean 0 and std 1 (population std) over all of ``scores``, which are therefore those of all processes; a
    constant reward becomes 0. "group" standardises among the K rivals of each prompt, so that a reward counts
    the same in every group (GDPO, 2026, arXiv 2601.05242).

    Args:
        scores: (N, S, K, R), K rivals.
        weights: R.
        config: the run's rollout section.

    Returns:
        (N, S, K), or (N, S, K, R) for pareto.

    Raises:
        ValueError: the numbers of weights and of rewards differ.
    """
    values = scores
    if config.normalise != "none":
        values = standardised(scores) if config.normalise == "round" else standardised_in_groups(scores)
    if config.combine == "pareto":
        return towards_higher(values, weights).to(scores.dtype)
    return combine(values, weights, config.combine).to(scores.dtype)


def _is_address(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def _shown(images: Tensor, prompts: Sequence[str], t: Tensor, fps: float | None = None) -> Shown:
    """Return the 8-bit images, or videos of ``fps`` frames a second; ValueError if counts do not fit."""
    if not len(images) == len(prompts) == len(t):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(t)} times: not as many")
    return to_pil(images) if fps is None else to_videos(images, fps)


def _asked(reward: Reward, shown: Shown | Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
    """Return (B,) scores on the CPU, of latents, images or videos, with the time where the reward takes
    one.
    """
    with torch.no_grad():
        if isinstance(shown, Tensor) and isinstance(reward, NoisyReward):
            scores = reward.of_latents(shown, prompts, t)
        elif isinstance(reward, TimedReward):
            scores = reward.at(shown, prompts, t)
        else:
            scores = reward(shown, prompts)
    return scores.detach().float().cpu()


def _scored(name: str, reward: Reward, shown: Shown | Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
    """Return (B,) finite scores, after a second try if the first one fails.

    Raises:
        UserError: the reward's own, without a second try; else one that names reward and prompts.
    """
    for _ in range(_INLINE_TRIES):
        about, cause = list(prompts), None
        try:
            scores = _asked(reward, shown, prompts, t)
        except UserError:
            raise
        except Exception as error:  # whatever a back-end raises
            problem, cause = f"{type(error).__name__}: {error}", error
        else:
            if scores.shape != (len(prompts),):
                problem = f"scores of shape {tuple(scores.shape)} for {len(prompts)} images"
            elif bool(scores.isfinite().all()):
                return scores
            else:
                bad = (~scores.isfinite()).nonzero().flatten().tolist()
                about, problem = [prompts[i] for i in bad], f"the score {float(scores[bad[0]])}"
    raise UserError(
        f"reward {name!r}: no scores for {shortened(about)} ({_INLINE_TRIES} tries): {problem}"
    ) from cause
