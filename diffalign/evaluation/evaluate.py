"""Comparison of base and aligned model on the same prompts and noise: scores, intervals, statistics, alarm.

Images and videos are treated alike: a reward of images scores a video as the mean over frames, image
statistics are means over frames, and videos have statistics of their motion besides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.evaluation.drawing.pipeline import Pipeline
from diffalign.evaluation.drawing.samples import Sample
from diffalign.evaluation.drawing.sampling import DEFAULTS, SamplingSettings, generate
from diffalign.evaluation.measuring.image_statistics import (
    StatisticChange,
    diversities,
    diversity_change,
    statistic_changes,
)
from diffalign.evaluation.measuring.measuring import Measured, check_finite, measure
from diffalign.evaluation.measuring.motion import MOTION
from diffalign.evaluation.measuring.perceptual import Fid, Perceptual
from diffalign.evaluation.measuring.statistics import MIN_PROMPTS as MIN_PROMPTS
from diffalign.evaluation.measuring.statistics import (
    Comparison,
    Estimate,
    bootstrap_mean,
    compare,
    prompt_means,
)
from diffalign.media.files import MediaLike, all_videos
from diffalign.types import Reward

FALL = 0.2  # another reward may fall by this many standard deviations of the base's scores without an alarm


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
    """The results of an evaluation, without the images.

    Attributes:
        prompts: the prompt of each of the N image pairs.
        rewards: one result each; the first is the primary one, which gives the verdict.
        statistics: of images, and of the motion of videos, and their changes.
        rows: the table by prompt, in order of appearance.
        alarm: sentences on measurements that got worse while the primary reward rose; may be empty.
        seed: of the bootstrap (and of the sampling, in ``compare_pipelines``).
        fid: against real images, if it was measured.
        lpips_to_base: LPIPS of base and aligned image of the same noise, over prompts, if it was measured.
    """

    prompts: tuple[str, ...] = field(repr=False)
    rewards: tuple[RewardResult, ...]
    statistics: tuple[StatisticChange, ...]
    rows: tuple[PromptRow, ...] = field(repr=False)
    alarm: tuple[str, ...]
    seed: int
    fid: Fid | None = None
    lpips_to_base: Estimate | None = None

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
        """The primary reward's ``Comparison.outcome``."""
        return self.primary.comparison.outcome


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
    return judged(base, aligned, prompts, kind, seed=seed, resamples=resamples)


def judged(
    base: Measured,
    aligned: Measured,
    prompts: Sequence[str],
    kind: str,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    perceptual: Perceptual | None = None,
) -> Evaluation:
    """Return the evaluation of N pairs (of ``kind`` ``image`` or ``video``) that have been measured.

    ``perceptual`` adds FID and LPIPS.

    Raises:
        UserError: a score that is not finite.
    """
    results = []
    for name in base.scores:
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
    if perceptual is not None and perceptual.base_diversity:
        spreads = perceptual.base_diversity, perceptual.aligned_diversity
        statistics += (diversity_change("lpips_diversity", *spreads, seed),)
    to_base = perceptual.to_base if perceptual is not None else ()
    return Evaluation(
        prompts=tuple(prompts),
        rewards=tuple(results),
        statistics=statistics,
        rows=_rows(prompts, results),
        alarm=tuple(_alarm(results, statistics, f"{kind}s")),
        seed=seed,
        fid=None if perceptual is None else perceptual.fid,
        lpips_to_base=bootstrap_mean(prompt_means(to_base, prompts)[1], seed, resamples) if to_base else None,
    )


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
    """Return sentences on what got worse while the primary reward rose; none if it did not rise, or if there
    are too few prompts for an interval.
    """
    primary = results[0]
    if primary.comparison.gain.low <= 0 or primary.comparison.prompts < MIN_PROMPTS:
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
    """An evaluation and its samples, pair by pair."""

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
