"""Base against aligned on the same prompts and noise: scores, intervals, statistics and the alarm.

Images and videos are treated alike: a reward of images scores a video as the mean over frames, image
statistics are means over frames, and videos have statistics of their motion besides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.evaluation.image_statistics import (
    StatisticChange,
    diversities,
    image_statistics,
    statistic_changes,
    thumbnail,
)
from diffalign.evaluation.media import Media, MediaLike, all_videos, open_media
from diffalign.evaluation.motion import MOTION, motion_statistics
from diffalign.evaluation.sampling import DEFAULTS, Pipeline, Sample, SamplingSettings, generate
from diffalign.evaluation.statistics import Comparison, compare, prompt_means
from diffalign.rewards.of_videos import evenly_spaced, frame_image, takes_videos
from diffalign.types import Reward
from diffalign.videos import Video

MIN_PROMPTS = 6  # with fewer even a clean sweep has a sign-test p above 0.05, whatever the bootstrap says
FALL = 0.2  # standard deviations of the base's scores that another reward may fall before the alarm
_CHUNK = 32  # images that are open at once
_VIDEOS = 4  # videos
_FRAMES = 4  # of a video, whose image statistics are taken


@dataclass(frozen=True)
class RewardResult:
    """One reward's comparison and the N scores behind it."""

    name: str
    comparison: Comparison
    base_scores: tuple[float, ...] = field(repr=False)
    aligned_scores: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class PromptRow:
    """One prompt: mean scores of its images by reward."""

    prompt: str
    images: int
    base: Mapping[str, float]
    aligned: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Everything that is known after an evaluation; images are kept by the caller.

    Attributes:
        prompts: the prompt of each of the N image pairs.
        rewards: one result each; the first is the primary one, by which the verdict is given.
        statistics: of images, and of the motion of videos, and their changes.
        rows: the table by prompt, in order of appearance.
        alarm: sentences on what has got worse while the primary reward rose; empty if nothing has.
        seed: of the bootstrap (and of the sampling, in ``compare_pipelines``).
    """

    prompts: tuple[str, ...] = field(repr=False)
    rewards: tuple[RewardResult, ...]
    statistics: tuple[StatisticChange, ...]
    rows: tuple[PromptRow, ...] = field(repr=False)
    alarm: tuple[str, ...]
    seed: int

    @property
    def motion(self) -> tuple[StatisticChange, ...]:
        """The statistics that only videos have; empty for images."""
        return tuple(change for change in self.statistics if change.name in MOTION)

    @property
    def looks(self) -> tuple[StatisticChange, ...]:
        """The statistics of images, or of the frames of videos."""
        return tuple(change for change in self.statistics if change.name not in MOTION)

    @property
    def kind(self) -> str:
        """``images`` or ``videos``."""
        return "videos" if self.motion else "images"

    @property
    def primary(self) -> RewardResult:
        """The first reward."""
        return self.rewards[0]

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``no difference shown`` or ``too few prompts``, by the primary gain."""
        comparison = self.primary.comparison
        if comparison.prompts < MIN_PROMPTS:
            return "too few prompts"
        if comparison.gain.low > 0:
            return "better"
        return "worse" if comparison.gain.high < 0 else "no difference shown"


def evaluate(
    base_images: Sequence[MediaLike],
    aligned_images: Sequence[MediaLike],
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    progress: bool = True,
) -> Evaluation:
    """Score N pairs of images; pair i has the prompt ``prompts[i]`` and the same noise.

    A prompt may occur several times. Images are PIL images or files; all may be videos in place of images.
    The first reward is the primary one.

    Raises:
        UserError: counts that differ, nothing to compare, no reward, an unreadable image, or a score that is
            not finite.
    """
    if not len(base_images) == len(aligned_images) == len(prompts):
        raise UserError(
            f"{len(base_images)} base images, {len(aligned_images)} aligned images and {len(prompts)} "
            "prompts: there must "
            "be as many of each"
        )
    if not prompts:
        raise UserError("nothing to evaluate: no images")
    if not rewards:
        raise UserError("nothing to evaluate by: give at least one reward")
    total = 2 * len(prompts)
    kind = "video" if all_videos([*base_images, *aligned_images]) else "image"
    with tqdm(total=total, desc="scoring", unit=kind, disable=not progress) as bar:
        base = measure(base_images, prompts, rewards, bar)
        aligned = measure(aligned_images, prompts, rewards, bar)
    results = []
    for name in rewards:
        for which, scores in (("base", base.scores[name]), ("aligned", aligned.scores[name])):
            check_finite(name, scores, prompts, f"the {which} {kind}")
        comparison = compare(base.scores[name], aligned.scores[name], prompts, seed, resamples)
        results.append(RewardResult(name, comparison, tuple(base.scores[name]), tuple(aligned.scores[name])))
    statistics = statistic_changes(
        base.statistics,
        aligned.statistics,
        prompts,
        diversities(base.thumbnails, prompts),
        diversities(aligned.thumbnails, prompts),
        seed,
    )
    return Evaluation(
        prompts=tuple(prompts),
        rewards=tuple(results),
        statistics=statistics,
        rows=_rows(prompts, results),
        alarm=tuple(_alarm(results, statistics, f"{kind}s")),
        seed=seed,
    )


