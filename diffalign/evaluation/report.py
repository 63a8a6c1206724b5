"""The evaluation written down: report.json for programs, report.html for people, scores.jsonl by prompt.

The page is one file without any dependency: images, style and script are inside it, so it can be mailed. It
gives the verdict first, in one sentence with its interval.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation import curves, sections
from diffalign.evaluation.evaluate import Evaluation, RewardResult
from diffalign.evaluation.image_statistics import StatisticChange
from diffalign.evaluation.media import MediaLike
from diffalign.evaluation.page import page
from diffalign.files import read_json_lines, write_atomic

_PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")


@dataclass(frozen=True)
class RunFacts:
    """What a report says about the run that it judges.

    Attributes:
        method: name of the method ("dpo").
        train_seconds: how long training took; None if not known.
        steps: optimizer steps; None if not known.
        settings: anything worth recording, nested as one likes (the resolved configuration, sampling
            settings).
        versions: of packages; see ``package_versions``.
        title: what was aligned, for the page's head.
    """

    method: str
    train_seconds: float | None = None
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    title: str = ""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def report_data(evaluation: Evaluation, facts: RunFacts) -> dict[str, Any]:
    """What ``report.json`` holds; ``prompts`` is the number of distinct prompts. ``motion`` is of videos."""
    primary = evaluation.primary.comparison
    return {
        "method": facts.method,
        "prompts": primary.prompts,
        "base": primary.base,
        "aligned": primary.aligned,
        "gain": primary.gain.value,
        "gain_ci95": primary.gain.interval,
        "win_rate": primary.win_rate.value,
        "win_rate_ci95": primary.win_rate.interval,
        "train_seconds": facts.train_seconds,
        "steps": facts.steps,
        "versions": dict(facts.versions),
        "rewards": {result.name: _reward_data(result) for result in evaluation.rewards},
        "image_statistics": {change.name: _change_data(change) for change in evaluation.looks},
        **({"motion": {c.name: _change_data(c) for c in evaluation.motion}} if evaluation.motion else {}),
        "alarm": list(evaluation.alarm),
        "seed": evaluation.seed,
        "settings": dict(facts.settings),
    }


def _change_data(change: StatisticChange) -> dict[str, Any]:
    return {
        "base": change.base,
        "aligned": change.aligned,
        "change": change.change.value,
        "change_ci95": change.change.interval,
        "flagged": change.flagged,
    }


def _reward_data(result: RewardResult) -> dict[str, Any]:
    comparison = result.comparison
    return {
        "base": comparison.base,
        "aligned": comparison.aligned,
        "gain": comparison.gain.value,
        "gain_ci95": comparison.gain.interval,
        "win_rate": comparison.win_rate.value,
        "win_rate_ci95": comparison.win_rate.interval,
        "win": comparison.wins,
        "tie": comparison.ties,
        "loss": comparison.losses,
        "p_value": comparison.p_value,
    }


def write_report(
    folder: Path | str,
    evaluation: Evaluation,
    base_images: Sequence[MediaLike],
    aligned_images: Sequence[MediaLike],
    facts: RunFacts,
    *,
    metrics: Path | str | None = None,
    shown: int | None = None,
) -> Path:
    """Write report.json, scores.jsonl and report.html into ``folder``, atomically; returns the page's path.

    ``base_images`` and ``aligned_images`` are those that were evaluated, in the same order; the ``shown``
    largest gains, the ``shown`` largest losses and ``shown`` random pairs go into the page (24, of
    videos 8). ``metrics`` is the run's metrics.jsonl.

    Raises:
        UserError: counts that differ, or metrics that cannot be read.
    """
    if not len(base_images) == len(aligned_images) == len(evaluation.prompts):
        raise UserError(
            f"{len(base_images)} base and {len(aligned_images)} aligned images for an evaluation of "
            f"{len(evaluation.prompts)} pairs: give those that were evaluated"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [] if metrics is None else read_json_lines(Path(metrics))
    data = report_data(evaluation, facts)
    write_atomic(folder / "report.json", json.dumps(data, indent=2, default=str) + "\n")
    table = [
        {"prompt": row.prompt, "images": row.images, "base": dict(row.base), "aligned": dict(row.aligned)}
        for row in evaluation.rows
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    write_atomic(folder / "scores.jsonl", lines)
    target = folder / "report.html"
    html = render(evaluation, base_images, aligned_images, facts, rows, shown)
    write_atomic(target, html)
    return target


def render(
    evaluation: Evaluation,
    base_images: Sequence[MediaLike],
    aligned_images: Sequence[MediaLike],
    facts: RunFacts,
    metrics: Sequence[Mapping[str, Any]] = (),
    shown: int | None = None,
) -> str:
    """The page as text; ``shown`` None is 24 pairs of images in each order, 8 of videos."""
    shown = (8 if evaluation.motion else 24) if shown is None else shown
    parts = [
        sections.head(evaluation, facts.title or f"{facts.method}: base against aligned"),
        sections.numbers(evaluation, facts.train_seconds, facts.steps),
        sections.alarm(evaluation),
        sections.rewards(evaluation),
        sections.motion(evaluation),
        sections.pairs(evaluation, base_images, aligned_images, shown),
        sections.distributions(evaluation),
        sections.statistics(evaluation),
        curves.training(metrics),
        curves.held_out(metrics),
        sections.settings(facts.settings, facts.versions, evaluation.seed),
    ]
    return page(f"{sections.verdict(evaluation)[0]} {facts.title}".strip(), "\n".join(parts))