def check_finite(name: str, scores: Sequence[float], prompts: Sequence[str], what: str) -> None:
    """UserError naming the reward and the first prompt whose score is not a finite number."""
    bad = [i for i, score in enumerate(scores) if not np.isfinite(score)]
    if bad:
        raise UserError(f"reward {name!r} gives {scores[bad[0]]} for {what} of {prompts[bad[0]]!r}")


@dataclass(frozen=True)
class Measured:
    """N images or videos: scores and statistics by name, N values each, and their thumbnails."""

    scores: dict[str, list[float]]
    statistics: dict[str, list[float]]
    thumbnails: list[np.ndarray] = field(repr=False)


def measure(
    sources: Sequence[MediaLike], prompts: Sequence[str], rewards: Mapping[str, Reward], bar: tqdm
) -> Measured:
    """Score images or videos and take their statistics, some at a time; ``bar`` counts them.

    Raises:
        UserError: one cannot be read, images and videos are mixed, or a reward of videos is to judge images.
    """
    scores: dict[str, list[float]] = {name: [] for name in rewards}
    statistics: dict[str, list[float]] = {}
    thumbnails: list[np.ndarray] = []
    videos = all_videos(sources)
    asked = {name: takes_videos(reward) if videos else reward for name, reward in rewards.items()}
    chunk = _VIDEOS if videos else _CHUNK
    for start in range(0, len(sources), chunk):
        media = [open_media(source) for source in sources[start : start + chunk]]
        for name, reward in asked.items():
            scores[name] += reward(media, prompts[start : start + chunk]).tolist()
        for one in media:
            values, small = _looked_at(one)
            for name, value in values.items():
                statistics.setdefault(name, []).append(value)
            thumbnails.append(small)
        bar.update(len(media))
    return Measured(scores, statistics, thumbnails)


def _looked_at(media: Media) -> tuple[dict[str, float], np.ndarray]:
    """Statistics by name, and the thumbnail: of an image, or of some frames of a video and of its motion."""
    if not isinstance(media, Video):
        return image_statistics(media), thumbnail(media)
    frames = [frame_image(media, index) for index in evenly_spaced(len(media.frames), _FRAMES)]
    found = [image_statistics(frame) for frame in frames]
    means = {name: float(np.mean([values[name] for values in found])) for name in found[0]}
    return means | motion_statistics(media), np.concatenate([thumbnail(frame) for frame in frames])


def _rows(prompts: Sequence[str], results: Sequence[RewardResult]) -> tuple[PromptRow, ...]:
    names, counts = prompt_means(np.ones(len(prompts)), prompts)[0], dict.fromkeys(prompts, 0)
    for prompt in prompts:
        counts[prompt] += 1
    base = {r.name: prompt_means(r.base_scores, prompts)[1] for r in results}
    aligned = {r.name: prompt_means(r.aligned_scores, prompts)[1] for r in results}
    return tuple(
        PromptRow(
            prompt,
            counts[prompt],
            {name: float(means[i]) for name, means in base.items()},
            {name: float(means[i]) for name, means in aligned.items()},
        )
        for i, prompt in enumerate(names)
    )


def _alarm(results: Sequence[RewardResult], statistics: Sequence[StatisticChange], kind: str) -> list[str]:
    """What got worse while the primary reward rose; nothing if it did not rise."""
    primary = results[0]
    if primary.comparison.gain.low <= 0:
        return []
    warnings = []
    for result in results[1:]:
        gain = result.comparison.gain
        if gain.high < 0 and gain.value < -FALL * float(np.std(result.base_scores)):
            warnings.append(
                f"{primary.name} rose but {result.name} fell: {result.comparison.base:.4g} to "
                f"{result.comparison.aligned:.4g} ({gain.value:+.3g}, 95 % interval {gain.low:+.3g} to "
                f"{gain.high:+.3g})."
            )
    for change in statistics:
        if change.flagged:
            verb = "rose" if change.change.value > 0 else "fell"
            warnings.append(
                f"{primary.name} rose but the {change.title} {verb} from {change.base:.3g} to "
                f"{change.aligned:.3g}: a sign of over-optimisation. Look at the {kind}; more regularisation "
                "(a larger beta) or fewer steps may help."
            )
    return warnings


@dataclass(frozen=True)
class PipelineComparison:
    """An evaluation and the samples that it is of, pair by pair."""

    evaluation: Evaluation
    base: tuple[Sample, ...] = field(repr=False)
    aligned: tuple[Sample, ...] = field(repr=False)


def compare_pipelines(
    base: Pipeline,
    aligned: Pipeline,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    settings: SamplingSettings = DEFAULTS,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    folder: Path | str | None = None,
    progress: bool = True,
) -> PipelineComparison:
    """Sample both pipelines with the same noise and evaluate; images go to ``folder``/base and /aligned.

    Raises:
        UserError: see ``generate`` and ``evaluate``.
    """
    drawn = []
    for name, pipeline in (("base", base), ("aligned", aligned)):
        drawn.append(
            generate(
                pipeline,
                prompts,
                settings,
                images_per_prompt=images_per_prompt,
                seed=seed,
                batch_size=batch_size,
                folder=None if folder is None else Path(folder) / name,
                progress=progress,
                title=f"sampling {name}",
            )
        )
    before, after = drawn
    evaluation = evaluate(
        [s.source for s in before],
        [s.source for s in after],
        [s.prompt for s in before],
        rewards,
        seed=seed,
        progress=progress,
    )
    return PipelineComparison(evaluation, tuple(before), tuple(after))
